"""What the calls answer: the fields of the HTTP API as attributes.

A field that is not declared here, because a newer server answers with it, is an attribute too. `None` stands for a
field that the answer leaves out. Times are aware datetimes in UTC.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

if TYPE_CHECKING:
    from memserve.agentmem import Builder


def _as_vector(value: Any) -> Any:
    return value if value is None else np.asarray(value, dtype=np.float32)


Vector = Annotated[np.ndarray, BeforeValidator(_as_vector)]


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", arbitrary_types_allowed=True, protected_namespaces=())


class Memory(_Result):
    """One memory. It prints its text.

    Attributes:
        version: the version of the user with which it was written.
        expires_at: when it is forgotten; None for never.
        score: of a search; the higher, the better.
        scores: of a search that explains its scores: the parts of the score by their names.
        vector: (dim,) float32, if the request asked for it.
        happened_at: when what it tells happened.
        thread: the conversation that it is a part of.
        context: of a search with context: the memory is a neighbour of one that was found.
        context_of, offset: the id of that one, and the place in the thread counted from it: -1 is just before it.
        truncated: of an update: the text is longer than the model reads, and the vector is of its beginning.
    """

    id: str
    user_id: str
    text: str
    metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    version: int
    expires_at: datetime | None = None
    score: float | None = None
    scores: dict[str, float | None] | None = None
    vector: Vector | None = None
    happened_at: datetime | None = None
    thread: str | None = None
    context: bool = False
    context_of: str | None = None
    offset: int | None = None
    truncated: bool = False

    def __str__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Memory):
            return NotImplemented
        mine, theirs = dict(self), dict(other)
        return np.array_equal(mine.pop("vector"), theirs.pop("vector")) and mine == theirs

    def __hash__(self) -> int:
        return hash((self.user_id, self.id, self.version))

    @staticmethod
    def builder() -> Builder:
        """A builder of a store with the interface of AgentMem: see memserve/agentmem.py."""
        from memserve.agentmem import Builder

        return Builder()


class Added(_Result):
    """The result of adding one memory.

    Attributes:
        status: `unchanged` if the memory already existed, `updated` if anything of it was replaced.
        user_id: of `add_many`.
        truncated: the text is longer than the model reads: it is stored as it is, and the vector is of its beginning.
    """

    id: str
    status: Literal["added", "unchanged", "updated"]
    version: int
    user_id: str | None = None
    truncated: bool = False


class Got(_Result):
    """Memories by their ids, in the order of the ids, each once; and the ids of no memory."""

    memories: list[Memory]
    missing: list[str]


class Deleted(_Result):
    """The number of deleted memories, and the ids of no memory."""

    deleted: int
    missing: list[str]


class DeletedUser(_Result):
    """The number of deleted memories of a user, and the user's version after it."""

    deleted: int
    version: int


class Event(_Result):
    """One state of a memory. `text` and `metadata` are None if they were erased."""

    event: Literal["added", "updated", "deleted"]
    at: datetime
    version: int
    text: str | None = None
    metadata: dict[str, Any] | None = None


class User(_Result):
    """A user.

    Attributes:
        bytes: of texts, metadata and vectors in the log.
        index: the kind of the user's index; None in a list, or if it is not in memory.
        resident: whether the index is in memory; None in a list.
    """

    user_id: str
    memories: int
    version: int
    bytes: int
    index: Literal["exact", "hnsw"] | None = None
    resident: bool | None = None


class Imported(_Result):
    """The number of imported lines.

    Attributes:
        unchanged: lines whose memory already existed.
        truncated: texts that are longer than the model reads.
    """

    imported: int
    unchanged: int
    truncated: int = 0


class Ranked(_Result):
    """One document of `rerank`: its position in the request, and how relevant it is to the query."""

    index: int
    relevance_score: float
    document: Any = None

    def __str__(self) -> str:
        return f"{self.index}: {self.relevance_score:.4f}"


class Key(_Result):
    """A key of a server that asks for keys, without the key itself.

    Attributes:
        id: the public part of the key.
        user_id: the only user that it reaches; None if it reaches all users of the tenant.
        used_at: the last minute in which it was used.
    """

    id: str
    tenant: str
    user_id: str | None
    scopes: list[str]
    label: str | None
    created_at: datetime
    expires_at: datetime | None = None
    used_at: datetime | None = None
    revoked_at: datetime | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class NewKey(Key):
    """A key that was made. `key` is the key itself, which nothing shows again."""

    key: str = Field(repr=False)


class Ready(_Result):
    """The model of a server that is ready."""

    model: str
    device: str
    dtype: str
