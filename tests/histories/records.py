"""The parts of a history: operations, answers, events, and violations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Metadata = dict[str, Any]
Vector = tuple[float, ...]
Where = tuple[str, Any]  # a metadata key and the value that it must have


@dataclass(frozen=True, slots=True)
class New:
    """A memory to append. Without an id the store generates one. No two memories of a history have the same text."""

    text: str
    vector: Vector
    metadata: Metadata = field(default_factory=dict)
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Append:
    memories: tuple[New, ...]
    upsert: bool = False


@dataclass(frozen=True, slots=True)
class Update:
    """Change the fields that are not None. `text` and `vector` come together."""

    id: str
    text: str | None = None
    vector: Vector | None = None
    metadata: Metadata | None = None
    if_version: int | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    id: str


@dataclass(frozen=True, slots=True)
class DeleteWhere:
    where: Where


@dataclass(frozen=True, slots=True)
class Erase:
    """Delete everything of the user."""


@dataclass(frozen=True, slots=True)
class Get:
    id: str


@dataclass(frozen=True, slots=True)
class List:
    """All memories that match, ordered by `updated_at`, which is the order of versions."""

    where: Where | None = None


@dataclass(frozen=True, slots=True)
class Search:
    vector: Vector
    top_k: int
    where: Where | None = None


Operation = Append | Update | Delete | DeleteWhere | Erase | Get | List | Search
Write = Append | Update | Delete | DeleteWhere | Erase


@dataclass(frozen=True, slots=True)
class Seen:
    """A memory in an answer."""

    user: str
    id: str
    text: str
    metadata: Metadata
    version: int
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Appended:
    """(id, status, version) of each memory, and the user's version if the answer tells it."""

    entries: tuple[tuple[str, str, int], ...]
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The memories of a list or a search; of a search also the version and the kind of index."""

    memories: tuple[Seen, ...]
    version: int | None = None
    index: str | None = None


@dataclass(frozen=True, slots=True)
class One:
    memory: Seen


@dataclass(frozen=True, slots=True)
class Removed:
    """The number of memories that a deletion removed, and the user's version if the answer tells it."""

    count: int
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """`not_found`, or the code of a conflict."""

    code: str


Answer = Appended | Found | One | Removed | Refused


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """One operation of one client. All events of a history are timed by one clock; equal events are distinct.

    Args:
        answer: None if the client does not know the outcome. Then `ended` is infinite.
        client: names the client in explanations.
    """

    user: str
    operation: Operation
    answer: Answer | None
    began: float
    ended: float = math.inf
    client: str = ""

    def __str__(self) -> str:
        end = "..." if math.isinf(self.ended) else f"{self.ended:.4f}"
        return (
            f"{described(self.operation)} -> {described(self.answer)} [{self.began:.4f} {end}] {self.client}".rstrip()
        )


@dataclass(frozen=True, slots=True)
class Violation:
    """A sentence that says what cannot be explained, and the events that show it."""

    user: str
    rule: Literal[
        "foreign memory",
        "version reused",
        "out of order",
        "wrong answer",
        "torn write",
        "lost write",
        "unknown write",
        "undecided",
    ]
    reason: str
    events: tuple[Event, ...]

    def __str__(self) -> str:
        return "\n    ".join([f"{self.user}: {self.rule}: {self.reason}", *map(str, self.events)])


def memories_of(answer: Answer | None) -> Sequence[Seen]:
    return answer.memories if isinstance(answer, Found) else [answer.memory] if isinstance(answer, One) else []


def described(thing: Operation | Answer | Seen | None) -> str:
    """A value in a few words."""
    match thing:
        case None:
            return "unknown"
        case Append(memories, upsert):
            return f"{'upsert' if upsert else 'append'} {[new.id for new in memories]}"
        case Update(id, text, _, metadata, if_version):
            return f"update {id!r} {text!r} {metadata} if_version {if_version}"
        case Delete(id) | Get(id):
            return f"{type(thing).__name__.lower()} {id!r}"
        case DeleteWhere(where):
            return f"delete where {where}"
        case Erase():
            return "erase"
        case List(where):
            return f"list where {where}"
        case Search(_, top_k, where):
            return f"search {top_k} where {where}"
        case Seen(_, id, text, metadata, version):
            return f"{id!r} {text!r} {metadata} v{version}"
        case Appended(entries, version):
            return f"{', '.join(f'{id} {status} v{at}' for id, status, at in entries)}; version {version}"
        case Found(memories, version):
            newest = max((seen.version for seen in memories), default=0)
            return f"{len(memories)} memories, the newest v{newest}; version {version}"
        case One(memory):
            return described(memory)
        case Removed(count, version):
            return f"{count} removed; version {version}"
        case Refused(code):
            return code
