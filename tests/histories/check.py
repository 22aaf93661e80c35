"""Checks a history: is there one order of the operations that explains every answer that the clients of a log got?

`check` requires that each user's history is linearizable: every operation takes effect at one moment between its
beginning and its end, and every answer is that of a store that did the operations one after the other (`perform` is the
whole specification). So an operation that began after another had ended comes after it; a read shows the state of
exactly one version; no write is lost, repeated or given the version of another; and no user sees another's memories. A
refusal (404, 409) is an answer like any other. A write whose outcome its client does not know took effect at any time
after it began, or never.

Finding such an order is intractable in general and quick here, because answers name versions. Appends, erasures and
searches say at which version they took effect. Answers that say less (a 204, a list, a refusal) are tried at each
version that fits (Wing and Gong, https://doi.org/10.1006/jpdc.1993.1015, with the choices that versions leave).

Nothing here depends on Ray, HTTP or time: a history is a list of `Event`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from tests.histories.linearization import Linearization
from tests.histories.records import Append, Appended, Event, Operation, Search, Update, Violation, memories_of
from tests.histories.versions import at_least, claimed_by, stands_at


def check(history: Iterable[Event]) -> list[Violation]:
    """The first violation of each user; empty if the history can be explained."""
    by_user: defaultdict[str, list[Event]] = defaultdict(list)
    owners: dict[str, str] = {}
    for event in history:
        by_user[event.user].append(event)
        owners |= dict.fromkeys(_texts(event.operation), event.user)
    found = (_of_user(sorted(by_user[user], key=lambda event: event.began), owners) for user in sorted(by_user))
    return [violation for violation in found if violation is not None]


def _of_user(events: Sequence[Event], owners: dict[str, str]) -> Violation | None:
    events = [_with_ids(number, event, events) for number, event in enumerate(events)]
    return _foreign(events, owners) or _reused(events) or _out_of_order(events) or Linearization(events).violation()


def _texts(operation: Operation) -> Iterator[str]:
    if isinstance(operation, Append):
        yield from (new.text for new in operation.memories)
    elif isinstance(operation, Update) and operation.text is not None:
        yield operation.text


def _with_ids(number: int, event: Event, events: Sequence[Event]) -> Event:
    """The event with the ids that the store generated: from its answer, or else from reads of its texts."""
    operation = event.operation
    if not isinstance(operation, Append) or all(new.id is not None for new in operation.memories):
        return event
    if isinstance(event.answer, Appended):
        ids = [id for id, _, _ in event.answer.entries]
    else:
        seen = {memory.text: memory.id for other in events for memory in memories_of(other.answer)}
        ids = [seen.get(new.text, f"unseen-{number}-{n}") for n, new in enumerate(operation.memories)]
    memories = tuple(replace(new, id=new.id or id) for new, id in zip(operation.memories, ids, strict=True))
    return replace(event, operation=replace(operation, memories=memories))


# Violations that can be found without searching for an order.


def _foreign(events: Sequence[Event], owners: dict[str, str]) -> Violation | None:
    for event in events:
        for seen in memories_of(event.answer):
            owner = owners.get(seen.text)
            if seen.user != event.user or owner not in (None, event.user):
                reason = f"{seen.text!r} is a memory of {owner or seen.user}"
                return Violation(event.user, "foreign memory", reason, (event,))
            if owner is None:
                return Violation(event.user, "unknown write", f"nobody wrote {seen.text!r}", (event,))
    return None


def _reused(events: Sequence[Event]) -> Violation | None:
    claimed: dict[int, tuple[str, Event]] = {}
    for event in events:
        for version, id in claimed_by(event):
            other_id, other = claimed.setdefault(version, (id, event))
            alike = other_id == id and (isinstance(event.operation, Update) or isinstance(other.operation, Update))
            if other is not event and not alike:
                return Violation(event.user, "version reused", f"version {version} was given twice", (other, event))
    return None


def _out_of_order(events: Sequence[Event]) -> Violation | None:
    """An event whose version comes before that of an event that had ended when it began."""
    by_end = sorted((event for event in events if event.answer is not None), key=lambda event: event.ended)
    floor, witness, ended = 0, None, 0
    for event in events:
        while ended < len(by_end) and by_end[ended].ended < event.began:
            if at_least(by_end[ended]) > floor:
                floor, witness = at_least(by_end[ended]), by_end[ended]
            ended += 1
        stood = stands_at(event)
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
