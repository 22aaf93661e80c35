"""The effect of an append on one memory, computed without a database."""

from __future__ import annotations

from typing import Any

import pytest

from store import Appended, Conflict, InvalidInput
from store.log.appending import Change, CheckedAppend, decide
from store.log.existing import State, Stored
from store.log.rows import Checked, thread_key

NOW = 1000
SAME, OTHER = b"same", b"other"


def memory(
    expires_at: int | None = None,
    *,
    generated_id: bool = False,
    vector: int | None = None,
    created_at: int | None = None,
    happened_at: int | None = None,
    thread: str | None = None,
) -> Checked:
    """`vector` is the checksum of a vector that was given; None for one that the model made."""
    given = vector is not None
    times = created_at, happened_at
    return Checked("1", "text", "{}", b"{}", expires_at, b"", vector or 9, generated_id, given, *times, thread)


def request(*, upsert: bool = False, skip: bool = False) -> CheckedAppend:
    return CheckedAppend(("default", "ann"), [], skip, upsert, NOW, 0, None, None)


def live(
    digest: bytes = SAME,
    expires_at: int | None = None,
    id: str = "1",
    happened_at: int | None = None,
    thread: str | None = None,
) -> State:
    key = None if thread is None else thread_key(thread)
    return State(id, 7, digest, 50, expires_at, None, 3, Stored(b"", 1, 6), happened_at, key)


def deleted(at: int) -> State:
    return State("1", 7, b"", 50, None, at, 3)


def added(expires_at: int | None = None, created_at: int | None = None) -> Change:
    return Change("added", "1", expires_at, created_at)


def updated(id: str = "1", expires_at: int | None = None, created_at: int | None = None) -> Change:
    return Change("updated", id, expires_at, created_at)


@pytest.mark.parametrize(
    ("state", "new", "how", "duplicates", "decision"),
    [
        (None, memory(), request(), [], added()),
        (None, memory(NOW + 1), request(), [], added(NOW + 1)),
        (None, memory(created_at=7), request(), [], added(created_at=7)),
        (live(), memory(), request(), [], Appended("1", "unchanged", 7)),
        (live(OTHER), memory(), request(upsert=True), [], updated()),
        (live(SAME, 5), memory(), request(upsert=True), [], updated()),
        (live(SAME, 5), memory(5), request(), [], Appended("1", "unchanged", 7)),
        (deleted(NOW - 1), memory(), request(), [], added()),
        (live(OTHER), memory(generated_id=True), request(), [], Appended("1", "added", 3)),
        (deleted(NOW), memory(generated_id=True), request(), [], Appended("1", "added", 3)),
        (None, memory(), request(skip=True), [live(id="2"), live(id="3")], Appended("2", "unchanged", 7)),
        (None, memory(), request(), [live(id="2")], added()),
        (None, memory(NOW), request(skip=True), [live(id="2")], Appended("2", "unchanged", 7)),
        (live(OTHER), memory(), request(upsert=True, skip=True), [live(id="2")], updated()),
        (deleted(NOW - 1), memory(), request(skip=True), [live(id="2")], Appended("2", "unchanged", 7)),
        (live(), memory(vector=1), request(), [], Appended("1", "unchanged", 7)),
        (live(), memory(vector=2), request(), [], updated()),
        (live(), memory(vector=2), request(upsert=True), [], updated()),
        (live(), memory(created_at=50), request(), [], Appended("1", "unchanged", 7)),
        (live(), memory(created_at=51), request(), [], updated(created_at=51)),
        (live(thread="a"), memory(thread="a"), request(), [], Appended("1", "unchanged", 7)),
        (live(thread="a"), memory(), request(), [], Appended("1", "unchanged", 7)),
        (live(thread="a"), memory(thread="b"), request(), [], updated()),
        (live(), memory(thread="b"), request(), [], updated()),
        (live(happened_at=5), memory(happened_at=5), request(), [], Appended("1", "unchanged", 7)),
        (live(happened_at=5), memory(), request(), [], Appended("1", "unchanged", 7)),
        (live(happened_at=5), memory(happened_at=6), request(), [], updated()),
        (None, memory(), request(skip=True), [live(id="2", thread="a")], Appended("2", "unchanged", 7)),
        (None, memory(thread="a"), request(skip=True), [live(id="2", thread="a")], Appended("2", "unchanged", 7)),
        (None, memory(thread="b"), request(skip=True), [live(id="2", thread="a")], added()),
        (None, memory(happened_at=6), request(skip=True), [live(id="2", happened_at=5)], added()),
        (None, memory(vector=2), request(skip=True), [live(id="2")], updated("2")),
        (None, memory(vector=2), request(), [live(id="2")], added()),
        (None, memory(), request(skip=True), [live(SAME, NOW + 5, "2")], updated("2")),
        (None, memory(NOW + 9), request(skip=True), [live(SAME, NOW + 5, "2")], updated("2", NOW + 9)),
        (None, memory(NOW + 5), request(skip=True), [live(SAME, NOW + 5, "2")], Appended("2", "unchanged", 7)),
        (None, memory(NOW + 3), request(skip=True), [live(SAME, NOW + 5, "2")], Appended("2", "unchanged", 7)),
        (None, memory(NOW + 3, vector=2), request(skip=True), [live(SAME, NOW + 5, "2")], updated("2", NOW + 5)),
        (
            None,
            memory(),
            request(skip=True),
            [live(SAME, NOW + 5, "2"), live(id="3")],
            Appended("3", "unchanged", 7),
        ),
    ],
)
def test_a_memory_is_added_updated_or_left(
    state: State | None, new: Checked, how: CheckedAppend, duplicates: list[State], decision: Any
) -> None:
    assert decide(new, SAME, state, how, duplicates) == decision


@pytest.mark.parametrize(
    ("state", "new", "error", "field", "code"),
    [
        (live(OTHER), memory(), Conflict, "id", "id_conflict"),
        (live(SAME, 5), memory(), Conflict, "id", "id_conflict"),
        (deleted(NOW), memory(), Conflict, "id", "deleted"),
        (None, memory(NOW), InvalidInput, "expires_at", None),
        (deleted(NOW - 1), memory(NOW), InvalidInput, "expires_at", None),
    ],
)
def test_a_memory_is_refused(
    state: State | None, new: Checked, error: type[Conflict | InvalidInput], field: str, code: str | None
) -> None:
    with pytest.raises(error) as caught:
        decide(new, SAME, state, request(), [])
    assert (caught.value.field, caught.value.code, caught.value.position) == (field, code, None)
