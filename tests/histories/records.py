"""What a history is made of: operations, the answers to them, events, and what is wrong with them."""

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
    """A memory to append; without an id the store gives one. No two memories of a history say the same text."""

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
    """Change what is not None. `text` and `vector` come together."""

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
    """All that match, by `updated_at`: in the order of versions."""

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
    """(id, status, version) of each memory, and the user's version where the answer says it."""

    entries: tuple[tuple[str, str, int], ...]
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """Memories of a list or of a search; the version and the kind of index of a search."""

    memories: tuple[Seen, ...]
    version: int | None = None
    index: str | None = None


@dataclass(frozen=True, slots=True)
class One:
    memory: Seen


@dataclass(frozen=True, slots=True)
class Removed:
    """How many memories a deletion removed; the user's version where the answer says it."""

    count: int
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """`not_found`, or the code of a conflict."""

    code: str


Answer = Appended | Found | One | Removed | Refused


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """One operation of one client, on one clock. Two that say the same are two.

    Args:
        answer: None where the client does not know what became of it; then `ended` is infinite.
        client: who it was, for the explanation.
    """

    user: str
    operation: Operation
    answer: Answer | None
    began: float
    ended: float = math.inf
    client: str = ""

    def __str__(self) -> str:
        end = "..." if math.isinf(self.ended) else f"{self.ended:.4f}"
        return f"{said(self.operation)} -> {said(self.answer)} [{self.began:.4f} {end}] {self.client}".rstrip()


@dataclass(frozen=True, slots=True)
class Violation:
    """What cannot be explained, in one sentence, and the events that show it."""

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


def said(thing: Operation | Answer | Seen | None) -> str:
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
            return said(memory)
        case Removed(count, version):
            return f"{count} removed; version {version}"
        case Refused(code):
            return code
