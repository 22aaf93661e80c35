"""What the routes answer, as the OpenAPI document has it. Tests hold every answer against it."""

from datetime import datetime
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # which pydantic asks for before Python 3.12


class ErrorDetailAnswer(TypedDict):
    """`param` is the path of the field that is wrong (`memories.3.text`)."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """Every 4xx and 5xx."""

    error: ErrorDetailAnswer


class EmbeddingAnswer(TypedDict):
    """A vector as numbers, or as base64 of them."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class UsageAnswer(TypedDict):
    """Tokens that the model read."""

    prompt_tokens: int
    total_tokens: int
    truncated_inputs: int


class EmbeddingsAnswer(TypedDict):
    """Of all inputs, in their order."""

    object: Literal["list"]
    model: str
    data: list[EmbeddingAnswer]
    usage: UsageAnswer


class ModelAnswer(TypedDict):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    dimensions: int
    max_tokens: int


class ModelsAnswer(TypedDict):
    """A list of one."""

    object: Literal["list"]
    data: list[ModelAnswer]


class TextTokenAnswer(TypedDict):
    """`start` and `stop` in characters; null for a token that is not in the text."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class InfoAnswer(TypedDict):
    """The model, and what a request may hold."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_type: dict[str, dict[str, int]]
    max_input_length: int
    max_client_batch_size: int
    auto_truncate: bool
    prompts: dict[str, str]
    version: str


class AddedAnswer(TypedDict):
    """What became of one memory, and its version."""

    id: str
    status: Literal["added", "unchanged", "updated"]
    version: int


class AddedMemoriesAnswer(TypedDict):
    """Of one user; `version` is the user's after it."""

    memories: list[AddedAnswer]
    version: int


class AddedForUserAnswer(AddedAnswer):
    """What became of one memory of a named user."""

    user_id: str


class AddedForUsersAnswer(TypedDict):
    """Of many users, in the order of the request."""

    memories: list[AddedForUserAnswer]


class MemoryAnswer(TypedDict):
    """One memory; `expires_at` where it has an end, `vector` where it was asked for."""

    id: str
    user_id: str
    text: str
    metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    version: int
    expires_at: NotRequired[datetime]
    vector: NotRequired[list[float]]


class FoundMemoryAnswer(MemoryAnswer):
    """`score` is the cosine similarity."""

    score: float


class FoundAnswer(TypedDict):
    """Best first. `version` is the user's that was searched."""

    results: list[FoundMemoryAnswer]
    index: Literal["exact", "hnsw"]
    version: int


class MemoriesPageAnswer(TypedDict):
    """`next_cursor` is null on the last page."""

    memories: list[MemoryAnswer]
    next_cursor: str | None


class DeletedAnswer(TypedDict):
    """How many memories."""

    deleted: int


class DeletedUserAnswer(DeletedAnswer):
    """`version` is the user's after it."""

    version: int


class HistoryEventAnswer(TypedDict):
    """A state of a memory; text and metadata where they were not erased."""

    event: Literal["added", "updated", "deleted"]
    at: datetime
    version: int
    text: NotRequired[str]
    metadata: NotRequired[dict[str, Any]]


class HistoryAnswer(TypedDict):
    """Oldest first."""

    events: list[HistoryEventAnswer]


class ListedUserAnswer(TypedDict):
    """What the log holds of a user."""

    user_id: str
    memories: int
    version: int
    bytes: int


class UsersPageAnswer(TypedDict):
    """`next_cursor` is null on the last page."""

    users: list[ListedUserAnswer]
    next_cursor: str | None


class UserAnswer(ListedUserAnswer):
    """`index`: null where it is not in memory on the replica that answered."""

    index: Literal["exact", "hnsw"] | None
    resident: bool


class ImportedAnswer(TypedDict):
    """Lines that were new, and lines whose memory was there already."""

    imported: int
    unchanged: int


class LiveAnswer(TypedDict):
    """The process runs."""

    status: Literal["live"]


class ReadyAnswer(TypedDict):
    """A text can be embedded and the log be read."""

    status: Literal["ready"]
    model: str
    device: str
    dtype: str
