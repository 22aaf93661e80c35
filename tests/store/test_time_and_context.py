"""Searches within a time, with recency, and with the memories around each result, on both databases."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from store import Append, IndexOptions, InvalidInput, NewMemory, Search, SearchResult, Store
from tests.store.conftest import DIM, Clock

T = "default"
EYE = np.eye(DIM, dtype=np.float32)
DAY = timedelta(days=1)
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def towards(cosine: float) -> np.ndarray:
    """A vector with this cosine similarity to the first axis."""
    vector: np.ndarray = cosine * EYE[0] + np.sqrt(1 - cosine**2, dtype=np.float32) * EYE[1]
    return vector.astype(np.float32)


def put(store: Store, *added: NewMemory, user: str = "ann", **options: Any) -> None:
    result = store.append([Append(T, user, added, issued_at=store._now(), **options)])[0]
    assert not isinstance(result, Exception), result


def search(store: Store, user: str = "ann", k: int = 9, **options: Any) -> SearchResult:
    (result,) = store.search([Search(T, user, EYE[0], k, **options)])
    assert isinstance(result, SearchResult), result
    return result


def found(store: Store, **options: Any) -> list[tuple[str, float | None]]:
    return [(memory.id, memory.score) for memory in search(store, **options).results]


def ids(store: Store, **options: Any) -> list[str]:
    return [id for id, _ in found(store, **options)]


def context(result: SearchResult) -> dict[str, list[tuple[int, str]]]:
    """The offsets and ids of the memories around each result, by its id."""
    assert result.context is not None
    return {
        memory.id: [(near.offset, near.memory.id) for near in around]
        for memory, around in zip(result.results, result.context, strict=True)
    }


def talk(store: Store, cosines: list[float], thread: str = "talk", **fields: Any) -> None:
    """Add a thread of memories `TALK-0`, `TALK-1`, ... in one call."""
    put(store, *(NewMemory(f"{thread}-{n}", "t", towards(c), thread=thread, **fields) for n, c in enumerate(cosines)))


@pytest.fixture(params=["exact", "hnsw"])
def store(request: pytest.FixtureRequest, open_store: Callable[..., Store]) -> Store:
    """A store whose users have a matrix, or a graph once `settle` was called."""
    return open_store(index=IndexOptions(switch=2 if request.param == "hnsw" else 50))


def settle(store: Store) -> None:
    """Let the index be built and maintained."""
    search(store)
    while store.background_step():
        pass


def test_only_memories_of_the_time_are_found(store: Store) -> None:
    for n in range(5):
        put(store, NewMemory(str(n), "t", towards(0.9 - n / 10), created_at=BEGIN - n * DAY))
    settle(store)
    assert ids(store, since=BEGIN - 2 * DAY) == ["0", "1", "2"]
    assert ids(store, until=BEGIN - 2 * DAY) == ["3", "4"]
    assert ids(store, since=BEGIN - 2 * DAY, until=BEGIN) == ["1", "2"]
    assert ids(store, since=BEGIN - 3 * DAY, filter={"id": {"in": ["0", "3", "4"]}}) == ["0", "3"]
    assert ids(store, since=BEGIN + 9 * DAY) == []
    put(store, NewMemory("5", "t", towards(0.1), created_at=BEGIN - DAY))
    assert ids(store, since=BEGIN - 2 * DAY, until=BEGIN) == ["1", "2", "5"]
    put(store, NewMemory("1", "t", towards(0.8), created_at=BEGIN - 4 * DAY))
    assert ids(store, since=BEGIN - 2 * DAY, until=BEGIN) == ["2", "5"]


def test_recency_halves_scores_down_to_a_floor(store: Store, clock: Clock) -> None:
    clock.now = BEGIN
    for n, days in enumerate((0, 2, 5, 100)):
        put(store, NewMemory(str(n), "t", towards(0.5 + n / 10), happened_at=BEGIN - days * DAY))
    put(store, NewMemory("future", "t", towards(0.4), happened_at=BEGIN + 9 * DAY))
    settle(store)
    clock.now = BEGIN - timedelta(milliseconds=1)  # a search reads the clock once
    half_life_s = 10 * DAY.total_seconds()
    factors = {"3": 0.75, "2": 0.75, "1": 2**-0.2, "0": 1.0, "future": 1.0}
    assert found(store, recency_half_life_s=half_life_s) == [
        ("3", round(0.8 * factors["3"], 6)),
        ("2", round(0.7 * factors["2"], 6)),
        ("1", round(0.6 * factors["1"], 6)),
        ("0", 0.5),
        ("future", 0.4),
    ]
    (best,) = search(store, k=1, recency_half_life_s=half_life_s, explain=True).results
    assert best.scores == {"vector": 0.8, "recency": 0.75}


def test_recency_reorders_and_counts_for_the_least_score(store: Store, clock: Clock) -> None:
    clock.now = BEGIN
    put(store, NewMemory("old", "t", towards(0.6), created_at=BEGIN - 400 * DAY), NewMemory("new", "t", towards(0.5)))
    put(store, NewMemory("opposite", "t", towards(-0.6), created_at=BEGIN - 400 * DAY))
    settle(store)
    assert ids(store) == ["old", "new", "opposite"]
    assert ids(store, recency_half_life_s=86_400.0) == ["new", "old", "opposite"]
    assert ids(store, recency_half_life_s=86_400.0, min_score=0.46) == ["new"]
    assert found(store, recency_half_life_s=86_400.0)[2] == ("opposite", -0.8)


def test_each_result_has_the_memories_around_it(store: Store) -> None:
    talk(store, [0.1, 0.2, 0.9, 0.3, 0.1])
    talk(store, [0.0, 0.8], thread="other")
    put(store, NewMemory("alone", "t", towards(0.7)))
    settle(store)
    result = search(store, k=3, context=1)
    assert context(result) == {
        "talk-2": [(-1, "talk-1"), (1, "talk-3")],
        "other-1": [(-1, "other-0")],
        "alone": [],
    }
    assert context(search(store, k=1, context=20)) == {
        "talk-2": [(-2, "talk-0"), (-1, "talk-1"), (1, "talk-3"), (2, "talk-4")]
    }
    assert search(store, k=1, context=0).context is None
    assert search(store, k=1).context is None
    (near, *_) = search(store, k=1, context=1, include_vectors=True).context[0]  # type: ignore[index]
    assert near.memory.score is None and near.memory.vector is not None and near.memory.thread == "talk"


def test_a_memory_next_to_a_good_one_scores_higher(store: Store) -> None:
    talk(store, [0.0, 0.8, 0.2, 0.0])
    put(store, NewMemory("alone", "t", towards(0.3)))
    settle(store)
    assert ids(store, k=3) == ["talk-1", "alone", "talk-2"]
    expected = [
        ("talk-1", round(0.8 + 0.5 * 0.2 * 0.2, 6)),
        ("talk-2", round(0.2 + 0.5 * 0.8 * 0.8, 6)),
        ("talk-0", round(0.5 * 0.8, 6)),
        ("alone", 0.3),
        ("talk-3", round(0.5 * 0.2, 6)),
    ]
    assert found(store, context=0) == expected
    (best, *_) = search(store, context=0, explain=True).results
    assert best.scores == {"vector": 0.8, "context": 0.02}


def test_a_neighbour_that_is_no_candidate_becomes_one(open_store: Callable[..., Store]) -> None:
    store = open_store(index=IndexOptions(switch=1000))
    put(store, *(NewMemory(f"x{n}", "t", towards(0.5)) for n in range(200)))
    talk(store, [0.95, 0.1])
    assert ids(store, k=2) == ["talk-0", "x199"]
    assert found(store, k=2, context=0)[1] == ("talk-1", round(0.1 + 0.5 * 0.95 * 0.9, 6))


def test_context_is_live_and_of_the_user_and_matches(store: Store, clock: Clock) -> None:
    put(
        store,
        NewMemory("0", "t", towards(0.1), thread="talk", expires_at=clock.now + timedelta(seconds=60)),
        NewMemory("1", "t", towards(0.1), {"k": 1}, thread="talk"),
        NewMemory("2", "t", towards(0.1), {"k": 2}, thread="talk"),
        NewMemory("3", "t", towards(0.9), {"k": 1}, thread="talk"),
        NewMemory("4", "t", towards(0.1), {"k": 1}, thread="talk"),
    )
    put(store, NewMemory("theirs", "t", towards(0.9), thread="talk"), user="bob")
    settle(store)
    assert context(search(store, k=1, context=3))["3"] == [(-3, "0"), (-2, "1"), (-1, "2"), (1, "4")]
    assert context(search(store, k=1, context=3, filter={"k": 1}))["3"] == [(-2, "1"), (1, "4")]
    store.delete(T, "ann", "2")
    assert context(search(store, k=1, context=3))["3"] == [(-2, "0"), (-1, "1"), (1, "4")]
    clock.advance(61)
    assert context(search(store, k=1, context=3))["3"] == [(-1, "1"), (1, "4")]
    store.update(T, "ann", "1", thread=None)
    put(store, NewMemory("4", "t", towards(0.1), {"k": 1}, thread="else"))
    put(store, NewMemory("5", "t", towards(0.1), thread="talk"))
    assert context(search(store, k=1, context=3))["3"] == [(1, "5")]


def test_a_thread_is_in_the_order_of_its_times_and_of_additions(store: Store) -> None:
    talk(store, [0.1, 0.2])
    settle(store)
    put(store, NewMemory("late", "t", towards(0.9), thread="talk", created_at=BEGIN - DAY))
    assert context(search(store, k=1, context=2))["late"] == [(1, "talk-0"), (2, "talk-1")]
    put(store, NewMemory("between", "t", towards(0.1), thread="talk", created_at=BEGIN - timedelta(hours=1)))
    assert context(search(store, k=1, context=2))["late"] == [(1, "between"), (2, "talk-0")]
    store.update(T, "ann", "talk-0", text="changed", vector=towards(0.1))  # keeps its place
    assert context(search(store, k=1, context=3))["late"] == [(1, "between"), (2, "talk-0"), (3, "talk-1")]


def test_another_store_and_one_that_was_restarted_find_the_same(open_store: Callable[..., Store]) -> None:
    options: dict[str, Any] = {"index": IndexOptions(switch=20)}
    one, other = open_store(**options), open_store(**options)
    for n in range(8):
        talk(one, [0.1, 0.9 - n / 10, 0.2, 0.3, 0.1], thread=f"talk{n}", created_at=BEGIN - n * DAY)
    settle(one)
    asked: dict[str, Any] = {"k": 5, "context": 2, "since": BEGIN - 5 * DAY, "recency_half_life_s": 864_000.0}
    expected = context(search(one, **asked)), ids(one, **asked)
    settle(other)
    assert (context(search(other, **asked)), ids(other, **asked)) == expected
    one.close()
    again = open_store(**options, snapshot_dir=one.snapshots.folder.parent if one.snapshots else None)
    assert (context(search(again, **asked)), ids(again, **asked)) == expected
    assert again.snapshots is not None and again.snapshots.refused == 0


def test_a_hybrid_search_takes_time_and_context_into_account(store: Store) -> None:
    texts = ["I adopted a dog.", "What is its name?", "Biscuit.", "And thunder?", "He hides."]
    put(store, *(NewMemory(str(n), text, EYE[n + 1], thread="talk") for n, text in enumerate(texts)))
    put(store, NewMemory("old", "Biscuit recipe", EYE[6], created_at=BEGIN - 9 * DAY))
    settle(store)
    result = search(store, query="Biscuit", mode="hybrid", k=1, context=1, since=BEGIN - DAY)
    assert context(result) == {"2": [(-1, "1"), (1, "3")]}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"context": -1}, "context"),
        ({"context": 21}, "context"),
        ({"context": 1.5}, "context"),
        ({"recency_half_life_s": 0}, "recency_half_life_s"),
        ({"recency_half_life_s": float("nan")}, "recency_half_life_s"),
        ({"recency_half_life_s": "1"}, "recency_half_life_s"),
        ({"since": "2026-01-01"}, "since"),
        ({"until": BEGIN.replace(tzinfo=None)}, "until"),
        ({"since": BEGIN, "until": BEGIN}, "until"),
    ],
)
def test_a_wrong_option_is_named(store: Store, options: dict[str, Any], field: str) -> None:
    (refused,) = store.search([Search(T, "ann", EYE[0], **options)])
    assert isinstance(refused, InvalidInput)
    assert refused.field == field
