"""Judges a history: can one order of the operations explain what the clients of a log were answered?

`check` demands linearizability of each user: every operation takes effect at one moment between its beginning and its
end, and every answer is that of a store that did them one after the other (`_after`, the whole specification). So an
operation that began after another had ended comes after it, a read shows the state of one version and nothing else,
no write is lost, doubled or given another's version, and no user meets another's memories. A refusal (404, 409) is an
answer like any other. A write whose outcome its client does not know took effect at any time after it began, or never.

To look for such an order is hopeless in general and quick here: versions are the witness. Appends, erasures and
searches say at which version they stood; what says less (a 204, a list, a refusal) is tried where it fits
(Wing and Gong, https://doi.org/10.1006/jpdc.1993.1015, with the choices that versions leave).

Nothing here knows Ray, HTTP or time: a history is a list of `Event`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Metadata = dict[str, Any]
Vector = tuple[float, ...]
Where = tuple[str, Any]  # a metadata key and the value that it must have

SUSPECTS = 4  # events to blame that are tried
SCORE_TOLERANCE = 1e-5  # scores are sums of float32 products, rounded to six decimals


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
        return f"{_said(self.operation)} -> {_said(self.answer)} [{self.began:.4f} {end}] {self.client}".rstrip()


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


def check(history: Iterable[Event]) -> list[Violation]:
    """The first violation of each user; none where the history can be explained."""
    by_user: defaultdict[str, list[Event]] = defaultdict(list)
    owners: dict[str, str] = {}
    for event in history:
        by_user[event.user].append(event)
        owners |= dict.fromkeys(_texts(event.operation), event.user)
    found = (_of_user(sorted(by_user[user], key=lambda event: event.began), owners) for user in sorted(by_user))
    return [violation for violation in found if violation is not None]


def _of_user(events: Sequence[Event], owners: dict[str, str]) -> Violation | None:
    events = [_with_ids(number, event, events) for number, event in enumerate(events)]
    return _foreign(events, owners) or _reused(events) or _out_of_order(events) or _Linearization(events).violation()


def _texts(operation: Operation) -> Iterator[str]:
    if isinstance(operation, Append):
        yield from (new.text for new in operation.memories)
    elif isinstance(operation, Update) and operation.text is not None:
        yield operation.text


def _memories(answer: Answer | None) -> Sequence[Seen]:
    return answer.memories if isinstance(answer, Found) else [answer.memory] if isinstance(answer, One) else []


def _with_ids(number: int, event: Event, events: Sequence[Event]) -> Event:
    """The event with the ids that the store gave: from its answer, or else from whoever saw its texts."""
    operation = event.operation
    if not isinstance(operation, Append) or all(new.id is not None for new in operation.memories):
        return event
    if isinstance(event.answer, Appended):
        ids = [id for id, _, _ in event.answer.entries]
    else:
        seen = {memory.text: memory.id for other in events for memory in _memories(other.answer)}
        ids = [seen.get(new.text, f"unseen-{number}-{n}") for n, new in enumerate(operation.memories)]
    memories = tuple(replace(new, id=new.id or id) for new, id in zip(operation.memories, ids, strict=True))
    return replace(event, operation=replace(operation, memories=memories))


# What can be said without looking for an order.


def _foreign(events: Sequence[Event], owners: dict[str, str]) -> Violation | None:
    for event in events:
        for seen in _memories(event.answer):
            owner = owners.get(seen.text)
            if seen.user != event.user or owner not in (None, event.user):
                reason = f"{seen.text!r} is a memory of {owner or seen.user}"
                return Violation(event.user, "foreign memory", reason, (event,))
            if owner is None:
                return Violation(event.user, "unknown write", f"nobody wrote {seen.text!r}", (event,))
    return None


def _claims(event: Event) -> list[tuple[int, str]]:
    """(version, id) that the answer says were written. An update may have found its memory as it is at that version."""
    if isinstance(event.answer, Appended):
        return [(version, id) for id, status, version in event.answer.entries if status != "unchanged"]
    if isinstance(event.operation, Update) and isinstance(event.answer, One):
        return [(event.answer.memory.version, event.operation.id)]
    if isinstance(event.operation, Erase) and isinstance(event.answer, Removed) and event.answer.version is not None:
        return [(event.answer.version, "")]
    return []


def _reused(events: Sequence[Event]) -> Violation | None:
    claimed: dict[int, tuple[str, Event]] = {}
    for event in events:
        for version, id in _claims(event):
            other_id, other = claimed.setdefault(version, (id, event))
            alike = other_id == id and (isinstance(event.operation, Update) or isinstance(other.operation, Update))
            if other is not event and not alike:
                return Violation(event.user, "version reused", f"version {version} was given twice", (other, event))
    return None


def _stands_at(event: Event) -> tuple[int, int] | None:
    """(first, last) version at which the answer puts the event; None where it does not say."""
    if isinstance(event.operation, Search) and isinstance(event.answer, Found) and event.answer.version is not None:
        return event.answer.version, event.answer.version
    claims = [] if isinstance(event.operation, Update) else _claims(event)
    return (min(claims)[0], max(claims)[0]) if claims else None


def _at_least(event: Event) -> int:
    """The version that there was when the event took effect, at least."""
    stood = _stands_at(event)
    seen = [memory.version for memory in _memories(event.answer)]
    return max([stood[1] if stood else 0, *seen])


def _out_of_order(events: Sequence[Event]) -> Violation | None:
    """An event before one that had ended when it began."""
    by_end = sorted((event for event in events if event.answer is not None), key=lambda event: event.ended)
    floor, witness, ended = 0, None, 0
    for event in events:
        while ended < len(by_end) and by_end[ended].ended < event.began:
            if _at_least(by_end[ended]) > floor:
                floor, witness = _at_least(by_end[ended]), by_end[ended]
            ended += 1
        stood = _stands_at(event)
        if witness is None or stood is None:
            continue
        if isinstance(event.operation, Search) and stood[0] < floor:
            reason = f"stale: version {stood[0]} was read after version {floor} had been answered"
        elif not isinstance(event.operation, Search) and stood[0] <= floor:
            reason = f"version {stood[0]} was written after version {floor} had been answered"
        else:
            continue
        return Violation(event.user, "out of order", reason, (witness, event))
    return None


# The specification: what a store answers that does one operation after the other.


@dataclass(frozen=True, slots=True)
class _Held:
    text: str
    metadata: Metadata
    version: int
    vector: Vector


@dataclass(frozen=True, slots=True)
class _State:
    """A user at one version. `buried`, `erased`: until when its deletions, its erasure may have taken place.

    A write that was sent before the deletion of its memory, or the erasure of its user, may be refused: which of the
    two came first only the server's clock can tell.
    """

    version: int = 0
    held: dict[str, _Held] = field(default_factory=dict)
    buried: dict[str, float] = field(default_factory=dict)
    erased: float = -math.inf

    def matching(self, where: Where | None) -> dict[str, _Held]:
        if where is None:
            return self.held
        key, value = where
        return {id: held for id, held in self.held.items() if key in held.metadata and held.metadata[key] == value}


def _after(event: Event, state: _State) -> tuple[Answer, _State]:
    """What the operation is answered, and the state that it leaves."""
    operation = event.operation
    if isinstance(operation, Append):
        return _append(operation, state)
    if isinstance(operation, Update):
        return _update(event.user, operation, state)
    if isinstance(operation, Delete):
        if operation.id not in state.held:
            return Refused("not_found"), state
        return Removed(1), _without([operation.id], event, state)
    if isinstance(operation, DeleteWhere):
        matching = list(state.matching(operation.where))
        return Removed(len(matching)), _without(matching, event, state)
    if isinstance(operation, Erase):
        return Removed(len(state.held), state.version + 1), _State(state.version + 1, erased=event.ended)
    if isinstance(operation, Get):
        held = state.held.get(operation.id)
        return (Refused("not_found") if held is None else One(_seen(event.user, operation.id, held))), state
    found = [_seen(event.user, id, held) for id, held in state.matching(operation.where).items()]
    if isinstance(operation, List):
        return Found(tuple(sorted(found, key=lambda seen: seen.version))), state
    scored = [replace(seen, score=_cosine(operation.vector, state.held[seen.id].vector)) for seen in found]
    scored.sort(key=lambda seen: -(seen.score or 0.0))
    return Found(tuple(scored[: operation.top_k]), state.version), state


def _seen(user: str, id: str, held: _Held) -> Seen:
    return Seen(user, id, held.text, held.metadata, held.version)


def _cosine(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def _append(operation: Append, state: _State) -> tuple[Answer, _State]:
    held, version = dict(state.held), state.version
    entries = []
    for new in operation.memories:
        assert new.id is not None
        there = held.get(new.id)
        if there is not None and (there.text, there.metadata) == (new.text, new.metadata):
            entries.append((new.id, "unchanged", there.version))
            continue
        if there is not None and not operation.upsert:
            return Refused("id_conflict"), state
        version += 1
        held[new.id] = _Held(new.text, new.metadata, version, new.vector)
        entries.append((new.id, "added" if there is None else "updated", version))
    return Appended(tuple(entries), version), replace(state, version=version, held=held)


def _update(user: str, operation: Update, state: _State) -> tuple[Answer, _State]:
    before = state.held.get(operation.id)
    if before is None:
        return Refused("not_found"), state
    if operation.if_version not in (None, before.version):
        return Refused("version_mismatch"), state
    text = before.text if operation.text is None else operation.text
    vector = before.vector if operation.vector is None else operation.vector
    metadata = before.metadata if operation.metadata is None else operation.metadata
    if (text, vector, metadata) == (before.text, before.vector, before.metadata):
        return One(_seen(user, operation.id, before)), state
    after = _Held(text, metadata, state.version + 1, vector)
    changed = replace(state, version=state.version + 1, held={**state.held, operation.id: after})
    return One(_seen(user, operation.id, after)), changed


def _without(ids: Sequence[str], event: Event, state: _State) -> _State:
    held = {id: held for id, held in state.held.items() if id not in ids}
    buried = {**state.buried, **dict.fromkeys(ids, event.ended)}
    return _State(state.version + len(ids), held, buried, state.erased)


def _difference(event: Event, expected: Answer, state: _State) -> str | None:
    """What is wrong with the event's answer, where the specification has another in that state; None: nothing."""
    answer = event.answer
    if isinstance(answer, Refused) and answer.code in ("deleted", "erased"):
        ids = _written_ids(event.operation)
        late = max([state.erased, *(state.buried.get(id, -math.inf) for id in ids)])
        return None if late >= event.began else "refused for a deletion that had ended before it was sent"
    if isinstance(answer, Appended) and isinstance(expected, Appended):
        same = answer.entries == expected.entries and answer.version in (None, expected.version)
    elif isinstance(answer, Removed) and isinstance(expected, Removed):
        same = answer.count == expected.count and answer.version in (None, expected.version)
    elif isinstance(answer, Found) and isinstance(expected, Found):
        return _found_difference(event, answer, expected, state)
    else:
        same = answer == expected
    return None if same else f"expected {_said(expected)}"


def _written_ids(operation: Operation) -> list[str]:
    if isinstance(operation, Append):
        return [new.id for new in operation.memories if new.id is not None]
    return [operation.id] if isinstance(operation, Update) else []


def _found_difference(event: Event, answer: Found, expected: Found, state: _State) -> str | None:
    """As `_difference`. A graph may miss a neighbour: there the nearest are only held to be memories of this state."""
    operation = event.operation
    whole = [seen.id for seen in expected.memories]
    given = [seen.id for seen in answer.memories]
    matching = state.matching(operation.where) if isinstance(operation, List | Search) else {}
    for seen in answer.memories:
        held = matching.get(seen.id)
        if held is None:
            return f"{seen.id!r} is not there at version {state.version}"
        if _seen(event.user, seen.id, held) != replace(seen, score=None):
            return f"{seen.id!r} is {_said(_seen(event.user, seen.id, held))} at version {state.version}"
        if isinstance(operation, Search):
            score = _cosine(operation.vector, held.vector)
            if seen.score is None or abs(seen.score - score) > SCORE_TOLERANCE:
                return f"the score of {seen.id!r} is {score:.6f}, not {seen.score}"
    if len(given) != len(whole) or len(set(given)) != len(given):
        missing = sorted(set(whole) - set(given))
        return f"{len(given)} memories where there are {len(whole)} at version {state.version}; missing: {missing}"
    if isinstance(operation, List):
        return None if given == whole else "not in the order of versions"
    scores = [seen.score or 0.0 for seen in answer.memories]
    if scores != sorted(scores, reverse=True):
        return "not in the order of scores"
    if answer.index != "hnsw" and scores:
        worst = expected.memories[-1].score or 0.0
        if scores[-1] < worst - SCORE_TOLERANCE:
            return f"a nearer memory was left out: the last score is {scores[-1]}, not {worst:.6f}"
    return None


# The search for an order.


@dataclass(slots=True)
class _Frame:
    """A place in the search: what was assigned before it, and the writes that may come next with what they leave."""

    assigned: int
    first: int
    earliest: int
    choices: list[tuple[int, _State]]


class _Linearization:
    """Assigns a version to every event of one user, in the order of versions.

    At each version the reads that fit are assigned as early as real time allows, which takes nothing from the others;
    only where several writes may have made the next version is there a choice.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events
        answered = [n for n, event in enumerate(events) if event.answer is not None]
        self._by_end = sorted(answered, key=lambda n: events[n].ended)
        self._claimants: defaultdict[int, list[int]] = defaultdict(list)
        self._reads_at: defaultdict[int, list[int]] = defaultdict(list)
        self._deletions: list[int] = []
        self._unknown: list[int] = []
        for n, event in enumerate(events):
            if event.answer is None:
                if isinstance(event.operation, Write):
                    self._unknown.append(n)
            elif claims := _claims(event):
                self._claimants[min(claims)[0]].append(n)
            elif isinstance(event.operation, Search) and isinstance(event.answer, Found):
                if event.answer.version is not None:
                    self._reads_at[event.answer.version].append(n)
            elif isinstance(event.answer, Removed) and event.answer.count:
                self._deletions.append(n)
        self._assigned = [False] * len(events)
        self._trail: list[int] = []
        self._first = 0  # events before it, in the order of their beginnings, are all assigned or unknown
        self._earliest = 0  # as many of `by_end` are assigned without a gap
        self._dead_ends: dict[tuple[Event, ...], tuple[int, Violation]] = {}  # the deepest for each events to blame

    def violation(self) -> Violation | None:
        """Why there is no such order; None where there is one.

        Best a read or a refusal without which there would be one; else what the furthest way ended at.
        """
        if self._search():
            return None
        reasons = [reason for _, reason in sorted(self._dead_ends.values(), key=lambda end: end[0], reverse=True)]
        for reason in reasons[:SUSPECTS]:
            rest = [event for event in self._events if event not in reason.events]
            (suspect, *others) = reason.events or (None,)
            if suspect is not None and not others and _only_reads(suspect) and _Linearization(rest)._search():
                return reason
        return reasons[0]

    def _search(self) -> bool:
        budget = 100 * len(self._events) + 10_000
        state = _State()
        self._settle(state)
        stack = [self._frame(state)]
        while stack and not self._is_done():
            frame = stack[-1]
            self._undo(frame)
            if not frame.choices:
                stack.pop()
                continue
            budget -= 1
            if budget == 0:
                gave_up = Violation(self._events[0].user, "undecided", "too many orders to try", ())
                self._dead_ends = {(): (0, gave_up)}
                return False
            write, state = frame.choices.pop(0)
            self._assign(write)
            self._settle(state)
            stack.append(self._frame(state))
        return bool(stack)

    def _is_done(self) -> bool:
        return math.isinf(self._limit())

    def _assign(self, n: int) -> None:
        self._assigned[n] = True
        self._trail.append(n)

    def _undo(self, frame: _Frame) -> None:
        while len(self._trail) > frame.assigned:
            self._assigned[self._trail.pop()] = False
        self._first, self._earliest = frame.first, frame.earliest

    def _limit(self) -> float:
        """The end of the event that ended first of those not assigned: what began later comes after it."""
        while self._earliest < len(self._by_end) and self._assigned[self._by_end[self._earliest]]:
            self._earliest += 1
        return self._events[self._by_end[self._earliest]].ended if self._earliest < len(self._by_end) else math.inf

    def _settle(self, state: _State) -> None:
        """Assign what only reads, or changes nothing, and fits this state."""
        progress = True
        while progress:
            progress = False
            limit = self._limit()
            n = self._first
            while n < len(self._events) and self._events[n].began <= limit:
                event = self._events[n]
                if not self._assigned[n] and event.answer is not None and self._reads(event, state):
                    self._assign(n)
                    progress = True
                if n == self._first and (self._assigned[n] or event.answer is None):
                    self._first += 1
                n += 1

    def _reads(self, event: Event, state: _State) -> bool:
        """Whether the answer is that of this state, and leaves it as it is."""
        answer = event.answer
        if isinstance(answer, Found) and answer.version not in (None, state.version):
            return False
        if isinstance(answer, One) and answer.memory.version > state.version:
            return False
        expected, after = _after(event, state)
        refused = isinstance(answer, Refused)
        return (refused or after.version == state.version) and _difference(event, expected, state) is None

    def _frame(self, state: _State) -> _Frame:
        choices, reason = self._choices(state)
        if reason is not None:
            depth, _ = self._dead_ends.get(reason.events, (-1, reason))
            if len(self._trail) > depth:
                self._dead_ends[reason.events] = len(self._trail), reason
        return _Frame(len(self._trail), self._first, self._earliest, choices)

    def _choices(self, state: _State) -> tuple[list[tuple[int, _State]], Violation | None]:
        """The writes that may have made the next version, and the states that they leave; or why there is none."""
        limit, version = self._limit(), state.version
        for n in self._reads_at[version]:
            if not self._assigned[n]:
                return [], self._blame(n if self._events[n].began <= limit else self._by_end[self._earliest], state)
        claimants = [n for n in self._claimants[version + 1] if not self._assigned[n]]
        certain = [n for n in claimants if not isinstance(self._events[n].operation, Update)]
        pool = certain or [*(claimants or self._deletions), *self._unknown]
        choices: list[tuple[int, _State]] = []
        reason: Violation | None = None
        for n in pool:
            event = self._events[n]
            if self._assigned[n]:
                continue
            if event.began > limit:
                if n in claimants:
                    reason = reason or self._blame(self._by_end[self._earliest], state)
                continue
            expected, after = _after(event, state)
            difference = None if event.answer is None else _difference(event, expected, state)
            if difference is not None:
                if n in claimants:
                    reason = reason or Violation(event.user, "wrong answer", difference, (event,))
                continue
            if after.version == version:
                continue
            torn = [read for passed in range(version + 1, after.version) for read in self._reads_at[passed]]
            if torn:
                reason = Violation(event.user, "torn write", "a read saw a part of it", (event, self._events[torn[0]]))
                continue
            choices.append((n, after))
        if choices or self._earliest == len(self._by_end):
            return choices, None
        return [], reason or self._nobody_wrote(state)

    def _nobody_wrote(self, state: _State) -> Violation:
        for n in self._by_end[self._earliest :]:
            if not self._assigned[n] and _at_least(self._events[n]) > state.version:
                reason = f"nobody wrote version {state.version + 1}"
                return Violation(self._events[n].user, "unknown write", reason, (self._events[n],))
        return self._blame(self._by_end[self._earliest], state)

    def _blame(self, n: int, state: _State) -> Violation:
        """Why an event fits neither this state nor, as it would have been assigned, one before."""
        event = self._events[n]
        expected, after = _after(event, state)
        difference = _difference(event, expected, state)
        if isinstance(event.operation, Write) and not isinstance(event.answer, Refused) and after is not state:
            reason = f"it was acknowledged and did not happen, up to version {state.version}"
            return Violation(event.user, "lost write", reason, (event,))
        if difference is None:
            difference = f"it says version {_at_least(event)}"
        reason = f"at no version in its time, the last of them {state.version}: {difference}"
        return Violation(event.user, "wrong answer", reason, (event,))


def _only_reads(event: Event) -> bool:
    return isinstance(event.answer, Refused) or not isinstance(event.operation, Write)


def _said(thing: Operation | Answer | Seen | None) -> str:
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
            return _said(memory)
        case Removed(count, version):
            return f"{count} removed; version {version}"
        case Refused(code):
            return code
