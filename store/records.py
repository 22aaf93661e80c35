"""The nouns of the store, each defined once. All are frozen values that can be kept, pickled and handed on.

Times are aware datetimes in UTC, with microseconds. Vectors are `(dim,) float32`, as the model made them (not
normalised). `score` is cosine similarity in [-1, 1], rounded to six decimals.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]
Filter = dict[str, Any]
Order = Literal["created_at", "-created_at", "updated_at", "-updated_at"]
DEFAULT_TENANT: Final = "default"


class Keep(Enum):
    """The type of `KEEP`: in an update, leave this field as it is (None would clear it)."""

    KEEP = "keep"


KEEP: Final = Keep.KEEP


@dataclass(frozen=True, slots=True)
class NewMemory:
    """A memory on its way into the log.

    Args:
        id: 1 to 256 characters without control characters; unique per user. The caller makes it, so that a retried
            append is idempotent.
        text: any text without NUL.
        vector: (dim,) float32, finite, not zero.
        metadata: a JSON object; integers fit 64 bits, floats are finite, strings and keys hold no NUL.
        expires_at: from this time on the memory is gone; None keeps it for ever. A new state of a memory is refused
            whose time was over when the write was issued.
        made_id: the id was made for this write alone. If the log holds it, this is the write sent again: it is answered
            as the first time, whatever became of the memory since; where an import has replaced its history, with the
            version that this begins with.
    """

    id: str
    text: str
    vector: Vector
    metadata: dict[str, Any] = field(default_factory=dict)
    expires_at: datetime | None = None
    made_id: bool = False


@dataclass(frozen=True, slots=True)
class Append:
    """One caller's memories for one user: written all, or not at all.

    Args:
        on_duplicate: `skip` answers with the memory that already holds the same text and metadata, instead of adding.
        upsert: the same id with other content replaces it; without it that is a Conflict.
        issued_at: when the caller was accepted. A write that is older than an erasure of its user or of its memory
            is refused, so that it does not bring back what was erased meanwhile.
        write_id: names the call that this is part of; all requests of a call carry the same. A call that is sent again
            under its write id is answered as the first time, and changes nothing.
    """

    tenant: str
    user_id: str
    memories: tuple[NewMemory, ...]
    on_duplicate: Literal["add", "skip"] = "add"
    upsert: bool = False
    issued_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    write_id: str | None = None


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of one memory. `id` is the older memory's where a duplicate was skipped."""

    id: str
    status: Literal["added", "unchanged", "updated"]
    version: int


@dataclass(frozen=True, slots=True)
class AppendResult:
    """`memories` in the order of the request; `version` is the user's after it."""

    memories: list[Appended]
    version: int


class _Pickled:
    """Pickled as the class and its fields: a frozen dataclass's own way takes twice as long, each way."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), tuple(map(self.__getattribute__, self.__slots__))


@dataclass(frozen=True, slots=True)
class Memory(_Pickled):
    """A memory as the log holds it. `vector: (dim,) float32` only where it was asked for."""

    id: str
    user_id: str
    text: str
    metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None
    version: int
    score: float | None = None
    vector: Vector | None = None


@dataclass(frozen=True, slots=True)
class Search(_Pickled):
    """The `top_k` nearest memories of one user, among those that match `filter` and score at least `min_score`."""

    tenant: str
    user_id: str
    vector: Vector
    top_k: int = 10
    filter: Filter | None = None
    min_score: float | None = None
    include_vectors: bool = False


@dataclass(frozen=True, slots=True)
class SearchResult(_Pickled):
    """`results` by falling score, ties by newest; `version` is the user's version that was searched."""

    results: list[Memory]
    index: Literal["exact", "hnsw"]
    version: int


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list; `next_cursor` is None on the last."""

    memories: list[Memory]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """One state of a memory. The text and metadata of a memory that was deleted are gone from its events too."""

    event: Literal["added", "updated", "deleted"]
    at: datetime
    version: int
    text: str | None = None
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class UserStats:
    """One user. `bytes`: its texts, metadata and vectors in the log; `index` is None when it is not resident here."""

    user_id: str
    memories: int
    version: int
    bytes: int
    index: Literal["exact", "hnsw"] | None
    resident: bool


@dataclass(frozen=True, slots=True)
class UsersPage:
    """One page of users, by user id; `next_cursor` is None on the last."""

    users: list[UserStats]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did: lines whose memory was there with the same content are `unchanged`."""

    imported: int
    unchanged: int


@dataclass(frozen=True, slots=True)
class IndexOptions:
    """How user indexes are built.

    Args:
        switch: up to this many memories a user's index is an exact matrix, above it HNSW.
        m, ef_construction, ef: HNSW parameters (https://arxiv.org/abs/1603.09320); ef is raised to top_k where needed.
        max_deleted_share: a graph with a larger share of dead rows is rebuilt.
        fold_step_s: the longest time that one step of background work aims to take.
    """

    switch: int = 2000
    m: int = 16
    ef_construction: int = 200
    ef: int = 128
    max_deleted_share: float = 0.2
    fold_step_s: float = 0.005
