"""The bodies and queries of the routes. The handle API validates its arguments by the same models.

A body is parsed and validated in one pass by pydantic's own JSON reader. The first violation becomes an
`InvalidRequest` whose `param` is the path of the field (`memories.3.text`). If a body has room for millions of
violations, validation stops at the first one, since pydantic would make an error of each.

Code below the service does not know these models.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core.core_schema import ChainSchema, any_schema, chain_schema, dict_schema, literal_schema

from deployments.errors import InvalidRequest
from deployments.requests.fields import (
    MAX_RERANK_QUERY,
    Cursor,
    EmbeddedText,
    Filter,
    FilterInQuery,
    Limit,
    Metadata,
    NewId,
    OrNull,
    Prefix,
    RerankQuery,
    StoredId,
    Text,
    Thread,
    Time,
    Vector,
    encodable,
)
from deployments.requests.principal import KeyScope
from store import Mode, Order, ResultOrder

MAX_INPUTS = 2_048
MAX_TOP_K = 1_000
MAX_CONTEXT = 20
MAX_BUDGET = 1_000_000
MAX_GROUPS = 100
MAX_IDS = 1_000
_IDS_AT_A_TIME = 8_192  # are checked by calls that hold the interpreter's lock

Body = TypeVar("Body", bound=BaseModel)


class _Wire(BaseModel):
    # A field's docstring is its description in the OpenAPI document.
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), use_attribute_docstrings=True)


def _refuse_unknown_field(name: str) -> str:
    raise _unknown_field(name)


def _unknown_field(path: str) -> InvalidRequest:
    return InvalidRequest("unknown field", path, "unknown_field")


def _body_config(**rules: Any) -> ConfigDict:
    """The config of a body; `rules` are rules of JSON Schema about more than one field."""
    return ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False, **rules})


def _required(name: str, kind: str) -> dict[str, Any]:
    """JSON Schema: the field is given, and is not null."""
    return {"required": [name], "properties": {name: {"type": kind}}}


class RequestBody(_Wire):
    """A body. Validation stops at its first unknown field.

    Pydantic would collect the ValueErrors of a validator; it lets other errors pass.
    """

    model_config = _body_config()
    __pydantic_extra__: dict[Annotated[str, AfterValidator(_refuse_unknown_field)], Any]


class Nested:
    """Annotates a body within another.

    Its first unknown field becomes a wrong key of a mapping, whose path pydantic knows.
    """

    def __get_pydantic_core_schema__(self, body: type[RequestBody], handler: GetCoreSchemaHandler) -> ChainSchema:
        known = dict_schema(literal_schema([*body.model_fields]), any_schema(), fail_fast=True)
        return chain_schema([known, handler(body)])

    def __get_pydantic_json_schema__(self, schema: ChainSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(chain_schema(schema["steps"][1:]))


Ids = list[int] | list[list[int]]
Inputs = str | list[str] | Ids
# As JSON schemas describe them.
_TokenIdsSchema = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_TextSchema = Annotated[str, Field(min_length=1)]
IdsSchema = _TokenIdsSchema | Annotated[list[_TokenIdsSchema], Field(min_length=1, max_length=MAX_INPUTS)]
TextsSchema = _TextSchema | Annotated[list[_TextSchema], Field(min_length=1, max_length=MAX_INPUTS)]
InputsSchema = TextsSchema | IdsSchema
MemoryIds = Annotated[list[StoredId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]


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


class NewMemoryBody(RequestBody):
    """One memory to add. The server makes an id if none is given."""

    text: Text
    """Must not be blank."""
    id: NewId | None = None
    """Your own id makes a retry safe: the same content under it is `unchanged`. Default: the server makes a UUID."""
    metadata: OrNull[Metadata] = Field(default_factory=dict)
    """Any JSON object, up to 32 levels deep, with integers of at most 64 bits. Default: empty."""
    expires_at: Time | None = None
    """A time in the future, with its time zone, at which the memory is forgotten. Default: never."""
    vector: Vector | None = None
    """Your own embedding of the text, with the dimensions of the model. It replaces another vector that a memory with
    this id and the same content has: `updated`. Default: the model's."""
    created_at: Time | None = None
    """When the memory was made, with its time zone; at most a minute in the future. It replaces another time that a
    memory with this id and the same content has: `updated`. Default: now, or the time that the memory has."""
    happened_at: Time | None = None
    """When what the memory tells happened or will happen, with its time zone. It replaces another time that a memory
    with this id and the same content has: `updated`. Default: `created_at`, or the time that the memory has."""
    thread: Thread | None = None
    """The conversation that the memory is a part of, in the order of `created_at` and, of one time, in which memories
    were added. It replaces another thread that a memory with this id and the same content has: `updated`. Default:
    none, or the thread that the memory has."""


class UserMemoryBody(NewMemoryBody):
    """One memory to add, with its user, for a call that carries memories of many users."""

    user_id: NewId
    """The user who is to remember it. It need not exist yet."""


def _check_duplicate_score(body: "AddBody | AddManyBody") -> None:
    if body.duplicate_score is not None and body.on_duplicate != "skip":
        raise InvalidRequest('needs "on_duplicate": "skip"', "duplicate_score")


class AddBody(NewMemoryBody):
    """`POST /v1/users/{user_id}/memories`: one memory inline, or a list under `memories`."""

    model_config = _body_config(oneOf=[_required("text", "string"), _required("memories", "array")])

    text: Text | None = None  # type: ignore[assignment]
    """Must not be blank. For a single memory."""
    metadata: Metadata | None = None  # type: ignore[assignment]
    """Any JSON object, up to 32 levels deep, with integers of at most 64 bits. Default: empty."""
    memories: list[Annotated[NewMemoryBody, Nested()]] | None = Field(
        None, min_length=1, max_length=MAX_INPUTS, fail_fast=True
    )
    """Several memories, which are all written or none."""
    on_duplicate: OrNull[Literal["add", "skip"]] = "add"
    """`skip` adds no memory whose text and metadata the user already has, and answers with the id of that one. If that
    one would expire earlier, it gets the new expiry, and it gets a `vector` that is given: `updated`. A memory of
    another `thread` or `happened_at` than the one that is given is no duplicate."""
    duplicate_score: float | None = Field(None, gt=0, le=1)
    """With `skip`, a memory is not added either if its vector has at least this cosine similarity to that of a memory
    that the user has, or that the request adds. The answer has the id of the nearest, which stays as it is. A memory
    that expires earlier is no duplicate."""
    upsert: OrNull[bool] = False
    """Whether other content under an id replaces what it holds. If not, that is a 409."""

    @model_validator(mode="after")
    def _check_one_form(self) -> "AddBody":
        _check_duplicate_score(self)
        fields = ("created_at", "expires_at", "happened_at", "id", "metadata", "text", "thread", "vector")
        inline = [name for name in fields if getattr(self, name) is not None]
        if self.memories is None and self.text is None:
            raise ValueError("Give either text or memories.")
        if self.memories is not None and inline:
            raise ValueError(f"Give either memories or {inline[0]}, not both.")
        return self

    def items(self) -> list[NewMemoryBody]:
        """The memories, in whichever form they were given."""
        if self.memories is not None:
            return self.memories
        assert self.text is not None
        return [
            NewMemoryBody.model_construct(
                text=self.text,
                id=self.id,
                metadata=self.metadata or {},
                expires_at=self.expires_at,
                vector=self.vector,
                created_at=self.created_at,
                happened_at=self.happened_at,
                thread=self.thread,
            )
        ]


class AddManyBody(RequestBody):
    """`POST /v1/memories`: memories of many users in one call."""

    memories: list[Annotated[UserMemoryBody, Nested()]] = Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
    """All of them are written or none."""
    on_duplicate: OrNull[Literal["add", "skip"]] = "add"
    """`skip` adds no memory whose text and metadata its user already has, and answers with the id of that one. If that
    one would expire earlier, it gets the new expiry, and it gets a `vector` that is given: `updated`. A memory of
    another `thread` or `happened_at` than the one that is given is no duplicate."""
    duplicate_score: float | None = Field(None, gt=0, le=1)
    """With `skip`, a memory is not added either if its vector has at least this cosine similarity to that of a memory
    that the user has, or that the request adds. The answer has the id of the nearest, which stays as it is. A memory
    that expires earlier is no duplicate."""
    upsert: OrNull[bool] = False
    """Whether other content under an id replaces what it holds. If not, that is a 409."""

    @model_validator(mode="after")
    def _check_score(self) -> "AddManyBody":
        _check_duplicate_score(self)
        return self


class SearchBody(RequestBody):
    """`POST /v1/users/{user_id}/memories/search`: by text or by vector."""

    model_config = _body_config(oneOf=[_required("query", "string"), _required("vector", "array")])

    query: EmbeddedText | None = None
    """The text to search for."""
    vector: Vector | None = None
    """Your own embedding to search for, with the dimensions of the model."""
    mode: Mode | None = None
    """What memories are compared by. `vector`: the meaning of their texts. `words`: the words in them, which needs no
    embedding. `hybrid`: both. Default: `hybrid` with a query, `vector` with a vector, which permits no other mode."""
    top_k: OrNull[Annotated[int, Field(ge=1, le=MAX_TOP_K)]] = 10
    """How many memories are wanted."""
    filter: Filter | None = None
    """Only memories that match this filter."""
    min_score: float | None = Field(None, ge=-1.0, le=1.0)
    """Only memories with at least this score. Scores are in 0 to 1, and in mode `vector` in -1 to 1."""
    explain: OrNull[bool] = False
    """Whether the memories are answered with the parts of their scores."""
    since: Time | None = None
    """Only memories that were made at this time or later, by their `created_at`; with its time zone."""
    until: Time | None = None
    """Only memories that were made before this time, which must be later than `since`."""
    recency_half_life_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Prefer what happened lately: scores are multiplied by 2^(-age / half-life), but by no less than 0.75. The age is
    the time since `happened_at`, in seconds."""
    context: int | None = Field(None, ge=0, le=MAX_CONTEXT)
    """Add up to so many memories before and after each result in its `thread`, if they match as well, and let memories
    next to a good one score higher. With 0 none is added. Default: threads do not count."""
    max_tokens: int | None = Field(None, ge=1, le=MAX_BUDGET)
    """Answer with the best memories whose texts together have at most so many tokens of the model. A text that does not
    fit is left out, and the next is tried; context comes after all results."""
    order: OrNull[ResultOrder] = "score"
    """How the results are sorted, once the best are found. By `score` the best comes first, with its context around it;
    by a time the earliest comes first, and with `-` the latest."""
    include_vectors: OrNull[bool] = False
    """Whether the memories are answered with their vectors."""
    rerank: OrNull[bool] = False
    """Whether the best 50 memories, or `top_k` if that is more, are sorted again by the reranker's scores, which become
    their `score`. Needs `reranker.model`, and a `query` of at most 32,768 characters. `min_score` is of the scores
    before that."""

    @model_validator(mode="after")
    def _check_query_or_vector(self) -> "SearchBody":
        if (self.query is None) == (self.vector is None):
            raise ValueError("Give exactly one of query and vector.")
        if self.query is None and self.mode not in (None, "vector"):
            raise InvalidRequest(f"must be vector if there is no query, not {self.mode}", "mode")
        if self.rerank and self.query is None:
            raise InvalidRequest("needs a query", "rerank")
        if self.rerank and self.query is not None and len(self.query) > MAX_RERANK_QUERY:
            raise InvalidRequest(f"must have at most {MAX_RERANK_QUERY} characters to be reranked by", "query")
        if self.since is not None and self.until is not None and self.until <= self.since:
            raise InvalidRequest("must be later than since", "until")
        return self

    def ranked_by(self) -> Mode:
        """The mode, which may be the default."""
        return self.mode or ("vector" if self.query is None else "hybrid")


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


_REMOVABLE = ("expires_at", "happened_at", "thread")


class UpdateBody(RequestBody):
    """`PATCH /v1/users/{user_id}/memories/{memory_id}`: the fields that are given replace those of the memory.

    With `expires_at: null` the memory no longer expires, and null removes its `happened_at` and its `thread`. A null in
    another field changes nothing.
    """

    model_config = _body_config(
        anyOf=[
            _required("text", "string"),
            _required("vector", "array"),
            _required("metadata", "object"),
            _required("metadata_merge", "object"),
            {"required": ["expires_at"]},
            {"required": ["happened_at"]},
            {"required": ["thread"]},
        ]
    )

    text: Text | None = None
    """The new text, which is embedded unless a vector is given. Must not be blank."""
    vector: Vector | None = None
    """Your own embedding of the text, new or not, with the dimensions of the model."""
    metadata: Metadata | None = None
    """The new metadata, as a whole."""
    metadata_merge: Metadata | None = None
    """Keys to set in the metadata, at the top level only; `null` removes a key, as in a JSON Merge Patch (RFC 7396),
    and the other keys stay. Concurrent merges do not undo each other. Not together with `metadata`."""
    expires_at: Time | None = None
    """A time in the future, with its time zone; `null` keeps the memory for ever."""
    happened_at: Time | None = None
    """When what the memory tells happened or will happen, with its time zone; `null` stands for `created_at`."""
    thread: Thread | None = None
    """The conversation that the memory is a part of; `null` takes the memory out of its thread."""
    if_version: int | None = Field(None, ge=1)
    """Change only this version of the memory. If it has another one, that is a 409."""

    @model_validator(mode="after")
    def _check_any_change(self) -> "UpdateBody":
        if self.changes().keys() <= {"if_version"}:
            raise ValueError(
                "Give at least one of text, vector, metadata, metadata_merge, expires_at, happened_at and thread."
            )
        if self.metadata is not None and self.metadata_merge is not None:
            raise InvalidRequest("must not be given together with metadata", "metadata_merge")
        return self

    def changes(self) -> dict[str, Any]:
        """The fields that were given, by name; those of `_REMOVABLE` may be None."""
        given = self.model_dump(exclude_unset=True)
        return {name: value for name, value in given.items() if value is not None or name in _REMOVABLE}


class GetManyBody(RequestBody):
    """`POST /v1/users/{user_id}/memories/get`: get memories by their ids."""

    ids: MemoryIds
    """The ids of the memories, at most 1,000. One that is given twice counts once."""
    include_vectors: OrNull[bool] = False
    """Whether the memories are answered with their vectors."""


class DuplicatesBody(RequestBody):
    """`POST /v1/users/{user_id}/memories/duplicates`: list memories that are nearly the same."""

    score: OrNull[Annotated[float, Field(gt=0, le=1)]] = 0.95
    """The least cosine similarity of near duplicates."""
    limit: OrNull[Annotated[int, Field(ge=1, le=MAX_GROUPS)]] = 20
    """How many groups a page has at most."""
    cursor: Cursor | None = None
    """The `next_cursor` of the page before. Default: the first page."""


class DeleteBody(RequestBody):
    """`DELETE /v1/users/{user_id}/memories`: delete the memories that match, or those with these ids."""

    model_config = _body_config(oneOf=[_required("filter", "object"), _required("ids", "array")])

    filter: Filter | None = None
    """The memories to delete, by a filter."""
    ids: MemoryIds | None = None
    """The memories to delete, by their ids, at most 1,000. Ids of no memory are named in the answer as `missing`."""

    @model_validator(mode="after")
    def _check_filter_or_ids(self) -> "DeleteBody":
        if self.filter is None and self.ids is None:
            raise InvalidRequest("is required, unless ids are given", "filter", "missing_field")
        if self.filter is not None and self.ids is not None:
            raise InvalidRequest("must not be given together with filter", "ids")
        return self


PerMinute = Annotated[int, Field(strict=True, ge=1, le=1_000_000_000)]


class CreateKeyBody(RequestBody):
    """`POST /v1/keys`: make a key of your own tenant."""

    user_id: NewId | None = None
    """The only user that the key reaches. Default: all users of the tenant."""
    scopes: OrNull[Annotated[list[KeyScope], Field(min_length=1)]] = Field(default=["read", "write"])
    """What the key may do. `admin` makes, lists and revokes keys; not with `user_id`. Default: read and write."""
    label: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    """Shown in lists. Printable characters."""
    expires_at: Time | None = None
    """A time in the future, with its time zone, from which the key is refused. Default: never."""
    requests_per_minute: PerMinute | None = None
    """The requests that the key may make in a minute. Default: `limits.requests_per_minute`."""
    tokens_per_minute: PerMinute | None = None
    """The tokens that the key may have embedded in a minute. Default: `limits.tokens_per_minute`."""


class NoQuery(_Wire):
    """The query of a route that takes no parameters."""


class GetQuery(_Wire):
    """`GET /v1/users/{user_id}/memories/{memory_id}`"""

    include_vectors: bool = False
    """Whether the memory is answered with its vector."""


class ListQuery(_Wire):
    """`GET /v1/users/{user_id}/memories`"""

    limit: Limit = 100
    """How many memories a page has at most."""
    cursor: Cursor | None = None
    """The `next_cursor` of the page before. Default: the first page."""
    filter: FilterInQuery | None = None
    """Only memories that match this filter."""
    order: Order = "-created_at"
    """The time by which memories are sorted; with `-` the newest come first."""


class HistoryQuery(_Wire):
    """`GET /v1/users/{user_id}/memories/{memory_id}/history`"""

    limit: Limit = 100
    """How many states a page has at most."""
    cursor: Cursor | None = None
    """The `next_cursor` of the page before. Default: the first page."""


class DeleteQuery(_Wire):
    """`DELETE /v1/users/{user_id}/memories`, for clients that cannot send a body with DELETE."""

    filter: FilterInQuery | None = None
    """The memories to delete, by a filter."""


class UsersQuery(_Wire):
    """`GET /v1/users`"""

    limit: Limit = 100
    """How many users a page has at most."""
    cursor: Cursor | None = None
    """The `next_cursor` of the page before. Default: the first page."""
    prefix: Prefix = ""
    """Only users whose id begins like this."""


class KeysQuery(_Wire):
    """`GET /v1/keys`"""

    limit: Limit = 100
    """How many keys a page has at most."""
    cursor: Cursor | None = None
    """The `next_cursor` of the page before. Default: the first page."""


class EventsQuery(_Wire):
    """`GET /v1/events`"""

    limit: Limit = 100
    """How many events a page has at most."""
    after: Cursor | None = None
    """The `next_cursor` of the page before, or of an earlier request. Default: the oldest events."""


def check(model: type[Body], values: Mapping[str, Any]) -> Body:
    """Validate the arguments of a handle call. Raises InvalidRequest as `parse` does."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _first_violation(error) from error


def parse(model: type[Body], raw: bytes) -> Body:
    """Parse and validate a request body in one pass. Raises InvalidRequest with the path of the first wrong field."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise _first_violation(error) from error


def parse_query(model: type[Body], values: Mapping[str, str]) -> Body:
    """Validate the parameters of a query. Raises InvalidRequest as `parse` does."""
    try:
        return model.model_validate_strings(values)
    except ValidationError as error:
        raise _first_violation(error) from error


def _first_violation(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_input=False)[0]
    kind, path = first["type"], ".".join(str(part) for part in first["loc"])
    if kind == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {first['ctx']['error']}.", None, "invalid_json")
    if kind == "extra_forbidden":
        return _unknown_field(path)
    if kind == "literal_error" and first["loc"][-1] == "[key]":  # `Nested`
        return _unknown_field(path.removesuffix(".[key]"))
    if kind == "missing":
        return InvalidRequest("is required", path, "missing_field")
    message = str(first["ctx"]["error"]) if kind == "value_error" else first["msg"]
    return InvalidRequest(message, path or None)
