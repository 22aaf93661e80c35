"""What travels over HTTP, the contract of the routes; nothing past the gateway knows these models.

A body is parsed and validated in one pass by pydantic's own JSON reader; the first violation becomes an
`InvalidRequest` whose `param` is the path of the field (`memories.3.text`). Where a body has
room for millions of them, the first ends it: pydantic would make an error of each.
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
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core.core_schema import ChainSchema, any_schema, chain_schema, dict_schema, literal_schema

from deployments.errors import InvalidRequest
from deployments.requests.fields import (
    Cursor,
    Filter,
    FilterInQuery,
    HeldId,
    Id,
    Limit,
    Metadata,
    Prefix,
    Text,
    Time,
    Vector,
    encodable,
)
from store import Appended, HistoryEvent, Memory, Order, UserStats

MAX_INPUTS = 2_048
MAX_TOP_K = 1_000

Body = TypeVar("Body", bound=BaseModel)


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


def _refuse(name: str) -> str:
    raise _unknown(name)


def _unknown(path: str) -> InvalidRequest:
    return InvalidRequest(f"Unknown field {path}.", path, "unknown_field")


def _body(**rules: Any) -> ConfigDict:
    """The config of a body; rules of JSON Schema that are not those of one field."""
    return ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False, **rules})


def _given(name: str, kind: str) -> dict[str, Any]:
    """JSON Schema: a field is there, and not null."""
    return {"required": [name], "properties": {name: {"type": kind}}}


class RequestBody(_Wire):
    """A body. Its first unknown field ends it: pydantic collects the ValueErrors of a validator, and nothing else."""

    model_config = _body()
    __pydantic_extra__: dict[Annotated[str, AfterValidator(_refuse)], Any]


class Within:
    """A body within another. Its first unknown field is a wrong key of a mapping, an error that knows where it is."""

    def __get_pydantic_core_schema__(self, body: type[RequestBody], handler: GetCoreSchemaHandler) -> ChainSchema:
        known = dict_schema(literal_schema([*body.model_fields]), any_schema(), fail_fast=True)
        return chain_schema([known, handler(body)])

    def __get_pydantic_json_schema__(self, schema: ChainSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(chain_schema(schema["steps"][1:]))


Ids = list[int] | list[list[int]]
Inputs = str | list[str] | Ids


def check_inputs(value: Any, name: str = "input") -> Any:
    """`value`. Raise InvalidRequest unless it is a string, a list of strings, token ids, or a list of token ids.

    Pydantic's own union has an error of every item, for every branch that it does not fit.
    """
    if isinstance(value, str):
        if not value.strip():
            raise InvalidRequest(f"{name} must not be empty.", name, "empty_input")
        _valid_unicode(value, name)
        return value
    if not isinstance(value, list):
        raise InvalidRequest(f"{name} must be a string, a list of strings, or token ids.", name)
    if not value:
        raise InvalidRequest(f"{name} must not be empty.", name, "empty_input")
    kind = type(value[0])
    if kind is int:
        _check_token_ids(value, name)
        return value
    if len(value) > MAX_INPUTS:
        raise InvalidRequest(
            f"{name} holds {len(value)} items; at most {MAX_INPUTS} are taken.", name, "too_many_inputs"
        )
    for position, item in enumerate(value):
        path = f"{name}.{position}"
        if type(item) is not kind or kind not in (str, list):
            raise InvalidRequest(f"{path} must be a string, or every input a list of token ids.", path)
        if kind is str:
            if not item.strip():
                raise InvalidRequest(f"{path} must not be empty.", path, "empty_input")
            _valid_unicode(item, path)
        else:
            _check_token_ids(item, path)
    return value


def is_lone(given: Inputs) -> bool:
    """One input, given without a list around it."""
    return isinstance(given, str) or isinstance(given[0], int)


def as_list(given: Inputs) -> list[str] | list[list[int]]:
    """A lone string or a lone list of token ids becomes a list of one."""
    return cast(list[str] | list[list[int]], [given] if is_lone(given) else given)


def _valid_unicode(text: str, path: str) -> None:
    try:
        encodable(text)
    except ValueError as error:
        raise InvalidRequest(f"{path} {error}.", path) from error


def _check_token_ids(ids: list[Any], path: str) -> None:
    if not ids:
        raise InvalidRequest(f"{path} must not be empty.", path, "empty_input")
    for position, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < 2**63:
            raise InvalidRequest(
                f"{path}.{position} must be a token id (a non-negative integer).", f"{path}.{position}"
            )


class EmbeddingsBody(RequestBody):
    """`POST /v1/embeddings`, as OpenAI has it, with Cohere's `input_type`, `truncate` and output types."""

    input: Annotated[Inputs, PlainValidator(check_inputs, json_schema_input_type=Inputs)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None
    input_type: Literal["query", "document"] | None = None
    truncate: Literal["none", "end", "start"] = "end"
    output_dtype: Literal["float", "int8", "uint8", "binary", "ubinary"] = "float"


class NewMemoryBody(RequestBody):
    """One memory to add. Without an id the server makes one."""

    text: Text
    id: Id | None = None
    metadata: Metadata = Field(default_factory=dict)
    expires_at: Time | None = None
    vector: Vector | None = None


class UserMemoryBody(NewMemoryBody):
    """One memory of a named user, for a call that carries many users."""

    user_id: Id


class AddBody(NewMemoryBody):
    """`POST /v1/users/{user_id}/memories`: one memory inline, or a list under `memories`."""

    model_config = _body(oneOf=[_given("text", "string"), _given("memories", "array")])

    text: Text | None = None  # type: ignore[assignment]
    memories: list[Annotated[NewMemoryBody, Within()]] | None = Field(
        None, min_length=1, max_length=MAX_INPUTS, fail_fast=True
    )
    on_duplicate: Literal["add", "skip"] = "add"
    upsert: bool = False

    @model_validator(mode="after")
    def _one_form(self) -> "AddBody":
        fields = {"text", "id", "metadata", "expires_at", "vector"} & self.model_fields_set
        inline = [name for name in sorted(fields) if getattr(self, name) is not None]
        if self.memories is None and self.text is None:
            raise ValueError("give either text or memories")
        if self.memories is not None and inline:
            raise ValueError(f"give either memories or {inline[0]}, not both")
        return self

    def items(self) -> list[NewMemoryBody]:
        """The memories, whichever form they came in."""
        if self.memories is not None:
            return self.memories
        assert self.text is not None
        return [
            NewMemoryBody.model_construct(
                text=self.text, id=self.id, metadata=self.metadata, expires_at=self.expires_at, vector=self.vector
            )
        ]


class AddManyBody(RequestBody):
    """`POST /v1/memories`: memories of many users in one call."""

    memories: list[Annotated[UserMemoryBody, Within()]] = Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
    on_duplicate: Literal["add", "skip"] = "add"
    upsert: bool = False


class SearchBody(RequestBody):
    """`POST /v1/users/{user_id}/memories/search`: by text or by vector."""

    model_config = _body(oneOf=[_given("query", "string"), _given("vector", "array")])

    query: Text | None = None
    vector: Vector | None = None
    top_k: int = Field(10, ge=1, le=MAX_TOP_K)
    filter: Filter | None = None
    min_score: float | None = Field(None, ge=-1.0, le=1.0)
    include_vectors: bool = False

    @model_validator(mode="after")
    def _one_of_query_and_vector(self) -> "SearchBody":
        if (self.query is None) == (self.vector is None):
            raise ValueError("give exactly one of query and vector")
        return self


class UpdateBody(RequestBody):
    """`PATCH /v1/users/{user_id}/memories/{memory_id}`: what is given replaces what was there, metadata as a whole.

    `expires_at: null` keeps the memory for ever.
    """

    model_config = _body(anyOf=[{"required": [name]} for name in ("text", "metadata", "expires_at")])

    text: Text = Field(default=cast(str, None))
    metadata: Metadata = Field(default=cast(dict[str, Any], None))
    expires_at: Time | None = None
    if_version: int = Field(default=cast(int, None), ge=1)

    @model_validator(mode="after")
    def _changes_something(self) -> "UpdateBody":
        if not {"text", "metadata", "expires_at"} & self.model_fields_set:
            raise ValueError("give at least one of text, metadata and expires_at")
        return self


class DeleteBody(RequestBody):
    """`DELETE /v1/users/{user_id}/memories`: delete what matches."""

    filter: Filter


class NoQuery(_Wire):
    """The query of a route that takes none."""


class GetQuery(_Wire):
    """`GET /v1/users/{user_id}/memories/{memory_id}`"""

    include_vectors: bool = False


class ListQuery(_Wire):
    """`GET /v1/users/{user_id}/memories`"""

    limit: Limit = 100
    cursor: Cursor | None = None
    filter: FilterInQuery | None = None
    order: Order = "-created_at"


class DeleteQuery(_Wire):
    """`DELETE /v1/users/{user_id}/memories`, for clients that cannot send a body with it."""

    filter: FilterInQuery | None = None


class UsersQuery(_Wire):
    """`GET /v1/users`"""

    limit: Limit = 100
    cursor: Cursor | None = None
    prefix: Prefix = ""


class NewUserPath(_Wire):
    """The user that a handle call writes to, and that need not be there yet."""

    user_id: Id


class UserPath(_Wire):
    """The user that a handle call names."""

    user_id: HeldId


class MemoryPath(UserPath):
    """The memory that a handle call names."""

    memory_id: HeldId


def check(model: type[Body], values: Mapping[str, Any]) -> Body:
    """Validate the arguments of a handle call. Raises InvalidRequest as `parse` does."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise invalid(error) from error


def parse(model: type[Body], raw: bytes) -> Body:
    """Parse and validate a request body in one pass. Raises InvalidRequest with the path of the first wrong field."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise invalid(error) from error


def parse_query(model: type[Body], values: Mapping[str, str]) -> Body:
    """Validate the parameters of a query. Raises InvalidRequest as `parse` does."""
    try:
        return model.model_validate_strings(values)
    except ValidationError as error:
        raise invalid(error) from error


def invalid(error: ValidationError) -> InvalidRequest:
    """The first violation, with its path as `param`."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {first['ctx']['error']}.", None, "invalid_json")
    if first["type"] == "extra_forbidden":
        return _unknown(path)
    if first["type"] == "literal_error" and first["loc"][-1] == "[key]":  # `Within`
        return _unknown(path.removesuffix(".[key]"))
    if first["type"] == "missing":
        return InvalidRequest(f"{path} is required.", path, "missing_field")
    message = first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{path}: {message}." if path else f"{message}.", path or None)


def appended(entry: Appended) -> dict[str, Any]:
    """What an added memory is answered with."""
    return {"id": entry.id, "status": entry.status, "version": entry.version}


def history_event(event: HistoryEvent) -> dict[str, Any]:
    """A state of a memory; without what it said where that was erased."""
    content: dict[str, Any] = {"event": event.event, "at": event.at, "version": event.version}
    if event.text is not None:
        content |= {"text": event.text, "metadata": event.metadata}
    return content


def user_in_log(stats: UserStats) -> dict[str, Any]:
    """What the log holds of a user."""
    return {"user_id": stats.user_id, "memories": stats.memories, "version": stats.version, "bytes": stats.bytes}


def memory(found: Memory) -> dict[str, Any]:
    """A memory as it travels; optional fields only where they are set."""
    content: dict[str, Any] = {
        "id": found.id,
        "user_id": found.user_id,
        "text": found.text,
        "metadata": found.metadata,
        "created_at": found.created_at,
        "updated_at": found.updated_at,
        "version": found.version,
    }
    for name in ("expires_at", "score", "vector"):
        value = getattr(found, name)
        if value is not None:
            content[name] = value
    return content
