"""The bodies and queries of the routes of memories and users."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from deployments.errors import InvalidRequest
from deployments.requests.bodies.embeddings import MAX_INPUTS
from deployments.requests.bodies.wire import Nested, RequestBody, Wire, body_config, required
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
    StoredId,
    Text,
    Thread,
    Time,
    Vector,
)
from store import Mode, Order, ResultOrder

MAX_TOP_K = 1_000
MAX_CONTEXT = 20
MAX_BUDGET = 1_000_000
MAX_GROUPS = 100
MAX_IDS = 1_000
MemoryIds = Annotated[list[StoredId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]


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


class AddOptions(RequestBody):
    """What becomes of memories that a user already has."""

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
    def _check_score(self) -> Self:
        if self.duplicate_score is not None and self.on_duplicate != "skip":
            raise InvalidRequest('needs "on_duplicate": "skip"', "duplicate_score")
        return self


class AddBody(NewMemoryBody, AddOptions):
    """`POST /v1/users/{user_id}/memories`: one memory inline, or a list under `memories`."""

    model_config = body_config(oneOf=[required("text", "string"), required("memories", "array")])

    text: Text | None = None  # type: ignore[assignment]
    """Must not be blank. For a single memory."""
    metadata: Metadata | None = None  # type: ignore[assignment]
    """Any JSON object, up to 32 levels deep, with integers of at most 64 bits. Default: empty."""
    memories: list[Annotated[NewMemoryBody, Nested()]] | None = Field(
        None, min_length=1, max_length=MAX_INPUTS, fail_fast=True
    )
    """Several memories, which are all written or none."""

    @model_validator(mode="after")
    def _check_one_form(self) -> "AddBody":
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


class AddManyBody(AddOptions):
    """`POST /v1/memories`: memories of many users in one call."""

    memories: list[Annotated[UserMemoryBody, Nested()]] = Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
    """All of them are written or none."""


class SearchBody(RequestBody):
    """`POST /v1/users/{user_id}/memories/search`: by text or by vector."""

    model_config = body_config(oneOf=[required("query", "string"), required("vector", "array")])

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


_REMOVABLE = ("expires_at", "happened_at", "thread")


class UpdateBody(RequestBody):
    """`PATCH /v1/users/{user_id}/memories/{memory_id}`: the fields that are given replace those of the memory.

    With `expires_at: null` the memory no longer expires, and null removes its `happened_at` and its `thread`. A null in
    another field changes nothing.
    """

    model_config = body_config(
        anyOf=[
            required("text", "string"),
            required("vector", "array"),
            required("metadata", "object"),
            required("metadata_merge", "object"),
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

    model_config = body_config(oneOf=[required("filter", "object"), required("ids", "array")])

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


class GetQuery(Wire):
    """`GET /v1/users/{user_id}/memories/{memory_id}`"""

    include_vectors: bool = False
    """Whether the memory is answered with its vector."""


class ListQuery(Wire):
    """`GET /v1/users/{user_id}/memories`"""

    limit: Limit = 100
    """How many memories a page has at most."""
    cursor: Cursor | None = None
    """The `next_cursor` of the page before. Default: the first page."""
    filter: FilterInQuery | None = None
    """Only memories that match this filter."""
    order: Order = "-created_at"
    """The time by which memories are sorted; with `-` the newest come first."""


class HistoryQuery(Wire):
    """`GET /v1/users/{user_id}/memories/{memory_id}/history`"""

    limit: Limit = 100
    """How many states a page has at most."""
    cursor: Cursor | None = None
    """The `next_cursor` of the page before. Default: the first page."""


class DeleteQuery(Wire):
    """`DELETE /v1/users/{user_id}/memories`, for clients that cannot send a body with DELETE."""

    filter: FilterInQuery | None = None
    """The memories to delete, by a filter."""


class UsersQuery(Wire):
    """`GET /v1/users`"""

    limit: Limit = 100
    """How many users a page has at most."""
    cursor: Cursor | None = None
    """The `next_cursor` of the page before. Default: the first page."""
    prefix: Prefix = ""
    """Only users whose id begins like this."""
