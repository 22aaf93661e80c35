"""The answers of the routes, as the OpenAPI document describes them. Tests check every answer against it."""

from datetime import datetime
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # which pydantic requires before Python 3.12


class ErrorDetailAnswer(TypedDict):
    """The details of an error."""

    message: Annotated[str, Field(description="One sentence for a reader.")]
    type: Annotated[str, Field(description="The kind of the error; it follows from the status.")]
    param: Annotated[str | None, Field(description="The path of the invalid field (`memories.3.text`).")]
    code: Annotated[str | None, Field(description="A stable name of the reason, for programs.")]


class ErrorAnswer(TypedDict):
    """Every 4xx and 5xx."""

    error: ErrorDetailAnswer


class TeiErrorAnswer(TypedDict):
    """Every 4xx and 5xx of the routes of text-embeddings-inference."""

    error: Annotated[str, Field(description="One sentence for a reader.")]
    error_type: Annotated[
        Literal["Backend", "Overloaded", "Unhealthy", "Validation"],
        Field(description="The kind of the error; it follows from the status."),
    ]
    param: Annotated[str | None, Field(description="The path of the wrong field (`inputs.3`).")]
    code: Annotated[str | None, Field(description="A stable name of the reason, for programs.")]


class EmbeddingAnswer(TypedDict):
    """One vector."""

    object: Literal["embedding"]
    index: Annotated[int, Field(description="The position of its input, counted from 0.")]
    embedding: Annotated[list[float] | str, Field(description="Numbers, or base64 if the request asked for it.")]


class UsageAnswer(TypedDict):
    """The tokens that the model read, special tokens included."""

    prompt_tokens: Annotated[int, Field(description="Of all inputs.")]
    total_tokens: Annotated[int, Field(description="The same.")]
    truncated_inputs: Annotated[int, Field(description="Inputs that were cut because they were too long.")]


class EmbeddingsAnswer(TypedDict):
    """The vectors of all inputs, in their order."""

    object: Literal["list"]
    model: Annotated[str, Field(description="The model that is served.")]
    data: list[EmbeddingAnswer]
    usage: UsageAnswer


class ModelAnswer(TypedDict):
    """The model that is served."""

    id: Annotated[str, Field(description="Its name.")]
    object: Literal["model"]
    created: Annotated[int, Field(description="When the replica that answers was started, in seconds since 1970.")]
    owned_by: str
    dimensions: Annotated[int, Field(description="Dimensions of a vector.")]
    max_tokens: Annotated[int, Field(description="Tokens of the longest input that the model reads.")]


class ModelsAnswer(TypedDict):
    """A list of one model."""

    object: Literal["list"]
    data: list[ModelAnswer]


class DocumentAnswer(TypedDict):
    """A document."""

    text: str


class RerankedAnswer(TypedDict):
    """The score of one document."""

    index: Annotated[int, Field(description="Its place among the documents of the request, counted from 0.")]
    relevance_score: Annotated[
        float,
        Field(description="Higher is more relevant. The model's activation function says in which range."),
    ]
    document: NotRequired[Annotated[DocumentAnswer, Field(description="If the request asked for documents.")]]


class RerankAnswer(TypedDict):
    """The best documents, best first."""

    model: Annotated[str, Field(description="The reranker that is served.")]
    results: list[RerankedAnswer]
    usage: UsageAnswer


class RankAnswer(TypedDict):
    """The score of one text."""

    index: Annotated[int, Field(description="Its place among the texts of the request, counted from 0.")]
    score: Annotated[float, Field(description="Higher is more relevant.")]
    text: NotRequired[Annotated[str, Field(description="If the request asked for texts.")]]


class TextTokenAnswer(TypedDict):
    """One token of a text."""

    id: int
    text: str
    special: Annotated[bool, Field(description="Whether it is a special token such as `[CLS]`.")]
    start: Annotated[int | None, Field(description="Where it begins, in characters; null if it is not in the text.")]
    stop: Annotated[int | None, Field(description="Where it ends, in characters; null if it is not in the text.")]


class InfoAnswer(TypedDict):
    """The model, and the limits of a request."""

    model_id: Annotated[str, Field(description="The name of the model.")]
    model_sha: Annotated[str, Field(description="Changes if the vectors may.")]
    model_dtype: Annotated[str, Field(description="The type of its weights.")]
    model_type: Annotated[dict[str, dict[str, int]], Field(description="The dimensions of a vector.")]
    max_input_length: Annotated[int, Field(description="Tokens of the longest input that the model reads.")]
    max_client_batch_size: Annotated[int, Field(description="Inputs that one request may hold.")]
    auto_truncate: Annotated[bool, Field(description="Whether inputs that are too long are cut by default.")]
    prompts: Annotated[dict[str, str], Field(description="The prompts of the model by their names.")]
    version: Annotated[str, Field(description="Of memserve.")]


_READ = Field(description="Present if the key has the scope `read`, or if the server asks for no key.")
_TRUNCATED = Field(
    description="Present if the text is longer than the model reads: it is stored as it is, and the vector is of its "
    "beginning."
)


class AddedAnswer(TypedDict):
    """The result for one memory."""

    id: str
    status: Annotated[
        Literal["added", "unchanged", "updated"],
        Field(description="`unchanged` if the memory already existed, `updated` if anything of it was replaced."),
    ]
    version: Annotated[int, Field(description="The version of the memory.")]
    truncated: NotRequired[Annotated[Literal[True], _TRUNCATED]]


class AddedMemoriesAnswer(TypedDict):
    """The results for the memories of one user, in the order of the request."""

    memories: list[AddedAnswer]
    version: Annotated[int, Field(description="The version of the user after the write.")]


class AddedForUserAnswer(AddedAnswer):
    """The result for one memory, with its user."""

    user_id: str


class AddedForUsersAnswer(TypedDict):
    """The results for the memories of many users, in the order of the request."""

    memories: list[AddedForUserAnswer]


class MemoryAnswer(TypedDict):
    """One memory."""

    id: str
    user_id: str
    text: str
    metadata: dict[str, Any]
    created_at: Annotated[datetime, Field(description="When it was added, or the time that was given for that.")]
    updated_at: Annotated[datetime, Field(description="When it was added or last changed.")]
    version: Annotated[int, Field(description="The version of the user with which it was written.")]
    expires_at: NotRequired[Annotated[datetime, Field(description="Present if the memory expires.")]]
    happened_at: NotRequired[
        Annotated[datetime, Field(description="When what it tells happened; present if it was given.")]
    ]
    thread: NotRequired[
        Annotated[str, Field(description="The conversation that it is a part of; present if it was given.")]
    ]
    vector: NotRequired[Annotated[list[float], Field(description="Present if the request asked for it.")]]


class UpdatedMemoryAnswer(TypedDict):
    """One memory that was updated. A key without the scope `read` gets no content."""

    id: str
    user_id: str
    text: NotRequired[Annotated[str, _READ]]
    metadata: NotRequired[Annotated[dict[str, Any], _READ]]
    created_at: Annotated[datetime, Field(description="When it was added, or the time that was given for that.")]
    updated_at: Annotated[datetime, Field(description="When it was added or last changed.")]
    version: Annotated[int, Field(description="The version of the user with which it was written.")]
    expires_at: NotRequired[Annotated[datetime, Field(description="Present if the memory expires. Needs `read`.")]]
    happened_at: NotRequired[
        Annotated[datetime, Field(description="When what it tells happened; present if it was given. Needs `read`.")]
    ]
    thread: NotRequired[
        Annotated[str, Field(description="The conversation that it is a part of, if one was given. Needs `read`.")]
    ]
    truncated: NotRequired[Annotated[Literal[True], _TRUNCATED]]


class ScoresAnswer(TypedDict):
    """The parts of a score."""

    vector: NotRequired[Annotated[float, Field(description="The cosine similarity, -1 to 1. Not in mode `words`.")]]
    words: NotRequired[
        Annotated[
            float,
            Field(
                description="BM25, scaled so that the best memory has 1; 0 without a word of the query. Not in mode "
                "`vector`."
            ),
        ]
    ]
    context: NotRequired[
        Annotated[float, Field(description="What a neighbour in the thread has added, if `context` was asked for.")]
    ]
    recency: NotRequired[
        Annotated[float, Field(description="The factor of the age, if `recency_half_life_s` was given.")]
    ]
    rerank: NotRequired[Annotated[float, Field(description="The reranker's, if the request asked for `rerank`.")]]


class FoundMemoryAnswer(MemoryAnswer):
    """One memory that was found."""

    score: NotRequired[
        Annotated[
            float,
            Field(
                description="How well it fits. In mode `hybrid` and `words` from 0 to 1; in mode `vector` the cosine "
                "similarity, -1 to 1; with `rerank` in the range of the reranker. Absent if it is context."
            ),
        ]
    ]
    scores: NotRequired[Annotated[ScoresAnswer, Field(description="Present if the request asked for `explain`.")]]
    context: NotRequired[
        Annotated[Literal[True], Field(description="Present if it is not a result but the context of one.")]
    ]
    context_of: NotRequired[Annotated[str, Field(description="The id of the result that it is the context of.")]]
    offset: NotRequired[
        Annotated[int, Field(description="Its place in the thread, counted from that result: -1 is just before it.")]
    ]


class FoundAnswer(TypedDict):
    """The memories that were found."""

    results: Annotated[
        list[FoundMemoryAnswer],
        Field(
            description="In the `order` that was asked for: by default best first, of equal scores the newest first. "
            "Context stands around its result, and does not count for `top_k`."
        ),
    ]
    index: Annotated[Literal["exact", "hnsw"], Field(description="The kind of index that was searched.")]
    version: Annotated[int, Field(description="The version of the user that was searched.")]
    tokens: NotRequired[Annotated[int, Field(description="Of all texts, if `max_tokens` was given.")]]
    truncated: NotRequired[
        Annotated[Literal[True], Field(description="Present if the query is longer than the model reads, and was cut.")]
    ]


class MemoriesPageAnswer(TypedDict):
    """A page of memories."""

    memories: list[MemoryAnswer]
    next_cursor: Annotated[str | None, Field(description="The `cursor` of the next page; null on the last one.")]


class GotMemoriesAnswer(TypedDict):
    """The memories with the given ids."""

    memories: Annotated[list[MemoryAnswer], Field(description="In the order of the ids, each once.")]
    missing: Annotated[list[str], Field(description="The ids that are of no memory of the user.")]


class DuplicateAnswer(MemoryAnswer):
    """One memory of a group."""

    score: NotRequired[
        Annotated[float, Field(description="The cosine similarity to the first memory, which has no score.")]
    ]


class GroupAnswer(TypedDict):
    """Memories that are nearly the same."""

    memories: Annotated[
        list[DuplicateAnswer], Field(description="The oldest first, then the newer ones by their similarity to it.")
    ]


class DuplicatesAnswer(TypedDict):
    """A page of groups."""

    groups: Annotated[list[GroupAnswer], Field(description="By the age of their first memory, the oldest first.")]
    next_cursor: Annotated[str | None, Field(description="The `cursor` of the next page; null on the last one.")]


class DeletedAnswer(TypedDict):
    """The number of deleted memories."""

    deleted: Annotated[int, Field(description="How many memories.")]
    missing: NotRequired[Annotated[list[str], Field(description="Of the given ids, those of no memory of the user.")]]


class DeletedUserAnswer(TypedDict):
    """The number of deleted memories of a user."""

    deleted: Annotated[int, Field(description="How many memories.")]
    version: Annotated[int, Field(description="The version of the user after the deletion.")]


class HistoryEventAnswer(TypedDict):
    """One state of a memory."""

    event: Literal["added", "updated", "deleted"]
    at: datetime
    version: Annotated[int, Field(description="The version of the memory with this event.")]
    text: NotRequired[Annotated[str, Field(description="Absent if it was erased.")]]
    metadata: NotRequired[Annotated[dict[str, Any], Field(description="Absent if they were erased.")]]


class HistoryAnswer(TypedDict):
    """A page of the states of a memory."""

    events: Annotated[list[HistoryEventAnswer], Field(description="Oldest first.")]
    next_cursor: Annotated[str | None, Field(description="The `cursor` of the next page; null on the last one.")]


class ListedUserAnswer(TypedDict):
    """A user, and the size of their memories in the log."""

    user_id: str
    memories: Annotated[int, Field(description="How many there are.")]
    version: Annotated[int, Field(description="Advances with every write.")]
    bytes: Annotated[int, Field(description="Bytes of texts, metadata and vectors in the log.")]


class UsersPageAnswer(TypedDict):
    """A page of users, by user id."""

    users: list[ListedUserAnswer]
    next_cursor: Annotated[str | None, Field(description="The `cursor` of the next page; null on the last one.")]


class AuditEventAnswer(TypedDict):
    """An event of the audit."""

    at: Annotated[datetime, Field(description="Of refused requests, the beginning of the minute.")]
    action: Literal[
        "memories.added",
        "memories.updated",
        "memories.deleted",
        "memories.imported",
        "user.deleted",
        "key.created",
        "key.revoked",
        "request.refused",
    ]
    key_id: Annotated[str | None, Field(description="The id of the key that asked for it; null if no key did.")]
    user_id: Annotated[
        str | None, Field(description="The user that was written; null if there is none or it was deleted since.")
    ]
    ids: Annotated[
        list[str], Field(description="Of memories or of a key; empty if the user was deleted since. At most 100.")
    ]
    count: Annotated[int, Field(description="How many memories, keys or requests it is about.")]
    status: NotRequired[Annotated[int, Field(description="Of refused requests, as they were answered.")]]
    code: NotRequired[Annotated[str | None, Field(description="Of refused requests, as they were answered.")]]


class EventsPageAnswer(TypedDict):
    """A page of the audit."""

    events: Annotated[list[AuditEventAnswer], Field(description="Oldest first.")]
    next_cursor: Annotated[
        str | None,
        Field(description="The `after` of the next page, and of what is recorded later; null if nothing was yet."),
    ]
    has_more: Annotated[bool, Field(description="Whether there are more events already.")]


class UserAnswer(ListedUserAnswer):
    """A user, the size of their memories in the log, and their index."""

    index: Annotated[
        Literal["exact", "hnsw"] | None,
        Field(description="The kind of the user's index; null if the replica that answers does not have it in memory."),
    ]
    resident: Annotated[bool, Field(description="Whether the replica that answers has the index in memory.")]


class ImportedAnswer(TypedDict):
    """The number of imported lines."""

    imported: Annotated[int, Field(description="Memories that were new or got another vector.")]
    unchanged: Annotated[int, Field(description="Memories that already existed.")]
    truncated: NotRequired[
        Annotated[
            int, Field(description="Texts that are longer than the model reads and were cut; absent if none was.")
        ]
    ]


class _IdentityAnswer(TypedDict):
    tenant: str
    user_id: Annotated[str | None, Field(description="The only user that the key reaches; null for all of the tenant.")]
    scopes: list[Literal["read", "write", "admin"]]
    label: str | None
    expires_at: Annotated[datetime | None, Field(description="From this time on the key is refused; null for never.")]


class KeyAnswer(_IdentityAnswer):
    """A key, without the key itself."""

    id: Annotated[str, Field(description="The public part of the key.")]
    created_at: datetime
    used_at: Annotated[
        datetime | None, Field(description="The last minute in which the key was used, or null; up to a minute late.")
    ]
    revoked_at: datetime | None
    requests_per_minute: Annotated[int | None, Field(description="null: as the settings say.")]
    tokens_per_minute: Annotated[int | None, Field(description="null: as the settings say.")]


class NewKeyAnswer(KeyAnswer):
    """A new key."""

    key: Annotated[str, Field(description="The key itself. It is shown here alone.")]


class KeysPageAnswer(TypedDict):
    """A page of keys, the newest first."""

    keys: list[KeyAnswer]
    next_cursor: Annotated[str | None, Field(description="The `cursor` of the next page; null on the last one.")]


class OwnKeyAnswer(_IdentityAnswer):
    """The key of this request."""

    id: Annotated[str | None, Field(description="The public part of the key; null if the server asks for no key.")]


class LiveAnswer(TypedDict):
    """The process is running."""

    status: Literal["live"]


class ReadyAnswer(TypedDict):
    """A text can be embedded and the log can be read."""

    status: Literal["ready"]
    model: str
    device: str
    dtype: Annotated[str, Field(description="The type of the model's weights.")]
