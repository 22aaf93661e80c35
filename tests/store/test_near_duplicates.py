"""Memories that are nearly the same: not added, or listed in groups, on both databases."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from store import Append, Appended, IndexOptions, InvalidInput, NewMemory, Store
from tests.store.conftest import DIM, Clock

T = "default"


def at(degrees: float) -> np.ndarray:
    """A vector at this angle. The cosine of 10 degrees is .985, that of 20 .940."""
    vector = np.zeros(DIM, np.float32)
    vector[:2] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return vector * 3


def new(id: str, degrees: float, **fields: Any) -> NewMemory:
    return NewMemory(id, f"text {id}", at(degrees), **fields)


def request(store: Store, *added: NewMemory, user: str = "ann", score: float | None = 0.98, **options: Any) -> Append:
    options = {"on_duplicate": "skip", "issued_at": store._now(), **options}
    return Append(T, user, added, duplicate_score=score, **options)


def put(store: Store, *added: NewMemory, **options: Any) -> list[tuple[str, str]]:
    """The ids and the statuses of added memories."""
    (result,) = store.append([request(store, *added, **options)])
    assert not isinstance(result, Exception), result
    return [(one.id, one.status) for one in result.memories]


@pytest.fixture(params=["exact", "hnsw"])
def store(request: pytest.FixtureRequest, open_store: Callable[..., Store]) -> Store:
    """A store whose users have a matrix, or a graph once background work was done."""
    return open_store(index=IndexOptions(switch=2 if request.param == "hnsw" else 50))


def settle(store: Store) -> None:
    while store.background_step():
        pass


def test_a_memory_that_is_near_another_one_is_skipped(store: Store) -> None:
    assert put(store, new("a", 0), new("b", 90), new("c", 180)) == [(id, "added") for id in "abc"]
    settle(store)
    assert put(store, new("d", 10)) == [("a", "unchanged")]
    assert put(store, new("e", 20)) == [("e", "added")]
    settle(store)
    assert put(store, new("f", 12)) == [("e", "unchanged")]  # the nearer one
    assert put(store, new("f", 12), score=None) == [("f", "added")]
    assert put(store, new("g", 270), user="bob") == [("g", "added")]
    assert store.get(T, "ann", "a").version == 1
    (result,) = store.append([request(store, new("x", 2))])
    assert not isinstance(result, Exception)
    assert (result.memories, result.version) == ([Appended("a", "unchanged", 1)], 5)


def test_a_memory_that_is_near_one_of_the_same_transaction_is_skipped(store: Store) -> None:
    assert put(store, new("a", 0), new("b", 5), new("c", 90), new("d", 8)) == [
        ("a", "added"),
        ("a", "unchanged"),
        ("c", "added"),
        ("a", "unchanged"),
    ]
    calls = [[request(store, new("e", 91))], [request(store, new("f", 200))], [request(store, new("g", 201))]]
    results = store.append_together(calls)
    found = [result[0].memories[0].id for result in results if not isinstance(result, Exception)]
    assert found == ["c", "f", "f"]


def test_a_call_that_fails_leaves_nothing_to_be_near_to(store: Store) -> None:
    put(store, new("taken", 300))
    wrong = [request(store, new("a", 0), NewMemory("taken", "other", at(40)))]
    (refused, added) = store.append_together([wrong, [request(store, new("b", 1))]])
    assert isinstance(refused, Exception)
    assert not isinstance(added, Exception)
    assert added[0].memories == [Appended("b", "added", 2)]


def test_a_vector_that_the_transaction_replaces_does_not_count(store: Store) -> None:
    put(store, new("a", 0))
    moved = NewMemory("a", "text new", at(90))
    calls = [
        [request(store, moved, upsert=True, on_duplicate="add", score=None)],
        [request(store, new("b", 1))],
        [request(store, new("c", 91))],
    ]
    results = store.append_together(calls)
    found = [result[0].memories[0].id for result in results if not isinstance(result, Exception)]
    assert found == ["a", "b", "a"]


def test_two_stores_that_add_at_once_add_one(open_store: Callable[..., Store]) -> None:
    """The index is brought up to date under the lock of the user, so the second sees what the first has committed."""
    one, other = open_store(), open_store()
    put(one, new("a", 0))
    put(other, new("b", 90))
    assert put(one, new("c", 45)) == [("c", "added")]
    assert put(other, new("d", 46)) == [("c", "unchanged")]
    assert put(one, new("e", 91)) == [("b", "unchanged")]
    other.delete(T, "ann", "c")
    assert put(one, new("f", 47)) == [("f", "added")]


def test_a_near_duplicate_lasts_as_long_and_is_of_the_thread(store: Store, clock: Clock) -> None:
    soon = clock.now + timedelta(seconds=60)
    put(store, new("a", 0, expires_at=soon), new("b", 90, thread="talk"))
    assert put(store, new("c", 1, expires_at=soon)) == [("a", "unchanged")]
    assert put(store, new("c", 1)) == [("c", "added")]
    assert put(store, new("d", 91, thread="talk")) == [("b", "unchanged")]
    assert put(store, new("d", 91)) == [("b", "unchanged")]
    assert put(store, new("d", 91, thread="else")) == [("d", "added")]
    clock.advance(61)
    assert put(store, new("e", 0, expires_at=clock.now + timedelta(seconds=5))) == [("c", "unchanged")]


def test_an_exact_duplicate_and_an_id_come_first(store: Store) -> None:
    put(store, new("a", 0), new("b", 15))
    (result,) = store.append([request(store, NewMemory("x", "text b", at(0)))])
    assert not isinstance(result, Exception) and result.memories == [Appended("b", "unchanged", 2)]
    assert put(store, new("b", 15)) == [("b", "unchanged")]
    assert put(store, NewMemory("b", "other", at(0)), upsert=True) == [("b", "updated")]


def test_a_call_that_is_sent_again_gets_its_first_answer(open_store: Callable[..., Store]) -> None:
    one, other = open_store(), open_store()
    put(one, new("a", 0))
    assert put(one, new("b", 1), write_id="w") == [("a", "unchanged")]
    one.delete(T, "ann", "a")
    assert put(other, new("b", 1), write_id="w") == [("a", "unchanged")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": 0.0}, "must be a number above 0, and at most 1"),
        ({"score": 1.1}, "must be a number above 0, and at most 1"),
        ({"score": "1"}, "must be a number above 0, and at most 1"),
        ({"on_duplicate": "add"}, "needs on_duplicate: skip"),
    ],
)
def test_a_wrong_score_is_refused(store: Store, options: dict[str, Any], message: str) -> None:
    (refused,) = store.append([request(store, new("a", 0), **options)])
    assert isinstance(refused, InvalidInput)
    assert (refused.field, refused.message) == ("duplicate_score", message)


def groups(store: Store, **options: Any) -> list[list[tuple[str, float | None]]]:
    """The ids and scores of all groups, read page by page."""
    found: list[list[tuple[str, float | None]]] = []
    cursor = None
    while True:
        page = store.duplicates(T, "ann", cursor=cursor, **options)
        found += [[(memory.id, memory.score) for memory in group] for group in page.groups]
        cursor = page.next_cursor
        if cursor is None:
            return found


def test_near_duplicates_are_listed_in_groups(store: Store) -> None:
    added = new("a", 0), new("b", 90), new("c", 12), new("d", 8), new("e", 180), new("f", 92), new("g", 15)
    put(store, *added, score=None)
    settle(store)
    cosines = {n: round(float(np.cos(np.radians(n))), 6) for n in (2, 8, 12)}
    expected = [[("a", None), ("d", cosines[8]), ("c", cosines[12])], [("b", None), ("f", cosines[2])]]
    assert groups(store, score=0.97) == expected  # g is near c and d, which are near a
    assert groups(store, score=0.97, limit=1) == expected
    assert groups(store, score=0.9999) == []
    assert store.duplicates(T, "ann", score=0.97, limit=2).next_cursor is not None
    assert store.duplicates(T, "nobody") == store.duplicates(T, "bob")
    store.delete(T, "ann", "a")
    cosines = {n: round(float(np.cos(np.radians(n))), 6) for n in (2, 3, 4)}
    assert groups(store, score=0.97) == [
        [("b", None), ("f", cosines[2])],
        [("c", None), ("g", cosines[3]), ("d", cosines[4])],
    ]
    assert store.user(T, "ann").memories == 6


def test_a_page_of_groups_looks_at_some_memories(open_store: Callable[..., Store], monkeypatch: Any) -> None:
    monkeypatch.setattr("store.searching.LOOKED_AT", 3)
    store = open_store()
    put(store, *(new(str(n), 40 * n) for n in range(7)), new("near", 241), score=None)
    first = store.duplicates(T, "ann", score=0.99)
    assert first.groups == [] and first.next_cursor is not None
    assert groups(store, score=0.99) == [[("6", None), ("near", 0.999848)]]


@pytest.mark.parametrize(
    ("options", "field"),
    [({"score": 0}, "score"), ({"score": 1.5}, "score"), ({"limit": 0}, "limit"), ({"cursor": "abc"}, "cursor")],
)
def test_a_wrong_option_of_the_list_is_named(store: Store, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        store.duplicates(T, "ann", **options)
    assert caught.value.field == field
