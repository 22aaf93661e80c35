"""Each call of the store, on SQLite and PostgreSQL, with every field of its answer."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import orjson
import pytest

from store import (
    Append,
    Appended,
    AppendResult,
    Conflict,
    HistoryEvent,
    IndexOptions,
    InvalidInput,
    LogUnavailable,
    Memory,
    NewMemory,
    NotFound,
    Search,
    SearchResult,
    Store,
    UserStats,
    errors,
)
from store.log import listing, reading
from tests.store.conftest import DIM, Clock

T = "default"
EYE = np.eye(DIM, dtype=np.float32)


def new(id: str, axis: int = 0, text: str | None = None, **fields: Any) -> NewMemory:
    return NewMemory(id, text or f"text {id}", EYE[axis], **fields)


def put(store: Store, user: str, *memories: NewMemory, **options: Any) -> Any:
    options.setdefault("issued_at", store._now())
    return store.append([Append(T, user, memories, **options)])[0]


def sealed(store: Store, kind: str, key: list[Any], *of: str) -> str | None:
    """A cursor that only this store could have made."""
    return store._cursors.seal(listing.encode_cursor(kind, key), *of)


def find(store: Store, user: str, axis: int = 0, k: int = 10, **options: Any) -> list[str]:
    result = store.search([Search(T, user, EYE[axis], k, **options)])[0]
    assert isinstance(result, SearchResult), result
    return [memory.id for memory in result.results]


def test_a_batch_of_many_users_is_answered_in_order(store: Store) -> None:
    results = store.append(
        [
            Append(T, "ann", (new("1", 0), new("2", 1)), issued_at=store._now()),
            Append(T, "bob", (new("1", 2),), issued_at=store._now()),
            Append("other", "ann", (new("1", 3),), issued_at=store._now()),
            Append(T, "ann", (new("3", 4),), issued_at=store._now()),
        ]
    )
    assert results == [
        AppendResult([Appended("1", "added", 1), Appended("2", "added", 2)], 2),
        AppendResult([Appended("1", "added", 1)], 1),
        AppendResult([Appended("1", "added", 1)], 1),
        AppendResult([Appended("3", "added", 3)], 3),
    ]
    assert find(store, "ann", 4) == ["3", "2", "1"]
    assert find(store, "bob") == ["1"]


def test_a_search_result_holds_the_memory(store: Store, clock: Clock) -> None:
    vector = np.array([3, 4, 0, 0, 0, 0, 0, 0], np.float32)
    expires_at = datetime(2030, 5, 1, 12, 0, 0, 123456, tzinfo=UTC)
    data = {"z": 1, "a": [None, True, 1.5, "ä"], "o": {"k": -1}}
    put(store, "ann", NewMemory("ü 1", "tea\nwith Ä", vector, data, expires_at))
    result = store.search([Search(T, "ann", EYE[0], 3, include_vectors=True)])[0]
    assert isinstance(result, SearchResult)
    (memory,) = result.results
    assert memory.vector is not None
    assert memory.vector.tolist() == vector.tolist()
    at = memory.created_at
    assert replace(memory, vector=None) == Memory("ü 1", "ann", "tea\nwith Ä", data, at, at, expires_at, 1, score=0.6)
    assert list(memory.metadata) == ["z", "a", "o"]
    assert (result.index, result.version) == ("exact", 1)
    assert clock.now - at < timedelta(seconds=1)


def test_an_unknown_user_has_nothing(store: Store) -> None:
    assert store.search([Search(T, "nobody", EYE[0])]) == [SearchResult([], "exact", 0)]
    assert store.list(T, "nobody").memories == []
    assert store.user(T, "nobody") == UserStats("nobody", 0, 0, 0, None, False)
    assert list(store.export(T, "nobody")) == []
    assert store.delete_where(T, "nobody", {"a": 1}) == 0
    for call in (store.get, store.delete, store.history, store.update):
        with pytest.raises(NotFound):
            call(T, "nobody", "1")


def test_the_same_id_and_content_is_unchanged(store: Store) -> None:
    put(store, "ann", new("1", metadata={"a": 1, "b": 2}))
    again = put(store, "ann", new("1", metadata={"b": 2, "a": 1}))
    assert again == AppendResult([Appended("1", "unchanged", 1)], 1)


def test_the_same_id_with_other_content_is_a_conflict_of_that_request_alone(store: Store) -> None:
    put(store, "ann", new("1"))
    at = store._now()
    results = store.append(
        [
            Append(T, "ann", (new("2"), new("1", text="other")), issued_at=at),
            Append(T, "ann", (new("3"),), issued_at=at),
            Append(T, "ann", (new("1", text="other"),), upsert=True, issued_at=at),
        ]
    )
    assert isinstance(results[0], Conflict)
    assert (results[0].param, results[0].code) == ("1.id", "id_conflict")
    assert results[1:] == [
        AppendResult([Appended("3", "added", 2)], 2),
        AppendResult([Appended("1", "updated", 3)], 3),
    ]
    assert sorted(find(store, "ann")) == ["1", "3"]


def test_the_requests_of_one_call_are_all_written_or_none(store: Store) -> None:
    put(store, "bob", new("1"))
    at = store._now()
    clashing = [
        Append(T, "ann", (new("1"), new("2")), issued_at=at),
        Append(T, "bob", (new("2"), new("1", text="other")), issued_at=at),
        Append(T, "eve", (new("1"),), issued_at=at),
    ]
    alone = [Append(T, "ann", (new("3"),), issued_at=at), Append(T, "eve", (new("3"),), issued_at=at)]
    failed, written, invalid = store.append_together([clashing, alone, [alone[0], Append(T, "x", (new("", 0),))]])
    assert isinstance(failed, Conflict)
    assert (failed.param, failed.code) == ("3.id", "id_conflict")
    assert written == [
        AppendResult([Appended("3", "added", 1)], 1),
        AppendResult([Appended("3", "added", 1)], 1),
    ]
    assert isinstance(invalid, InvalidInput)
    assert invalid.param == "1.id"
    assert [find(store, user) for user in ("ann", "bob", "eve")] == [["3"], ["1"], ["3"]]
    assert store.user(T, "bob").version == 1

    store.erase_user(T, "eve")
    (late,) = store.append_together([clashing[::2]])
    assert isinstance(late, Conflict)
    assert (late.param, late.code) == ("2.user_id", "erased")
    assert find(store, "ann") == ["3"]


def test_duplicates_are_skipped_on_request(store: Store) -> None:
    put(store, "ann", new("1", text="tea"))
    put(store, "bob", new("9", text="tea"))
    skipped = put(store, "ann", new("2", text="tea"), new("3", text="rain"), new("4", text="rain"), on_duplicate="skip")
    assert skipped.memories == [
        Appended("1", "unchanged", 1),
        Appended("3", "added", 2),
        Appended("3", "unchanged", 2),
    ]
    assert put(store, "ann", new("5", text="tea")).memories == [Appended("5", "added", 3)]


def stored_vector(store: Store, user: str, id: str) -> list[float]:
    found = store.get(T, user, id, include_vector=True).vector
    assert found is not None
    return found.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("upsert", [False, True])
def test_a_given_vector_replaces_another_one_of_the_same_content(store: Store, upsert: bool) -> None:
    put(store, "ann", new("1", 0))
    assert put(store, "ann", new("1", 1), upsert=upsert).memories == [Appended("1", "unchanged", 1)]  # a model's
    for _ in range(2):
        status, version = ("updated", 2) if _ == 0 else ("unchanged", 2)
        result = put(store, "ann", new("1", 1, given_vector=True), upsert=upsert)
        assert result == AppendResult([Appended("1", status, version)], 2)
        assert stored_vector(store, "ann", "1") == EYE[1].tolist()
        assert find(store, "ann", 1, min_score=0.5) == ["1"]
    assert put(store, "ann", new("1", 2), upsert=upsert).memories == [Appended("1", "unchanged", 2)]
    assert stored_vector(store, "ann", "1") == EYE[1].tolist()
    assert [event.event for event in store.history(T, "ann", "1")] == ["added", "updated"]


def test_the_calls_of_one_batch_give_a_memory_several_vectors(store: Store) -> None:
    at = store._now()
    calls = [
        Append(T, "ann", (new("1", axis, given_vector=True),), issued_at=at, upsert=axis == 2) for axis in (0, 1, 1, 2)
    ]
    assert store.append(calls) == [
        AppendResult([Appended("1", "added", 1)], 1),
        AppendResult([Appended("1", "updated", 2)], 2),
        AppendResult([Appended("1", "unchanged", 2)], 2),
        AppendResult([Appended("1", "updated", 3)], 3),
    ]
    assert stored_vector(store, "ann", "1") == EYE[2].tolist()


def test_an_upsert_of_the_expiry_alone_keeps_a_given_vector(store: Store, clock: Clock) -> None:
    put(store, "ann", new("1", 3, given_vector=True))
    later = clock.now + timedelta(days=1)
    assert put(store, "ann", new("1", 0, expires_at=later), upsert=True).memories == [Appended("1", "updated", 2)]
    assert stored_vector(store, "ann", "1") == EYE[3].tolist()
    assert store.get(T, "ann", "1").expires_at == later


def test_a_skipped_duplicate_lasts_as_long_as_the_new_memory_would(store: Store, clock: Clock) -> None:
    soon, later = clock.now + timedelta(seconds=2), clock.now + timedelta(days=1)
    put(store, "ann", new("1", 3, text="tea", expires_at=soon, metadata={"a": 1, "b": 2}, given_vector=True))
    skipped = put(
        store,
        "ann",
        new("2", 0, text="tea", metadata={"b": 2, "a": 1}, expires_at=later),
        new("1", 0, text="milk"),
        new("3", 0, text="tea", metadata={"a": 1, "b": 2}),
        new("4", 0, text="tea", metadata={"a": 1, "b": 2}, expires_at=soon),
        on_duplicate="skip",
        upsert=True,
    )
    assert skipped.memories == [
        Appended("1", "updated", 2),
        Appended("1", "updated", 3),
        Appended("3", "added", 4),
        Appended("3", "unchanged", 4),
    ]
    put(store, "bob", new("1", 3, text="tea", expires_at=soon, given_vector=True))
    assert put(store, "bob", new("2", 0, text="tea"), on_duplicate="skip").memories == [Appended("1", "updated", 2)]
    clock.advance(10)
    assert find(store, "bob") == ["1"]
    assert stored_vector(store, "bob", "1") == EYE[3].tolist()
    assert put(
        store, "bob", new("2", 5, text="tea", expires_at=later, given_vector=True), on_duplicate="skip"
    ).memories == [Appended("1", "updated", 3)]
    assert store.get(T, "bob", "1").expires_at is None
    assert stored_vector(store, "bob", "1") == EYE[5].tolist()


def test_a_memory_keeps_the_time_of_its_making(store: Store, clock: Clock) -> None:
    then = datetime(1969, 12, 31, 23, tzinfo=UTC)
    put(store, "ann", new("1", created_at=then), new("2"), new("3", created_at=datetime(1970, 1, 1, tzinfo=UTC)))
    found = store.get(T, "ann", "1")
    assert (found.created_at, found.updated_at) == (then, store.get(T, "ann", "2").created_at)
    assert [memory.id for memory in store.list(T, "ann", order="created_at").memories] == ["1", "3", "2"]
    assert put(store, "ann", new("1")).memories == [Appended("1", "unchanged", 1)]
    other = then + timedelta(seconds=1)
    assert put(store, "ann", new("1", 4, created_at=other)).memories == [Appended("1", "updated", 4)]
    assert store.get(T, "ann", "1").created_at == other
    assert stored_vector(store, "ann", "1") == EYE[0].tolist()
    assert put(store, "ann", new("1", text="else"), upsert=True).memories == [Appended("1", "updated", 5)]
    assert store.get(T, "ann", "1").created_at == other
    soon = put(store, "ann", new("4", created_at=clock.now + timedelta(seconds=50)))
    assert soon.memories == [Appended("4", "added", 6)]
    future = put(store, "ann", new("5"), new("6", created_at=clock.now + timedelta(seconds=70)))
    assert isinstance(future, InvalidInput)
    assert (str(future), future.position) == ("1.created_at: must not be in the future", 1)


@pytest.mark.parametrize(
    "delete",
    [
        lambda store: store.delete(T, "ann", "1"),
        lambda store: store.delete_many(T, "ann", ["1"]),
        lambda store: store.delete_where(T, "ann", {"id": "1"}),
    ],
)
def test_the_time_of_a_deletion_is_read_under_the_lock(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch, delete: Callable[[Store], Any]
) -> None:
    """A write that is committed while the deletion waits for the lock must be older than the deletion."""
    put(store, "ann", new("1"))
    writing = store._users.writing
    written: list[datetime] = []

    def wait_and_write(*args: Any, **options: Any) -> Any:
        clock.advance(3)
        written.append(clock())
        return writing(*args, **options)

    monkeypatch.setattr(store._users, "writing", wait_and_write)
    delete(store)
    assert store.history(T, "ann", "1")[-1].at > written[0]


def test_a_list_by_the_last_change_follows_the_times(store: Store) -> None:
    """An import brings times that are older than those of memories with lower versions."""
    put(store, "bob", new("old 1"), new("old 2"))
    store.update(T, "bob", "old 1", metadata={"n": 1})
    lines = list(store.export(T, "bob"))
    put(store, "ann", new("new"))
    store.import_lines(T, "ann", lines)
    assert [memory.version for memory in store.list(T, "ann", order="created_at").memories][-1] == 1

    def walk(order: Any, limit: int) -> list[str]:
        found, cursor = [], None
        while True:
            page = store.list(T, "ann", order=order, limit=limit, cursor=cursor)
            found += [memory.id for memory in page.memories]
            cursor = page.next_cursor
            if cursor is None:
                return found

    for limit in (1, 2, 3):
        assert walk("updated_at", limit) == ["old 2", "old 1", "new"]
        assert walk("-updated_at", limit) == ["new", "old 1", "old 2"]
    by_versions = sealed(store, "updated_at", [1, 1], "memories", T, "ann")  # as cursors were before
    with pytest.raises(InvalidInput, match="was made for another list"):
        store.list(T, "ann", order="updated_at", cursor=by_versions)


def test_a_history_and_a_list_have_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "ann", new("1"), new("2"))
    for n in range(6):
        store.update(T, "ann", "1", metadata={"n": n})
    whole = store.history(T, "ann", "1")
    assert [event.version for event in whole] == [1, 3, 4, 5, 6, 7, 8]

    def walk(limit: int) -> list[list[int]]:
        pages, cursor = [], None
        while not pages or cursor is not None:
            page = store.history_page(T, "ann", "1", limit=limit, cursor=cursor)
            pages.append(page.events)
            cursor = page.next_cursor
        assert [event for page in pages for event in page] == whole
        return [[event.version for event in page] for page in pages]

    assert walk(1000) == [[1, 3, 4, 5, 6, 7, 8]]
    assert walk(7) == [[1, 3, 4, 5, 6, 7, 8]]
    assert walk(6) == [[1, 3, 4, 5, 6, 7], [8]]
    assert walk(3) == [[1, 3, 4], [5, 6, 7], [8]]
    cursor = store.history_page(T, "ann", "1", limit=7 - 1).next_cursor
    store.update(T, "ann", "1", metadata={"n": 6})  # it was written after the first page was read
    later = store.history_page(T, "ann", "1", limit=5, cursor=cursor)
    assert ([event.version for event in later.events], later.next_cursor) == ([8, 9], None)
    whole = store.history(T, "ann", "1")
    monkeypatch.setattr(listing, "PAGE_BYTES", 20)  # two states: "text 1" and {"n":0}
    assert walk(1000) == [[1, 3], [4, 5], [6, 7], [8, 9]]
    assert [len(store.list(T, "ann", limit=limit).memories) for limit in (1, 2)] == [1, 2]
    monkeypatch.setattr(listing, "PAGE_BYTES", 1)
    page = store.list(T, "ann", order="created_at")
    assert ([memory.id for memory in page.memories], page.next_cursor is None) == (["1"], False)
    page = store.list(T, "ann", order="created_at", cursor=page.next_cursor)
    assert ([memory.id for memory in page.memories], page.next_cursor) == (["2"], None)
    for limit in (0, 1001):
        with pytest.raises(InvalidInput, match="limit: must be an integer in 1 to 1000"):
            store.history_page(T, "ann", "1", limit=limit)
    users = sealed(store, "users", ["ann"], "history", T, "ann", "1")
    with pytest.raises(InvalidInput, match="cursor: was made for another list"):
        store.history_page(T, "ann", "1", cursor=users)


def test_the_bytes_of_a_user_follow_every_write(store: Store, clock: Clock) -> None:
    def check(user: str = "ann") -> None:
        memories = store.list(T, user, limit=1000).memories
        expected = sum(len(m.text.encode()) + len(orjson.dumps(m.metadata)) + 4 * DIM for m in memories)
        stats = store.user(T, user)
        assert (stats.bytes, stats.memories) == (expected, len(memories))
        listed = {stats.user_id: stats for stats in store.users(T).users}
        assert listed.get(user, stats) == stats

    put(store, "ann", new("1", text="täa"), new("2", metadata={"ä": [1, 2.5]}), new("3", text="x" * 5000))
    check()
    put(store, "ann", new("1", text="longer text"), new("4"), upsert=True)
    put(store, "ann", new("4", 3, given_vector=True))
    check()
    store.append_together([[Append(T, "ann", (new("5"), new("1", text="other")), issued_at=store._now())]])
    check()
    store.update(T, "ann", "2", metadata={}, text="ß", vector=EYE[1])
    check()
    put(store, "ann", new("6", expires_at=clock.now + timedelta(seconds=5)), new("7", text="gone"))
    check()
    store.delete(T, "ann", "7")
    clock.advance(10)
    while store.background_step():
        pass
    check()
    lines = list(store.export(T, "ann"))
    store.import_lines(T, "bob", lines)
    check("bob")
    store.delete_where(T, "bob", {"id": {"in": ["1", "3"]}})
    check("bob")
    store.import_lines(T, "bob", lines)
    check("bob")
    assert store.user(T, "bob").bytes == store.user(T, "ann").bytes
    put(store, "bob", new("3", text="y" * 6000), upsert=True)
    check("bob")
    store.erase_user(T, "bob")
    assert store.user(T, "bob").bytes == 0
    put(store, "bob", new("1", text="back"))
    check("bob")


@pytest.mark.parametrize(
    ("memory", "param"),
    [
        (NewMemory("", "x", EYE[0]), "id"),
        (NewMemory("a" * 257, "x", EYE[0]), "id"),
        (NewMemory("a\x1f", "x", EYE[0]), "id"),
        (NewMemory("a\x85", "x", EYE[0]), "id"),
        (NewMemory("1", "a\0b", EYE[0]), "text"),
        (NewMemory("1", "\ud800", EYE[0]), "text"),
        (NewMemory("1", "x", np.zeros(DIM, np.float32)), "vector"),
        (NewMemory("1", "x", np.full(DIM, np.nan, np.float32)), "vector"),
        (NewMemory("1", "x", np.full(DIM, np.inf, np.float32)), "vector"),
        (NewMemory("1", "x", np.ones(DIM + 1, np.float32)), "vector"),
        (NewMemory("1", "x", [10**400] * DIM), "vector"),  # type: ignore[arg-type]
        (NewMemory("1", "x", EYE[0], {"a": {"b": [float("nan")]}}), "metadata.a.b.0"),
        (NewMemory("1", "x", EYE[0], {"a": 2**63}), "metadata.a"),
        (NewMemory("1", "x", EYE[0], {"a": "\0"}), "metadata.a"),
        (NewMemory("1", "x", EYE[0], {"a": {1}}), "metadata.a"),
        (NewMemory("1", "x", EYE[0], {1: 1}), "metadata"),  # type: ignore[dict-item]
        (NewMemory("1", "x", EYE[0], {"a": "\udc00"}), "metadata"),
        (NewMemory("1", "x", EYE[0], {}, datetime(2030, 1, 1)), "expires_at"),
    ],
)
def test_a_field_that_cannot_be_stored_is_named(store: Store, memory: NewMemory, param: str) -> None:
    at = store._now()
    results = store.append(
        [Append(T, "ann", (new("7"), memory), issued_at=at), Append(T, "ann", (new("8"),), issued_at=at)]
    )
    assert isinstance(results[0], InvalidInput)
    assert results[0].param == f"1.{param}"
    assert results[1] == AppendResult([Appended("8", "added", 1)], 1)


@pytest.mark.parametrize("id", ["", "a" * 257, "\ud800", 1])
@pytest.mark.parametrize("call", [Store.get, Store.update, Store.delete, Store.history])
def test_an_id_that_no_memory_can_have_is_named(store: Store, call: Callable[..., Any], id: Any) -> None:
    put(store, "ann", new("1"))
    with pytest.raises(InvalidInput) as caught:
        call(store, T, "ann", id)
    assert caught.value.param == "id"


def test_vectors_of_any_length_are_compared_by_direction(store: Store) -> None:
    tiny, huge = EYE[0] * np.float32(1e-15), EYE[1] * np.float32(1e15)
    put(store, "ann", NewMemory("tiny", "a", tiny), NewMemory("huge", "b", huge))
    result = store.search([Search(T, "ann", (EYE[0] + EYE[1]) * np.float32(1e-12), 2)])[0]
    assert isinstance(result, SearchResult)
    assert [(memory.id, memory.score) for memory in result.results] == [("huge", 0.707107), ("tiny", 0.707107)]


def test_ties_go_to_the_newest(store: Store) -> None:
    for n in range(20):
        put(store, "ann", new(str(n)))
    put(store, "ann", new("5", metadata={"new": True}), upsert=True)
    assert find(store, "ann", k=3) == ["5", "19", "18"]


def test_min_score_and_filter(store: Store) -> None:
    put(store, "ann", *(new(str(n), n, metadata={"even": n % 2 == 0}) for n in range(DIM)))
    assert find(store, "ann", 3, min_score=0.5) == find(store, "ann", 3, min_score=np.float32(0.5)) == ["3"]
    assert sorted(find(store, "ann", 3, filter={"even": True})) == ["0", "2", "4", "6"]
    assert find(store, "ann", filter={"even": "no"}) == []
    result = store.search([Search(T, "ann", EYE[0], filter={"AND": [{"even": {"foo": 1}}]})])[0]
    assert isinstance(result, InvalidInput)
    assert result.param == "filter.AND.0.even.foo"


@pytest.mark.parametrize(
    ("search", "param"),
    [
        (Search(T, "ann", EYE[0], 0), "top_k"),
        (Search(T, "ann", np.zeros(DIM, np.float32)), "vector"),
        (Search(T, "ann", np.ones(3, np.float32)), "vector"),
        (Search(T, "ann", [10**400] * DIM), "vector"),  # type: ignore[arg-type]
        (Search(T, "ann", EYE[0], min_score="x"), "min_score"),  # type: ignore[arg-type]
        (Search(T, "ann", EYE[0], min_score=10**400), "min_score"),
    ],
)
def test_a_wrong_search_fails_alone(store: Store, search: Search, param: str) -> None:
    put(store, "ann", new("1"))
    wrong, right = store.search([search, Search(T, "ann", EYE[0])])
    assert isinstance(wrong, InvalidInput)
    assert wrong.param == param
    assert isinstance(right, SearchResult)
    assert len(right.results) == 1


def test_two_stores_see_each_others_writes_at_once(open_store: Callable[..., Store]) -> None:
    one, other = open_store(), open_store()
    put(one, "ann", new("1"))
    assert find(other, "ann") == ["1"]
    put(other, "ann", new("2"))
    assert find(one, "ann") == ["2", "1"]
    one.delete(T, "ann", "1")
    assert find(other, "ann") == ["2"]
    one.erase_user(T, "ann")
    assert find(other, "ann") == []
    put(other, "ann", new("3"))
    assert find(one, "ann") == ["3"]


def test_update_changes_what_is_given(store: Store) -> None:
    put(store, "ann", new("1", metadata={"a": 1}))
    before = store.get(T, "ann", "1")
    assert store.update(T, "ann", "1") == before
    assert store.update(T, "ann", "1", metadata={"a": 1}) == before
    moved = store.update(T, "ann", "1", metadata={"a": 2}, if_version=1)
    assert moved == replace(before, metadata={"a": 2}, version=2, updated_at=moved.updated_at)
    told = store.update(T, "ann", "1", text="new", vector=EYE[5])
    assert (told.text, told.metadata, told.version) == ("new", {"a": 2}, 3)
    vector = store.get(T, "ann", "1", include_vector=True).vector
    assert vector is not None
    assert vector.tolist() == EYE[5].tolist()
    with pytest.raises(Conflict) as caught:
        store.update(T, "ann", "1", metadata={}, if_version=2)
    assert (caught.value.param, caught.value.code) == ("if_version", "version_mismatch")
    with pytest.raises(InvalidInput):
        store.update(T, "ann", "1", text="without its vector")
    events = [(event.event, event.version, event.text, event.metadata) for event in store.history(T, "ann", "1")]
    assert events == [
        ("added", 1, "text 1", {"a": 1}),
        ("updated", 2, "text 1", {"a": 2}),
        ("updated", 3, "new", {"a": 2}),
    ]


def test_the_history_of_a_deleted_memory_has_only_its_dates(store: Store) -> None:
    put(store, "ann", new("1"), new("2"))
    store.update(T, "ann", "1", metadata={"secret": 1})
    assert store.delete(T, "ann", "1") == 4
    first, second, third = store.history(T, "ann", "1")
    assert first == HistoryEvent("added", first.at, 1)
    assert second == HistoryEvent("updated", second.at, 3)
    assert third == HistoryEvent("deleted", third.at, 4)
    for call in (store.get, store.delete, store.update):
        with pytest.raises(NotFound):
            call(T, "ann", "1")
    assert put(store, "ann", new("1", text="again")).memories == [Appended("1", "added", 5)]
    assert [event.text for event in store.history(T, "ann", "1")] == [None, None, None, "again"]


def test_a_write_does_not_restore_what_was_erased_after_it_was_sent(store: Store) -> None:
    put(store, "ann", new("1"), new("2"))
    sent = store._now()
    store.delete(T, "ann", "1")
    late = put(store, "ann", new("1"), issued_at=sent)
    assert isinstance(late, Conflict)
    assert late.code == "deleted"
    assert store.erase_user(T, "ann") == (1, 4)
    late = put(store, "ann", new("3"), issued_at=sent)
    assert isinstance(late, Conflict)
    assert late.code == "erased"
    assert find(store, "ann") == []
    assert put(store, "ann", new("3")).version == 5
    assert store.erase_user(T, "nobody") == (0, 1)
    assert isinstance(put(store, "nobody", new("1"), issued_at=sent), Conflict)


def test_an_update_does_not_restore_what_was_erased_after_it_was_sent(store: Store) -> None:
    put(store, "ann", new("1"), new("2"))
    sent = store._now()
    store.delete(T, "ann", "1")
    put(store, "ann", new("1"))
    with pytest.raises(Conflict) as late:
        store.update(T, "ann", "1", metadata={"late": True}, issued_at=sent)
    assert (late.value.param, late.value.code) == ("id", "deleted")
    assert store.update(T, "ann", "2", metadata={"late": True}, issued_at=sent).version == 5
    store.erase_user(T, "ann")
    put(store, "ann", new("2"))
    with pytest.raises(Conflict):
        store.update(T, "ann", "2", metadata={}, issued_at=sent)
    assert store.update(T, "ann", "2", metadata={"a": 1}, issued_at=store._now()).metadata == {"a": 1}


def test_an_expired_memory_is_gone(store: Store, clock: Clock) -> None:
    put(store, "ann", new("1", expires_at=clock.now + timedelta(seconds=5)), new("2"))
    assert find(store, "ann") == ["2", "1"]
    clock.advance(10)
    assert find(store, "ann") == ["2"]
    assert [memory.id for memory in store.list(T, "ann").memories] == ["2"]
    for ask in (store.get, store.history):
        with pytest.raises(NotFound):
            ask(T, "ann", "1")
    while store.background_step():
        pass
    assert [event.event for event in store.history(T, "ann", "1")] == ["added", "deleted"]
    assert store.history(T, "ann", "1")[0].text is None
    assert store.user(T, "ann").memories == 1


def test_pages_follow_one_another(store: Store) -> None:
    for n in range(25):
        put(store, "ann", new(f"{n:02}", metadata={"n": n}))
    store.update(T, "ann", "03", metadata={"n": -1})

    def pages(**options: Any) -> list[list[str]]:
        found, cursor = [], None
        while True:
            page = store.list(T, "ann", cursor=cursor, **options)
            found.append([memory.id for memory in page.memories])
            cursor = page.next_cursor
            if cursor is None:
                return found

    names = [f"{n:02}" for n in range(25)]
    assert pages(limit=10, order="created_at") == [names[:10], names[10:20], names[20:]]
    assert pages(limit=25) == [names[::-1]]
    by_update = [id for page in pages(limit=7, order="updated_at") for id in page]
    assert by_update == [*names[:3], *names[4:], "03"]
    assert pages(limit=2, order="-updated_at", filter={"n": {"lt": 3}}) == [["03", "02"], ["01", "00"]]
    for options, param in (
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"order": "size"}, "order"),
        ({"cursor": "?"}, "cursor"),
        ({"cursor": store.list(T, "ann", limit=1).next_cursor, "order": "created_at"}, "cursor"),
        ({"filter": {"a": {"b": 1}}}, "filter.a.b"),
    ):
        with pytest.raises(InvalidInput) as caught:
            store.list(T, "ann", **options)  # type: ignore[arg-type]
        assert caught.value.param == param


@pytest.mark.parametrize("key", [[2**63, 1], [1, 2**64 - 1], [True, 1], [1.5, 1], [1], ["a", 1]])
def test_a_forged_cursor_is_refused(store: Store, key: list[Any]) -> None:
    put(store, "ann", new("1"))
    with pytest.raises(InvalidInput) as caught:
        store.list(T, "ann", order="created_at", cursor=sealed(store, "created_at", key, "memories", T, "ann"))
    assert caught.value.param == "cursor"
    with pytest.raises(InvalidInput):
        store.users(T, cursor=sealed(store, "users", ["a\0"], "users", T))


def test_delete_where(store: Store) -> None:
    put(store, "ann", *(new(str(n), n, metadata={"n": n}) for n in range(6)))
    assert store.delete_where(T, "ann", {"n": {"gte": 2}}) == 4
    assert sorted(find(store, "ann")) == ["0", "1"]
    with pytest.raises(InvalidInput):
        store.delete_where(T, "ann", {})
    assert store.user(T, "ann").version == 10


def test_users_and_their_sizes(store: Store) -> None:
    for name in ("bob", "ann", "änne", "an", "Zoe", "erased"):
        put(store, name, new("1", text="äb", metadata={"k": 1}))
    store.append([Append("other", "ann", (new("1"),), issued_at=store._now())])
    store.erase_user(T, "erased")
    first = store.users(T, limit=3)
    assert [user.user_id for user in first.users] == ["Zoe", "an", "ann"]
    rest = store.users(T, limit=3, cursor=first.next_cursor)
    assert [user.user_id for user in rest.users] == ["bob", "änne"]
    assert rest.next_cursor is None
    assert [user.user_id for user in store.users(T, prefix="an").users] == ["an", "ann"]
    put(store, "an\U0010ffffx", new("1"))
    assert [user.user_id for user in store.users(T, prefix="an").users] == ["an", "ann", "an\U0010ffffx"]
    size = 3 + len('{"k":1}') + 4 * DIM
    assert store.user(T, "ann") == UserStats("ann", 1, 1, size, None, False)
    find(store, "ann")
    assert store.user(T, "ann") == UserStats("ann", 1, 1, size, "exact", True)


def test_the_least_recently_used_indexes_are_evicted_first(open_store: Callable[..., Store]) -> None:
    store = open_store(index_budget_bytes=11000)
    for name in ("a", "b", "c", "d"):
        put(store, name, *(new(str(n), n % DIM, text=name + str(n)) for n in range(40)))
    for name in ("a", "b", "a", "c"):
        assert len(find(store, name, k=50)) == 40
    assert [store.user(T, name).resident for name in "abcd"] == [True, False, True, False]
    assert store.resident.bytes <= 11000


def test_a_log_that_cannot_be_reached_is_unavailable() -> None:
    with pytest.raises(LogUnavailable):
        Store.open("postgresql://test@127.0.0.1:1/none", dim=DIM, model="fake", lock_timeout_s=1)


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_errors_survive_pickling(kind: type[errors.StoreError]) -> None:
    error = pickle.loads(pickle.dumps(kind("message", "a.b", "code")))
    assert (type(error), error.message, error.param, error.code) == (kind, "message", "a.b", "code")


def test_answers_survive_pickling_and_stay_frozen(store: Store) -> None:
    put(store, "ann", new("1", metadata={"a": [1]}, expires_at=store._now() + timedelta(days=1)), new("2", 1))
    request = Search(T, "ann", EYE[0], 2, {"a": {"exists": False}}, 0.5, True)
    (found,) = store.search([replace(request, filter=None, min_score=None, include_vectors=False)])
    assert isinstance(found, SearchResult)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(found, protocol)) == found
    assert copy(found.results[0]) == found.results[0]
    with pytest.raises(AttributeError):
        pickle.loads(pickle.dumps(found.results[0])).text = "other"
    again = pickle.loads(pickle.dumps(request))
    assert np.array_equal(again.vector, request.vector)
    assert replace(again, vector=request.vector) == request


def test_a_write_that_uses_no_newer_field_is_pickled_without_it() -> None:
    """So a process whose class lacks the newest fields can read it."""
    memory = NewMemory("1", "tea", EYE[0], {"a": 1}, given_vector=True)
    write = Append(T, "ann", (memory,), issued_at=datetime(2026, 1, 1, tzinfo=UTC), write_id="w")
    assert memory.__reduce__() == (NewMemory, ("1", "tea", memory.vector, {"a": 1}, None, False, True))
    assert write.__reduce__()[1][3:] == ("add", False, write.issued_at, "w")
    again = pickle.loads(pickle.dumps(replace(write, memories=(replace(memory, thread="t"),), duplicate_score=0.5)))
    (found,) = again.memories
    assert np.array_equal(found.vector, EYE[0])
    assert replace(found, vector=memory.vector, thread=None) == memory
    assert replace(again, memories=write.memories, duplicate_score=None) == write


def test_large_users_are_searched_through_the_graph(open_store: Callable[..., Store], rng: np.random.Generator) -> None:
    store = open_store(index=IndexOptions(switch=50))
    vectors = rng.normal(size=(200, DIM)).astype(np.float32)
    put(store, "ann", *(NewMemory(str(n), "x", vector, {"n": n}) for n, vector in enumerate(vectors)))
    first = store.search([Search(T, "ann", vectors[7], 5)])[0]
    while store.background_step():
        pass
    merged = store.search([Search(T, "ann", vectors[7], 5)])[0]
    assert isinstance(first, SearchResult)
    assert isinstance(merged, SearchResult)
    assert (first.index, merged.index) == ("exact", "hnsw")
    assert first.results == merged.results
    put(store, "ann", NewMemory("new", "x", vectors[7]))
    assert len(find(store, "ann", k=1000)) == 201


def test_an_answer_that_would_be_too_large_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_ANSWER", 1000)
    put(store, "ann", *(NewMemory(str(n), f"{n}" + 300 * "x", EYE[0] + n * EYE[1]) for n in range(4)))
    put(store, "bob", NewMemory("1", 5000 * "x", EYE[0]), NewMemory("2", "short", EYE[1]))
    asked = [Search(T, "ann", EYE[0], 3), Search(T, "ann", EYE[0], 4), Search(T, "bob", EYE[0], 1)]
    few, many, one = store.search([*asked, Search(T, "nobody", EYE[0], 9)])[:3]
    assert isinstance(few, SearchResult) and [memory.id for memory in few.results] == ["0", "1", "2"]
    assert isinstance(many, InvalidInput) and (many.field, many.code) == ("top_k", "answer_too_large")
    assert isinstance(one, SearchResult) and len(one.results[0].text) == 5000
    assert store.search(asked[:1]) == [few]
    found, missing = store.get_many(T, "ann", ["0", "1", "9", "2"])
    assert ([memory.id for memory in found], missing) == (["0", "1", "2"], ["9"])
    assert len(store.get_many(T, "bob", ["1"])[0]) == 1
    with pytest.raises(InvalidInput) as refused:
        store.get_many(T, "bob", ["1", "2"])
    assert (refused.value.field, refused.value.code) == ("ids", "answer_too_large")
    assert store.delete_many(T, "bob", ["1", "2"])[0] == 2
