"""The thread of a memory and the time that it tells of: written, changed, read and erased, on both databases."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import orjson
import pytest
from sqlalchemy import func, select, update

from store import (
    Append,
    Appended,
    Conflict,
    Imported,
    InvalidInput,
    NewMemory,
    Search,
    SearchResult,
    Store,
    parse_lines,
)
from store.log.maintenance import verify
from store.log.rows import thread_key
from store.log.schema import THREAD_NAME, contents, memories
from tests.store.conftest import DIM, Clock

T = "default"
EYE = np.eye(DIM, dtype=np.float32)
SPRING, AUTUMN = datetime(2025, 4, 1, 9, tzinfo=UTC), datetime(2025, 10, 1, 9, 30, 0, 5, tzinfo=UTC)


def new(id: str, axis: int = 0, text: str | None = None, **fields: Any) -> NewMemory:
    return NewMemory(id, text or f"text {id}", EYE[axis], **fields)


def put(store: Store, *added: NewMemory, **options: Any) -> list[Appended]:
    result = store.append([Append(T, "ann", added, issued_at=store._now(), **options)])[0]
    assert not isinstance(result, Exception), result
    return result.memories


def placed(store: Store) -> dict[str, tuple[datetime | None, str | None]]:
    """The time and the thread of every memory, by id."""
    return {memory.id: (memory.happened_at, memory.thread) for memory in store.list(T, "ann").memories}


def names(store: Store) -> list[str]:
    """The names of threads in the log, sorted."""
    with store.log.read() as connection:
        statement = select(contents.c.text).where(contents.c.model == THREAD_NAME, contents.c.blank == 0)
        return sorted(connection.execute(statement).scalars())


def test_a_memory_is_read_with_its_thread_and_its_time(store: Store) -> None:
    put(store, new("1", thread="trip", happened_at=SPRING), new("2", 1, thread="trip"), new("3", 2))
    expected = {"1": (SPRING, "trip"), "2": (None, "trip"), "3": (None, None)}
    assert placed(store) == expected
    for id, pair in expected.items():
        memory = store.get(T, "ann", id)
        assert (memory.happened_at, memory.thread) == pair
    (many, _) = store.get_many(T, "ann", ["1", "2", "3"])
    assert {memory.id: (memory.happened_at, memory.thread) for memory in many} == expected
    (found,) = store.search([Search(T, "ann", EYE[0], 3)])
    assert isinstance(found, SearchResult)
    assert {memory.id: (memory.happened_at, memory.thread) for memory in found.results} == expected
    assert names(store) == ["trip"]
    assert list(verify(store.log)) == []


def test_the_same_content_in_another_thread_is_a_change(store: Store) -> None:
    put(store, new("1", thread="a", happened_at=SPRING))
    assert put(store, new("1", thread="a", happened_at=SPRING)) == [Appended("1", "unchanged", 1)]
    assert put(store, new("1")) == [Appended("1", "unchanged", 1)]
    assert put(store, new("1", thread="b")) == [Appended("1", "updated", 2)]
    assert placed(store) == {"1": (SPRING, "b")}
    assert put(store, new("1", happened_at=AUTUMN)) == [Appended("1", "updated", 3)]
    assert placed(store) == {"1": (AUTUMN, "b")}
    assert names(store) == ["b"]
    assert [event.version for event in store.history(T, "ann", "1")] == [1, 2, 3]


def test_an_upsert_keeps_what_it_does_not_name(store: Store) -> None:
    put(store, new("1", thread="a", happened_at=SPRING))
    assert put(store, new("1", text="new"), upsert=True) == [Appended("1", "updated", 2)]
    assert placed(store) == {"1": (SPRING, "a")}
    assert put(store, new("1", text="newer", thread="b", happened_at=AUTUMN), upsert=True)[0].version == 3
    assert placed(store) == {"1": (AUTUMN, "b")}


def test_a_memory_that_is_added_again_after_its_deletion_has_neither(store: Store) -> None:
    put(store, new("1", thread="a", happened_at=SPRING))
    store.delete(T, "ann", "1")
    assert names(store) == []
    put(store, new("1"))
    assert placed(store) == {"1": (None, None)}


def test_duplicates_are_skipped_within_a_thread(store: Store) -> None:
    put(store, new("1", text="Yes.", thread="a", happened_at=SPRING))
    skip: dict[str, Any] = {"on_duplicate": "skip"}
    assert put(store, new("2", text="Yes.", thread="a"), **skip) == [Appended("1", "unchanged", 1)]
    assert put(store, new("2", text="Yes."), **skip) == [Appended("1", "unchanged", 1)]
    assert put(store, new("2", text="Yes.", happened_at=AUTUMN), **skip) == [Appended("2", "added", 2)]
    both = new("3", text="Yes.", thread="b"), new("4", text="Yes.", thread="b")
    assert put(store, *both, **skip) == [Appended("3", "added", 3), Appended("3", "unchanged", 3)]
    assert placed(store) == {"1": (SPRING, "a"), "2": (AUTUMN, None), "3": (None, "b")}


def test_an_update_sets_and_removes_them(store: Store) -> None:
    put(store, new("1", happened_at=SPRING))
    changed = store.update(T, "ann", "1", thread="ü 1")
    assert (changed.version, changed.happened_at, changed.thread) == (2, SPRING, "ü 1")
    assert store.update(T, "ann", "1", thread="ü 1", happened_at=SPRING).version == 2
    changed = store.update(T, "ann", "1", happened_at=AUTUMN)
    assert (changed.version, changed.happened_at, changed.thread) == (3, AUTUMN, "ü 1")
    assert store.update(T, "ann", "1", text="new", vector=EYE[1]).thread == "ü 1"
    changed = store.update(T, "ann", "1", thread=None, happened_at=None)
    assert (changed.version, changed.happened_at, changed.thread) == (5, None, None)
    assert names(store) == []
    assert list(verify(store.log)) == []


def test_an_update_that_is_sent_again_answers_as_it_did(pair: tuple[Store, Store]) -> None:
    one, other = pair
    put(one, new("1", thread="a"), new("2", thread="a"))
    first = one.update(T, "ann", "1", happened_at=SPRING, write_id="w")
    other.update(T, "ann", "1", thread="b", happened_at=None)
    again = other.update(T, "ann", "1", happened_at=SPRING, write_id="w")
    assert (again.version, again.happened_at, again.thread) == (first.version, SPRING, "a")
    other.update(T, "ann", "2", thread=None)
    assert one.update(T, "ann", "1", happened_at=SPRING, write_id="w").thread is None  # its name was erased since


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        ({"thread": "trip"}, ["1", "2"]),
        ({"thread": {"ne": "trip"}}, ["3", "4"]),
        ({"thread": {"in": ["trip", "work"]}}, ["1", "2", "3"]),
        ({"thread": None}, ["4"]),
        ({"thread": {"exists": True}}, ["1", "2", "3"]),
        ({"happened_at": "2025-04-01T11:00:00+02:00"}, ["1"]),
        ({"happened_at": {"lt": "2025-12-31T00:00:00Z"}}, ["1", "2"]),
        ({"happened_at": {"gte": "2025-12-31T00:00:00Z"}}, ["3", "4"]),
        ({"metadata.thread": "mine"}, ["4"]),
    ],
)
def test_they_are_filtered_by(store: Store, filter: dict[str, Any], expected: list[str]) -> None:
    put(
        store,
        new("1", 0, thread="trip", happened_at=SPRING),
        new("2", 1, thread="trip", happened_at=AUTUMN),
        new("3", 2, thread="work"),
        new("4", 3, metadata={"thread": "mine"}),
    )
    assert [memory.id for memory in store.list(T, "ann", filter=filter, order="created_at").memories] == expected
    (found,) = store.search([Search(T, "ann", EYE[0], 9, filter=filter)])
    assert isinstance(found, SearchResult)
    assert sorted(memory.id for memory in found.results) == expected


@pytest.mark.parametrize("thread", ["", "x" * 257, "a\nb", 7])
def test_a_thread_that_is_no_name_is_refused(store: Store, thread: Any) -> None:
    good, bad = new("1"), new("2", thread=thread)
    (refused,) = store.append([Append(T, "ann", (good, bad), issued_at=store._now())])
    assert isinstance(refused, InvalidInput)
    assert (refused.position, refused.field) == (1, "thread")
    put(store, good)
    with pytest.raises(InvalidInput) as caught:
        store.update(T, "ann", "1", thread=thread)
    assert caught.value.field == "thread"


def test_an_export_holds_them_and_an_import_restores_them(open_store: Callable[..., Store], clock: Clock) -> None:
    store = open_store()
    put(store, new("1", thread="trip", happened_at=SPRING), new("2", 1, thread="trip"), new("3", 2))
    store.update(T, "ann", "1", thread="journey")
    exported = list(store.export(T, "ann"))
    assert b"happened_at" not in exported[1] and b"thread" not in exported[1]
    assert store.import_lines(T, "bob", exported) == Imported(3, 0)
    assert list(store.export(T, "bob")) == exported
    assert store.import_lines(T, "bob", exported) == Imported(0, 3)
    assert list(verify(store.log)) == []


def test_an_import_gives_a_memory_the_thread_and_the_time_that_it_lacks(store: Store) -> None:
    put(store, new("1"), new("2", 1, thread="a"))
    given = EYE[5]
    store.update(T, "ann", "2", vector=given)
    lines = [
        b'{"id": "1", "text": "text 1", "thread": "a", "happened_at": "2025-04-01T09:00:00Z", "vector": null}',
        b'{"id": "2", "text": "text 2", "thread": "b", "vector": [0, 1, 0, 0, 0, 0, 0, 0]}',
        b'{"id": "2", "text": "text 2", "thread": "c", "vector": [0, 1, 0, 0, 0, 0, 0, 0]}',
        b'{"id": "3", "text": "text 3", "thread": "d", "vector": [0, 0, 1, 0, 0, 0, 0, 0]}',
        b'{"id": "3", "text": "text 3", "thread": "e", "vector": [0, 0, 1, 0, 0, 0, 0, 0]}',
    ]
    made = [
        line if line.vector is not None else line._replace(vector=EYE[0]) for line in parse_lines(lines, store._now)
    ]
    assert store.import_page(T, "ann", made) == Imported(3, 2)
    assert placed(store) == {"1": (SPRING, "a"), "2": (None, "c"), "3": (None, "e")}
    assert names(store) == ["a", "c", "e"]
    assert store.import_page(T, "ann", made[:1]) == Imported(0, 1)
    assert list(verify(store.log)) == []


def test_the_vector_of_a_memory_survives_an_import_of_its_thread(store: Store) -> None:
    put(store, NewMemory("1", "text 1", EYE[5], given_vector=True))
    (line,) = parse_lines([b'{"id": "1", "text": "text 1", "thread": "a"}'], store._now)
    assert store.import_page(T, "ann", [line._replace(vector=EYE[0])]) == Imported(1, 0)
    memory = store.get(T, "ann", "1", include_vector=True)
    assert memory.thread == "a" and memory.vector is not None and memory.vector.tolist() == EYE[5].tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [("thread", "a\nb"), ("thread", 7), ("thread", ""), ("happened_at", "noon"), ("happened_at", 7)],
)
def test_a_line_with_a_wrong_one_is_refused(store: Store, field: str, value: Any) -> None:
    line = orjson.dumps({"id": "1", "text": "text", "vector": EYE[0].tolist(), field: value})
    with pytest.raises(InvalidInput) as caught:
        store.import_lines(T, "ann", [line])
    assert (caught.value.position, caught.value.field) == (0, field)


def test_a_name_is_erased_with_the_last_memory_of_its_thread(store: Store, clock: Clock) -> None:
    soon = clock.now + timedelta(seconds=5)
    put(store, new("1", thread="a"), new("2", thread="a"), new("3", thread="b"), new("4", thread="c", expires_at=soon))
    store.append([Append(T, "bob", (new("1", thread="a"),), issued_at=store._now())])
    store.delete(T, "ann", "1")
    assert names(store) == ["a", "a", "b", "c"]
    store.delete_where(T, "ann", {"id": {"in": ["2", "3"]}})
    assert names(store) == ["a", "c"]
    clock.advance(6)
    while store.background_step():
        pass
    assert names(store) == ["a"]
    store.erase_user(T, "bob")
    assert names(store) == []


def test_a_thread_that_is_left_and_entered_in_one_call_keeps_its_name(store: Store) -> None:
    put(store, new("1", thread="a"))
    call = [
        Append(T, "ann", (new("1", thread="b"),), issued_at=store._now()),
        Append(T, "ann", (new("2", thread="a"), new("3", thread="c")), issued_at=store._now()),
        Append(T, "ann", (new("3", thread="d"),), issued_at=store._now()),
    ]
    assert not any(isinstance(result, Exception) for result in store.append(call))
    assert placed(store) == {"1": (None, "b"), "2": (None, "a"), "3": (None, "d")}
    assert names(store) == ["a", "b", "d"]


def test_a_deletion_by_an_older_program_leaves_the_name_for_an_hour(store: Store, clock: Clock) -> None:
    """It does not know the columns, so its tombstone keeps the thread."""
    put(store, new("1", thread="a"), new("2", thread="b"), new("3", thread="b"))
    for id in ("1", "2"):
        store.delete(T, "ann", id)
    with store.log.write() as connection:
        connection.execute(update(memories).where(memories.c.id == "1").values(thread=thread_key("a")))
        connection.execute(update(memories).where(memories.c.id == "2").values(thread=thread_key("b")))
        row = {"blank": 0, "uid": 1, "version": -thread_key("a"), "model": THREAD_NAME, "vector_crc": 0}
        connection.execute(contents.insert(), [{**row, "text": "a", "metadata": "", "embedding": b""}])
    assert names(store) == ["a", "b"]
    put(store, new("2"))  # it is another memory now
    assert placed(store) == {"2": (None, None), "3": (None, "b")}
    clock.advance(3700)
    while store.background_step():
        pass
    assert names(store) == ["b"]


def test_a_name_that_is_not_the_thread_s_is_damage(store: Store) -> None:
    put(store, new("1", thread="a"))
    with store.log.write() as connection:
        connection.execute(update(contents).where(contents.c.model == THREAD_NAME).values(text="b"))
    (problem,) = verify(store.log)
    assert problem == "memory '1' of user 'ann': the name of its thread is not what was written"


def test_an_erased_user_leaves_no_thread_behind(store: Store) -> None:
    put(store, new("1", thread="a"))
    store.erase_user(T, "ann")
    with store.log.read() as connection:
        assert connection.execute(select(func.count()).select_from(memories)).scalar() == 0
    assert names(store) == []
    late = Append(T, "ann", (new("2", thread="b"),), issued_at=store._now() - timedelta(hours=1))
    (refused,) = store.append([late])
    assert isinstance(refused, Conflict)
    assert names(store) == []
