"""The value types of the store: requests and results. All are frozen, and can be pickled and shared between threads.

Times are aware datetimes in UTC, with microseconds. Vectors are `(dim,) float32`, as the model made them (not
normalised). Scores are rounded to six decimals.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]
Filter = dict[str, Any]
Order = Literal["created_at", "-created_at", "updated_at", "-updated_at"]
Mode = Literal["hybrid", "vector", "words"]
ResultOrder = Literal["score", "created_at", "-created_at", "happened_at", "-happened_at"]
DEFAULT_TENANT: Final = "default"
Scope = Literal["read", "write", "admin"]
SCOPES: Final[tuple[Scope, ...]] = ("read", "write", "admin")


class Unset(Enum):
    """The type of `UNSET`, which in an update means: leave this field as it is. None would clear it."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


class _Pickled:
    """Pickles as the class and its fields. The default of frozen dataclasses takes twice as long in both directions.

    The last fields are left out while they have their defaults. So a process of an older version, whose class lacks the
    newest fields, can read a value that does not use them. New fields must be added at the end, with defaults.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        values = tuple(map(self.__getattribute__, self.__slots__))
        pickled: Any = type(self)
        defaults = _defaults(pickled)
        used = len(values)
        while used and values[used - 1] is defaults[used - 1]:
            used -= 1
        return pickled, values[:used]


@cache
def _defaults(pickled: Any) -> tuple[Any, ...]:
    """The default of each field; MISSING if it has none."""
    return tuple(one.default for one in fields(pickled))


@dataclass(frozen=True, slots=True)
class NewMemory(_Pickled):
    """A memory that is to be written to the log.

    Args:
        id: 1 to 256 characters without control characters, unique per user. The caller chooses it, so that a repeated
            append is idempotent.
        text: any text without NUL.
        vector: (dim,) float32, finite, not zero.
        metadata: a JSON object. Integers must fit 64 bits, floats must be finite, strings and keys must not hold NUL.
        expires_at: the memory is gone from this time on; None means that it never expires. A state is refused if it had
            expired before the write was issued.
        generated_id: the id was generated for this write alone. If the log holds it already, the write is a repetition
            and gets its first answer again, whatever became of the memory since. If an import has replaced the history
            of the memory, the answer holds the version at which the new history begins.
        given_vector: the vector came with the text and was not made from it. It replaces another vector of the same
            content; a vector that was made from the text does not.
        created_at: when the memory was made, up to a minute in the future; None means now. It replaces the time of a
            memory with the same id.
        happened_at: when what the memory tells happened, in the past or in the future. None means `created_at`, or
            the time that a memory with the same id has.
        thread: the conversation that the memory is a part of, in the order of `created_at`, and of one time in the
            order in which its memories were added: 1 to 256 characters without control characters. None means none,
            or the thread that a memory with the same id has.
    """

    id: str
    text: str
    vector: Vector
    metadata: dict[str, Any] = field(default_factory=dict)
    expires_at: datetime | None = None
    generated_id: bool = False
    given_vector: bool = False
    created_at: datetime | None = None
    happened_at: datetime | None = None
    thread: str | None = None


@dataclass(frozen=True, slots=True)
class Append(_Pickled):
    """One caller's memories for one user. Either all of them are written or none.

    Args:
        on_duplicate: with `skip`, a memory whose text and metadata the user already has is not added; the answer names
            the memory that has them. If that one would expire earlier, or has another vector than the given one, it
            gets the later expiry and the given vector, and the status is `updated`. A memory of another thread than the
            given one, or that tells of another time, is no duplicate.
        duplicate_score: with `skip`, a memory is not added either if the cosine similarity of its vector and that of a
            memory of the user is at least this much, in (0, 1]; the answer names the nearest such memory, which stays
            as it is. One that would expire earlier is no duplicate.
        upsert: new content under an existing id replaces the old content. Without it that is a Conflict.
        issued_at: when the server accepted the call. A write that was issued before its user or its memory was erased
            is refused, so that it cannot restore what was erased.
        by: the id of the key that asks for it, for the audit; with None nothing is recorded.
        write_id: names the call that this request belongs to; all requests of a call have the same. A call that is
            repeated under its write id changes nothing and gets its first answer again.
    """

    tenant: str
    user_id: str
    memories: tuple[NewMemory, ...]
    on_duplicate: Literal["add", "skip"] = "add"
    upsert: bool = False
    issued_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    write_id: str | None = None
    by: str | None = None
    duplicate_score: float | None = None


@dataclass(frozen=True, slots=True)
class Appended:
    """The outcome for one memory. If a duplicate was skipped, `id` is that of the older memory."""

    id: str
    status: Literal["added", "unchanged", "updated"]
    version: int


@dataclass(frozen=True, slots=True)
class AppendResult:
    """`memories` in the order of the request. `version` is the user's version after the write."""

    memories: list[Appended]
    version: int


@dataclass(frozen=True, slots=True)
class Memory(_Pickled):
    """A memory as the log holds it.

    Attributes:
        score: in the result of a search, how well the memory fits; see `Search.mode`.
        vector: (dim,) float32, if it was requested.
        scores: the parts of the score by their names, if they were requested.
        happened_at, thread: see `NewMemory`; None if they were not given.
    """

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
    scores: dict[str, float] | None = None
    happened_at: datetime | None = None
    thread: str | None = None


@dataclass(frozen=True, slots=True)
class Search(_Pickled):
    """A search for the `top_k` memories of one user that fit best, match `filter` and score at least `min_score`.

    Args:
        vector: (dim,) float32, the vector of the query. None only with mode `words`.
        query: the text of the query. None only with mode `vector`.
        mode: what the score is. `vector`: cosine similarity, in [-1, 1]. `words`: BM25, scaled so that the best memory
            has 1. `hybrid`: both together, in [0, 1].
        explain: whether each result has the parts of its score.
        since, until: only memories whose `created_at` is `since` or later, and before `until`.
        recency_half_life_s: scores are multiplied by 2^(-age / half-life), but by no less than 0.75. The age is that
            of what the memory tells.
        context: up to so many memories before and after each result in its thread are returned with it, if they match
            the filter and the times as well; and a memory next to a good one scores higher. With 0 that is so, and none
            is returned. With None, threads do not count.
    """

    tenant: str
    user_id: str
    vector: Vector | None
    top_k: int = 10
    filter: Filter | None = None
    min_score: float | None = None
    include_vectors: bool = False
    query: str | None = None
    mode: Mode = "vector"
    explain: bool = False
    since: datetime | None = None
    until: datetime | None = None
    recency_half_life_s: float | None = None
    context: int | None = None


class Near(NamedTuple):
    """A memory around another one in its thread; `offset` is its place counted from that one: -1 is the one before."""

    offset: int
    memory: Memory


@dataclass(frozen=True, slots=True)
class SearchResult(_Pickled):
    """`results` by descending score, the newest first among equals. `version` is the version that was searched.

    `context`, if it was asked for, has the memories around each result in its thread, in their order. A memory may be
    around several results, and be a result itself. They have no score.
    """

    results: list[Memory]
    index: Literal["exact", "hnsw"]
    version: int
    context: tuple[tuple[Near, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list. `next_cursor` is None on the last page."""

    memories: list[Memory]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class DuplicatesPage:
    """Some groups of near duplicates. `next_cursor` is None if no memory is left to look at.

    In each, the oldest memory comes first, without a score; the others have their similarity to it, the nearest first.
    """

    groups: list[list[Memory]]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """One state of a memory. Deleting a memory removes the text and metadata of all its states."""

    event: Literal["added", "updated", "deleted"]
    at: datetime
    version: int
    text: str | None = None
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """One page of the states of a memory, oldest first. `next_cursor` is None on the last page."""

    events: list[HistoryEvent]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class UserStats:
    """One user. `bytes` counts texts, metadata and vectors in the log. `index` is None if the index is not resident."""

    user_id: str
    memories: int
    version: int
    bytes: int
    index: Literal["exact", "hnsw"] | None
    resident: bool


@dataclass(frozen=True, slots=True)
class UsersPage:
    """One page of users, ordered by user id. `next_cursor` is None on the last page."""

    users: list[UserStats]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Imported:
    """The outcome of an import, or of one page of it.

    Attributes:
        unchanged: the number of lines whose memory already existed with the same content.
        epoch: of the user; the later pages of the import are to name it. An erasure changes it.
    """

    imported: int
    unchanged: int
    epoch: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret.

    Attributes:
        id: the public part of the key, which names it in lists and logs.
        user_id: the only user that the key reaches; None if it reaches all users of its tenant.
        scopes: in the order of SCOPES. A key that is bound to a user does not have `admin`.
        used_at: the beginning of the last minute in which the key was used.
        requests_per_minute, tokens_per_minute: the limits of the key; None if it has the limits of the settings.
    """

    id: str
    tenant: str
    user_id: str | None
    scopes: tuple[Scope, ...]
    label: str | None
    created_at: datetime
    expires_at: datetime | None = None
    used_at: datetime | None = None
    revoked_at: datetime | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was made, and its secret, which is kept nowhere."""

    key: Key
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Credential:
    """The public id of a key that a caller has sent, and the SHA-256 of the key."""

    id: str
    digest: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeysPage:
    """One page of keys, the newest first. `next_cursor` is None on the last page."""

    keys: list[Key]
    next_cursor: str | None


Action = Literal[
    "memories.added",
    "memories.updated",
    "memories.deleted",
    "memories.imported",
    "user.deleted",
    "key.created",
    "key.revoked",
    "request.refused",
]


@dataclass(frozen=True, slots=True)
class Event:
    """An event of the audit.

    Attributes:
        at: when it was recorded; of refused requests, the beginning of the minute.
        key_id: the id of the key that asked for it; None if no key did.
        user_id: the user whose memories were written; None if there is none, or if it was erased since.
        ids: of memories or of a key; empty if the user was erased since. A memory that was deleted is still named.
        count: how many memories, keys or requests it is about.
        status, code: of refused requests, as they were answered.
    """

    at: datetime
    action: Action
    key_id: str | None
    user_id: str | None
    ids: tuple[str, ...]
    count: int
    status: int | None = None
    code: str | None = None


@dataclass(frozen=True, slots=True)
class EventsPage:
    """One page of events, the oldest first.

    Attributes:
        next_cursor: the position after the last event of the page, for the events that follow or are recorded later.
            None if nothing was recorded yet.
        has_more: whether there are more events already.
    """

    events: list[Event]
    next_cursor: str | None
    has_more: bool


@dataclass(frozen=True, slots=True)
class Refusals:
    """Equal refusals in one minute.

    Attributes:
        at: some time in that minute.
        tenant: of the key that was sent; None if the key is not known.
        key_id: the id of the key that was sent, which may be anybody's invention if `tenant` is None; None if none was.
    """

    at: datetime
    tenant: str | None
    key_id: str | None
    status: int
    code: str | None
    count: int


@dataclass(frozen=True, slots=True)
class Quotas:
    """The most that each tenant may hold; None for no limit.

    Args:
        bytes: of texts, metadata and vectors of memories, as `UserStats.bytes` counts them.
        keys: that can be used. It bounds what admins make by their keys.
    """

    memories: int | None = None
    bytes: int | None = None
    keys: int | None = None

    def any(self) -> bool:
        """Whether there is a limit for memories."""
        return self.memories is not None or self.bytes is not None


@dataclass(frozen=True, slots=True)
class IndexOptions:
    """How the indexes of users are built.

    Args:
        switch: up to this many memories a user's index is an exact matrix, above it an HNSW graph.
        m, ef_construction, ef: HNSW parameters (https://arxiv.org/abs/1603.09320). ef is raised to top_k if necessary.
        max_deleted_share: a graph is rebuilt when a larger share of its rows is deleted.
        step_s: the time that one step of background work should take at most.
        k1, b: parameters of BM25; see store/index/words.py.
    """

    switch: int = 5000
    m: int = 16
    ef_construction: int = 200
    ef: int = 128
    max_deleted_share: float = 0.2
    step_s: float = 0.005
    k1: float = 0.7
    b: float = 0.2
