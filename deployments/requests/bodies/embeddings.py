"""The bodies of the routes of the models: embeddings and reranking."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from deployments.errors import InvalidRequest
from deployments.requests.bodies.wire import RequestBody
from deployments.requests.fields import OrNull, RerankQuery, encodable

MAX_INPUTS = 2_048
_IDS_AT_A_TIME = 8_192  # are checked by calls that hold the interpreter's lock
Ids = list[int] | list[list[int]]
Inputs = str | list[str] | Ids

# As JSON schemas describe them.
_TokenIdsSchema = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_TextSchema = Annotated[str, Field(min_length=1)]
IdsSchema = _TokenIdsSchema | Annotated[list[_TokenIdsSchema], Field(min_length=1, max_length=MAX_INPUTS)]
TextsSchema = _TextSchema | Annotated[list[_TextSchema], Field(min_length=1, max_length=MAX_INPUTS)]
InputsSchema = TextsSchema | IdsSchema


def check_inputs(value: Any, name: str = "input") -> Any:
    """Return `value` if it is a string, a list of strings, token ids, or a list of lists of token ids.

    Pydantic's own union would make an error of every item, for every branch that the item does not fit.

    Raises:
        InvalidRequest: it is anything else, or one of its inputs is empty.
    """
    if isinstance(value, str):
        _check_text(value, name)
        return value
    if not isinstance(value, list):
        raise InvalidRequest("must be a string, a list of strings, or token ids", name)
    if not value:
        raise InvalidRequest("must not be empty", name, "empty_input")
    kind = type(value[0])
    if kind is int:
        _check_token_ids(value, name)
        return value
    if len(value) > MAX_INPUTS:
        raise InvalidRequest(f"must hold at most {MAX_INPUTS} items, not {len(value)}", name, "too_many_inputs")
    for position, item in enumerate(value):
        path = f"{name}.{position}"
        if type(item) is not kind or kind not in (str, list):
            raise InvalidRequest("must be a string; or every input must be a list of token ids", path)
        if kind is str:
            _check_text(item, path)
        else:
            _check_token_ids(item, path)
    return value


def is_single(given: Inputs) -> bool:
    """Whether one input was given without a list around it."""
    return isinstance(given, str) or isinstance(given[0], int)


def as_list(given: Inputs) -> list[str] | list[list[int]]:
    """The inputs as a list, which holds one if a single input was given."""
    return cast(list[str] | list[list[int]], [given] if is_single(given) else given)


def _check_text(text: str, path: str) -> None:
    if not text:
        raise InvalidRequest("must not be empty", path, "empty_input")
    try:
        encodable(text)
    except ValueError as error:
        raise InvalidRequest(str(error), path) from error


def _check_token_ids(ids: list[Any], path: str) -> None:
    if not ids:
        raise InvalidRequest("must not be empty", path, "empty_input")
    for start in range(0, len(ids), _IDS_AT_A_TIME):
        piece = ids[start : start + _IDS_AT_A_TIME]
        if set(map(type, piece)) == {int} and min(piece) >= 0 and max(piece) < 2**63:
            continue
        position = next(n for n, token in enumerate(piece) if type(token) is not int or not 0 <= token < 2**63)
        raise InvalidRequest("must be a token id (a non-negative integer)", f"{path}.{start + position}")


class EmbeddingsBody(RequestBody):
    """`POST /v1/embeddings`: OpenAI's fields, with Cohere's `input_type`, `truncate` and output types."""

    input: Annotated[Inputs, PlainValidator(check_inputs, json_schema_input_type=InputsSchema)]
    """A text, a list of token ids, or a list of either with at most 2,048 items; none of them empty."""
    model: str | None = None
    """Must be the served model, if it is given; with or without its organisation on the hub."""
    encoding_format: OrNull[Literal["float", "base64"]] = "float"
    """`base64` is of the little-endian float32 values of a vector."""
    dimensions: int | None = Field(None, ge=1)
    """Keep so many dimensions and scale to length one again. At most the dimensions of the model."""
    user: str | None = None
    """Accepted for OpenAI's clients, and ignored."""
    input_type: Literal["query", "document"] | None = None
    """Chooses the prompt and the longest input of models that distinguish the two."""
    truncate: OrNull[Literal["none", "end", "start"]] = "end"
    """The end at which an input is cut that is longer than the model reads; `none` refuses it."""
    output_dtype: OrNull[Literal["float", "int8", "uint8", "binary", "ubinary"]] = "float"
    """The type of a dimension. `binary` and `ubinary` have one bit for each, eight to a byte. Not with `base64`."""

    @model_validator(mode="after")
    def _check_type_of_base64(self) -> "EmbeddingsBody":
        # OpenAI's clients ask for base64 unless they are told otherwise, and read float32 from it, whatever it holds.
        if self.encoding_format == "base64" and self.output_dtype != "float":
            message = f'must be "float" if output_dtype is {self.output_dtype!r}: clients read float32 from base64'
            raise InvalidRequest(message, "encoding_format", "base64_is_float32")
        return self


class DocumentBody(BaseModel):
    """A document as an object, of which other fields are ignored."""

    model_config = ConfigDict(extra="allow")

    text: Annotated[str, Field(min_length=1)]


Documents = Annotated[list[_TextSchema | DocumentBody], Field(min_length=1, max_length=MAX_INPUTS)]


def _check_documents(value: Any) -> list[str]:
    """The texts of documents. As in `check_inputs`, pydantic's union would make an error of every item."""
    if not isinstance(value, list):
        raise InvalidRequest("must be a list", "documents")
    if not value:
        raise InvalidRequest("must not be empty", "documents", "empty_input")
    if len(value) > MAX_INPUTS:
        raise InvalidRequest(f"must hold at most {MAX_INPUTS} items, not {len(value)}", "documents", "too_many_inputs")
    texts = []
    for position, item in enumerate(value):
        path = f"documents.{position}"
        text = item
        if isinstance(item, Mapping):
            path = f"{path}.text"
            if "text" not in item:
                raise InvalidRequest("is required", path, "missing_field")
            text = item["text"]
        if not isinstance(text, str):
            raise InvalidRequest("must be a string", path)
        _check_text(text, path)
        texts.append(text)
    return texts


class RerankBody(RequestBody):
    """`POST /v1/rerank` and `POST /v2/rerank`: score documents for a query, in the form of Cohere and Jina."""

    query: RerankQuery
    """What the documents are scored for, at most 32,768 characters."""
    documents: Annotated[list[str], PlainValidator(_check_documents, json_schema_input_type=Documents)]
    """At most 2,048 texts, or objects with the field `text`, of which other fields are ignored."""
    model: str | None = None
    """Must be the served reranker, if it is given; with or without its organisation on the hub."""
    top_n: int | None = Field(None, ge=1)
    """How many results are wanted. Default: all."""
    return_documents: OrNull[bool] = False
    """Whether results are answered with their documents."""
    max_tokens_per_doc: int | None = Field(None, ge=1)
    """Accepted for Cohere's clients, and ignored: what the model does not read of a document is cut off."""
