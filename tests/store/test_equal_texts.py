"""A user with thousands of equal memories: nothing is hidden in the graph, and all is forgotten as before."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from store import Append, IndexOptions, NewMemory, Search, SearchResult, Store
from store.index.matrix import normalised
from store.records import Memory
from tests.store.conftest import DIM, Clock

T = "default"
REPLIES = ["ok", "thanks", "yes", "no", "hello"]
FACTS = [f"fact {n}" for n in range(6)]


@pytest.fixture
def vectors() -> dict[str, np.ndarray]:
    """A vector for each text, of any length, as a model may make them."""
    drawn = np.random.default_rng(11).normal(size=(11, DIM)).astype(np.float32)
    return dict(zip([*REPLIES, *FACTS], 3 * normalised(drawn), strict=True))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/log.db"


def add(store: Store, memories: list[NewMemory]) -> None:
    (result,) = store.append([Append(T, "ann", tuple(memories), issued_at=store._now())])
    assert not isinstance(result, Exception), result


def settle(store: Store, vectors: dict[str, np.ndarray]) -> None:
    store.search([Search(T, "ann", vectors["ok"], 1)])
    while store.background_step():
        pass


def found(store: Store, vector: np.ndarray, k: int, filter: dict | None = None) -> list[Memory]:
    (result,) = store.search([Search(T, "ann", vector, k, filter)])
    assert isinstance(result, SearchResult), result
    assert result.index == "hnsw"
    return result.results


def texts(memories: list[Memory]) -> list[str]:
    return [memory.text for memory in memories]


def test_six_facts_after_2600_replies(
    open_store: Callable[..., Store], clock: Clock, vectors: dict[str, np.ndarray]
) -> None:
    options = {"index": IndexOptions(switch=2000), "snapshot_dir": None}
    store = open_store(**options)
    replies = [REPLIES[n % 5] for n in range(2600)]
    soon = clock.now + timedelta(seconds=3600)
    add(
        store,
        [
            NewMemory(str(n), text, vectors[text], {"odd": n % 2}, soon if text == "hello" else None)
            for n, text in enumerate(replies)
        ],
    )
    settle(store, vectors)
    add(store, [NewMemory(fact, fact, vectors[fact]) for fact in FACTS])
    settle(store, vectors)
    for fact in FACTS:
        (best,) = found(store, vectors[fact], 1)
        assert (best.text, best.score) == (fact, 1.0)
    assert [memory.id for memory in found(store, vectors["yes"], 3)] == ["2597", "2592", "2587"]
    odd = found(store, vectors["yes"], 3, {"odd": 1})
    assert [memory.id for memory in odd] == ["2597", "2587", "2577"]
    assert len(found(store, vectors["ok"], 3000)) == 2606

    store.delete(T, "ann", "2597")
    store.update(T, "ann", "2592", metadata={"odd": 5})
    assert [memory.id for memory in found(store, vectors["yes"], 3)] == ["2592", "2587", "2582"]
    assert len(found(store, vectors["ok"], 3000)) == 2605

    clock.advance(3600)
    assert set(texts(found(store, vectors["hello"], 3000))) == {*REPLIES, *FACTS} - {"hello"}
    assert len(found(store, vectors["hello"], 3000)) == 2605 - 520


def test_a_restart_with_equal_texts_loads_the_snapshot(
    open_store: Callable[..., Store], tmp_path: Path, vectors: dict[str, np.ndarray]
) -> None:
    options = {"index": IndexOptions(switch=200), "snapshot_dir": tmp_path / "snapshots"}
    store = open_store(**options)
    add(store, [NewMemory(str(n), REPLIES[n % 5], vectors[REPLIES[n % 5]]) for n in range(400)])
    add(store, [NewMemory(fact, fact, vectors[fact]) for fact in FACTS])
    settle(store, vectors)
    for fact in FACTS[:3]:
        store.delete(T, "ann", fact)
    store.delete(T, "ann", "399")
    expected = [texts(found(store, vector, 500)) for vector in vectors.values()]
    store.close()
    again = open_store(**options)
    assert [texts(found(again, vector, 500)) for vector in vectors.values()] == expected
    assert again.snapshots is not None
    assert again.snapshots.refused == 0
    for fact in FACTS[:3]:
        unit = normalised(vectors[fact][None, :])[0]
        assert not [p for p in tmp_path.rglob("*") if p.is_file() and unit.tobytes() in p.read_bytes()]
    add(again, [NewMemory("late", "hello", vectors["hello"])])
    assert [memory.id for memory in found(again, vectors["hello"], 2)] == ["late", "394"]
    again.delete_where(T, "ann", {"text": {"contains": "hello"}})
    assert "hello" not in texts(found(again, vectors["hello"], 500))


def test_every_sentence_among_replies_finds_itself(open_store: Callable[..., Store]) -> None:
    rng = np.random.default_rng(2)
    store = open_store(index=IndexOptions(switch=2000), snapshot_dir=None)
    sentences, replies = rng.normal(size=(2500, DIM)).astype(np.float32), rng.normal(size=(10, DIM)).astype(np.float32)
    new = [NewMemory(f"s{n}", f"sentence {n}", vector) for n, vector in enumerate(sentences)]
    new += [NewMemory(f"r{n}", f"reply {n % 10}", replies[n % 10]) for n in range(3000)]
    mixed = rng.permutation(5500)
    for start in range(0, 5500, 500):
        add(store, [new[n] for n in mixed[start : start + 500]])
    store.search([Search(T, "ann", sentences[0], 1)])
    while store.background_step():
        pass
    results = store.search([Search(T, "ann", vector, 1) for vector in sentences])
    assert [result.results[0].id for result in results if isinstance(result, SearchResult)] == [
        f"s{n}" for n in range(2500)
    ]


def test_a_restart_with_nearly_equal_texts_loads_the_snapshot(open_store: Callable[..., Store], tmp_path: Path) -> None:
    """Most of the memories have no node in the graph: the snapshot has their vectors, except for deleted ones."""
    rng = np.random.default_rng(4)
    vectors = normalised((rng.normal(size=DIM) + 0.01 * rng.normal(size=(400, DIM))).astype(np.float32))
    options = {"index": IndexOptions(switch=200), "snapshot_dir": tmp_path / "snapshots"}
    store = open_store(**options)
    for start in range(0, 400, 20):
        part = range(start, start + 20)
        add(store, [NewMemory(str(n), f"reminder at {n}", vectors[n]) for n in part])
        store.search([Search(T, "ann", vectors[0], 1)])
        while store.background_step():
            pass
    store.delete(T, "ann", "390")
    expected = [[memory.id for memory in found(store, vector, 20)] for vector in vectors[::7]]
    matrix = vectors[[n for n in range(400) if n != 390]].astype(np.float64)
    assert [memory.score for memory in found(store, vectors[391], 20)] == pytest.approx(
        np.sort(matrix @ vectors[391])[::-1][:20], abs=2e-6
    )
    store.close()
    graph, rows = ((tmp_path / "snapshots" / "0" / f"1-0-401.{suffix}").read_bytes() for suffix in ("hnsw", "rows"))
    assert [vectors[n].tobytes() in graph + rows for n in (389, 390, 391)] == [True, False, True]
    assert len(rows) > 4 * DIM * 200  # the crowd is there
    again = open_store(**options)
    assert [[memory.id for memory in found(again, vector, 20)] for vector in vectors[::7]] == expected
    assert again.snapshots is not None
    assert again.snapshots.refused == 0
