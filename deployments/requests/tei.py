"""The bodies of text-embeddings-inference (TEI), and how it has inputs prepared."""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from deployments.embedding.model import Truncate
from deployments.errors import InvalidRequest
from deployments.requests.bodies import MAX_INPUTS, Ids, Inputs, RequestBody, Within, as_list, check_inputs
from deployments.requests.fields import Text


class PromptBody(RequestBody):
    """How texts-embeddings-inference prepares inputs: without a name of a prompt by the model's default."""

    truncate: bool | None = None
    truncation_direction: Literal["right", "Right", "left", "Left"] = "right"
    prompt_name: str | None = None

    def cuts(self) -> Truncate:
        """Which end of a too long input is cut."""
        if not self.truncate:
            return "none"
        return "end" if self.truncation_direction.lower() == "right" else "start"


def _tei_inputs(value: Any) -> Any:
    return check_inputs(value, "inputs")


def _texts(value: Any) -> Any:
    check_inputs(value, "inputs")
    if not isinstance(as_list(value)[0], str):
        raise InvalidRequest("inputs must be a string or a list of strings.", "inputs")
    return value


def _ids(value: Any) -> Any:
    check_inputs(value, "ids")
    if isinstance(as_list(value)[0], str):
        raise InvalidRequest("ids must be a list of token ids, or a list of such lists.", "ids")
    return value


class EmbedBody(PromptBody):
    """`POST /embed`, as text-embeddings-inference has it."""

    inputs: Annotated[Inputs, PlainValidator(_tei_inputs, json_schema_input_type=Inputs)]
    normalize: bool = True
    dimensions: int | None = Field(None, ge=1)


class SentencesBody(RequestBody):
    """A text, and those that it is compared with."""

    source_sentence: Text
    sentences: list[Text] = Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)


class SimilarityBody(RequestBody):
    """`POST /similarity`, as text-embeddings-inference has it."""

    inputs: Annotated[SentencesBody, Within()]
    parameters: Annotated[PromptBody, Within()] | None = None


class TokenizeBody(RequestBody):
    """`POST /tokenize`, as text-embeddings-inference has it."""

    inputs: Annotated[str | list[str], PlainValidator(_texts, json_schema_input_type=str | list[str])]
    add_special_tokens: bool = True


class DecodeBody(RequestBody):
    """`POST /decode`, as text-embeddings-inference has it."""

    ids: Annotated[Ids, PlainValidator(_ids, json_schema_input_type=Ids)]
