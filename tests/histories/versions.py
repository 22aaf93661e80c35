"""The versions at which an operation took effect, as far as they follow from its answer."""

from __future__ import annotations

from tests.histories.records import Appended, Erase, Event, Found, One, Removed, Search, Update, memories_of


def claimed_by(event: Event) -> list[tuple[int, str]]:
    """(version, id) that were written, by the answer. An update that changed nothing names an older version."""
    if isinstance(event.answer, Appended):
        return [(version, id) for id, status, version in event.answer.entries if status != "unchanged"]
    if isinstance(event.operation, Update) and isinstance(event.answer, One):
        return [(event.answer.memory.version, event.operation.id)]
    if isinstance(event.operation, Erase) and isinstance(event.answer, Removed) and event.answer.version is not None:
        return [(event.answer.version, "")]
    return []


def stands_at(event: Event) -> tuple[int, int] | None:
    """(first, last) version of the event; None if the answer does not tell."""
    if isinstance(event.operation, Search) and isinstance(event.answer, Found) and event.answer.version is not None:
        return event.answer.version, event.answer.version
    claims = [] if isinstance(event.operation, Update) else claimed_by(event)
    return (min(claims)[0], max(claims)[0]) if claims else None


def at_least(event: Event) -> int:
    """The lowest version that the user can have had when the event took effect."""
    stood = stands_at(event)
    seen = [memory.version for memory in memories_of(event.answer)]
    return max([stood[1] if stood else 0, *seen])
