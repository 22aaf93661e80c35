"""The bodies of the routes of text-embeddings-inference (TEI).

Unknown fields are ignored, as TEI ignores them: huggingface_hub 0.28 to 0.31 sends `options`. These versions also put
the options of `feature_extraction` into `parameters`, where TEI does not look for them. They are read here, since a
prompt that is silently left out gives a wrong vector.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WrapValidator

from deployments.errors import InvalidRequest
from deployments.requests.bodies import (
    MAX_INPUTS,
    Ids,
    IdsSchema,
    Inputs,
    InputsSchema,
    TextsSchema,
    as_list,
    check_inputs,
)
from deployments.requests.fields import EmbeddedText, OrNull, RerankQuery


class TeiBody(BaseModel):
    """A body, of which unknown fields are ignored."""

    model_config = ConfigDict(
        extra="ignore",
        strict=True,
        use_attribute_docstrings=True,
        json_schema_extra={"additionalProperties": True},
    )


class TruncationBody(TeiBody):
    """Whether and where inputs are cut that are longer than the model reads."""

    truncate: bool | None = None
    """Whether an input that is longer than the model reads is cut. If not, it is refused."""
    truncation_direction: OrNull[Literal["right", "Right", "left", "Left"]] = "right"
    """The end at which it is cut."""

    def truncated_end(self) -> Literal["none", "end", "start"]:
        """The end at which an input that is too long is cut."""
        if not self.truncate:
            return "none"
        return "end" if self.truncation_direction.lower() == "right" else "start"


class PromptBody(TruncationBody):
    """How inputs are prepared. Without `prompt_name` the model's default prompt is used."""

    prompt_name: str | None = None
    """One of the prompts that `GET /info` names. Default: the model's default prompt."""


def _check_inputs(value: Any) -> Any:
    return check_inputs(value, "inputs")


def _check_texts(value: Any) -> Any:
    check_inputs(value, "inputs")
    if not isinstance(as_list(value)[0], str):
        raise InvalidRequest("must be a string or a list of strings", "inputs")
    return value


def _check_ids(value: Any) -> Any:
    check_inputs(value, "ids")
    if isinstance(as_list(value)[0], str):
        raise InvalidRequest("must be a list of token ids, or a list of such lists", "ids")
    return value


class EmbedOptions(PromptBody):
    """How inputs are prepared and vectors answered."""

    normalize: OrNull[bool] = True
    """Whether vectors are scaled to length one."""


class EmbedBody(EmbedOptions):
    """`POST /embed`: embed texts or token ids."""

    inputs: Annotated[Inputs, PlainValidator(_check_inputs, json_schema_input_type=InputsSchema)]
    """A text, a list of token ids, or a list of either with at most 2,048 items; none of them empty."""
    dimensions: int | None = Field(None, ge=1)
    """Keep so many dimensions. At most the dimensions of the model."""
    parameters: EmbedOptions | None = None
    """The other place for these options. An option beside `inputs` has precedence."""

    def options(self) -> EmbedOptions:
        """The options, from whichever place."""
        if self.parameters is None:
            return self
        beside = {
            name: value
            for name, field in EmbedOptions.model_fields.items()
            if (value := getattr(self, name)) != field.default
        }
        return self.parameters.model_copy(update=beside)

    def prompt_path(self) -> str:
        """The path of the name of the prompt."""
        in_parameters = self.parameters is not None and self.prompt_name is None
        return "parameters.prompt_name" if in_parameters else "prompt_name"


class SentencesBody(TeiBody):
    """A text, and the texts that it is compared with."""

    source_sentence: EmbeddedText
    """The text that the others are compared with."""
    sentences: list[EmbeddedText] = Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
    """The others."""


def _check_inputs_or_sentences(value: Any, sentences: Callable[[Any], SentencesBody]) -> SentencesBody | Inputs:
    return sentences(value) if isinstance(value, dict) else _check_inputs(value)


class RootBody(EmbedBody):
    """`POST /`: the body of `POST /embed` or of `POST /similarity`, whichever the inputs are for."""

    # Not typed as the union that it is, since pydantic would put the name of a branch into the path of an error.
    inputs: Annotated[  # type: ignore[assignment]
        SentencesBody, WrapValidator(_check_inputs_or_sentences, json_schema_input_type=SentencesBody | InputsSchema)
    ]
    """As of `POST /embed` or, to compare a text with others, as of `POST /similarity`."""


class SimilarityBody(TeiBody):
    """`POST /similarity`: compare one text with others."""

    inputs: SentencesBody
    """The texts."""
    parameters: PromptBody | None = None
    """How they are prepared."""

    def options(self) -> PromptBody:
        """How they are prepared."""
        return self.parameters or PromptBody()

    def prompt_path(self) -> str:
        """The path of the name of the prompt."""
        return "parameters.prompt_name"


class RankBody(TruncationBody):
    """`POST /rerank`: score texts for a query."""

    query: RerankQuery
    """What the texts are scored for, at most 32,768 characters."""
    texts: list[EmbeddedText] = Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
    """The texts."""
    raw_scores: OrNull[bool] = False
    """Whether scores are given before the model's activation function, which usually maps them to 0 to 1."""
    return_text: OrNull[bool] = False
    """Whether each score is answered with its text."""


class TokenizeBody(TeiBody):
    """`POST /tokenize`: split texts into tokens."""

    inputs: Annotated[str | list[str], PlainValidator(_check_texts, json_schema_input_type=TextsSchema)]
    """A text or a list of at most 2,048, with 65,536 characters at most together."""
    add_special_tokens: OrNull[bool] = True
    """Whether special tokens such as `[CLS]` are included."""


class DecodeBody(TeiBody):
    """`POST /decode`: join token ids into texts."""

    ids: Annotated[Ids, PlainValidator(_check_ids, json_schema_input_type=IdsSchema)]
    """A list of token ids, or a list of at most 2,048 such lists, with 65,536 ids at most together."""
    skip_special_tokens: OrNull[bool] = True
    """Whether special tokens such as `[CLS]` are left out."""
