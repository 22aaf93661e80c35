"""Equal vectors share a node of the graph: nothing is hidden, and ties are ordered by age."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from store.index import body
from store.index.body import Body, Keys
from store.index.graph import Graph
from store.index.matrix import normalised
from store.index.user_index import UserIndex
from store.log.reading import NEVER, Changes
from store.records import IndexOptions, Vector

DIM = 16


def body_of(vectors: Vector) -> Body:
    made = Body(Graph(vectors.shape[1], IndexOptions(), capacity=0))
    made.add(np.arange(len(vectors)), vectors)
    return made


def found(made: Body, query: Vector, k: int) -> list[int]:
    nearest = made.nearest(query, k)
    assert nearest is not None
    return sorted(nearest.rows.tolist())


def index_of(vectors: Vector, dim: int) -> UserIndex:
    """An index of all vectors in a graph, with their positions as labels."""
    index = UserIndex(1, 0, dim, IndexOptions(switch=100))
    for start in range(0, len(vectors), 500):
        part = vectors[start : start + 500]
        labels = np.arange(start, start + len(part))
        index.apply(Changes(labels, labels + 1, np.ones(len(part), np.bool_), np.full(len(part), NEVER), part))
        while index.maintain():
            pass
    assert index.kind == "hnsw"
    return index


def no_fetch(labels: Any) -> Vector:
    raise AssertionError("the graph should have led to the rows")


def recall(index: UserIndex, vectors: Vector, queries: Vector) -> float:
    hit = 0
    for query in queries:
        scores = normalised(vectors) @ query
        hits = index.search(query, 10, no_fetch)
        hit += int((scores[hits.labels] >= np.sort(scores)[-10] - 2e-6).sum())
    return hit / (10 * len(queries))


@pytest.fixture
def three(rng: np.random.Generator) -> Vector:
    return normalised(rng.normal(size=(3, DIM)).astype(np.float32))


def test_equal_vectors_share_a_node(three: Vector) -> None:
    made = body_of(three[[0, 1, 0, 0, 2, 1]])
    assert (made.graph.count, made.graph.live, made.live) == (3, 3, 6)
    assert made.same(np.arange(6)).tolist() == [0, 1, 0, 0, 2, 1]
    made.add(np.array([7, 9]), three[[0, 2]])
    assert (made.graph.count, made.live) == (3, 8)
    assert np.array_equal(made.vectors(np.array([9, 0, 4])), three[[2, 0, 2]])


def test_the_newest_of_equal_rows_are_found_and_as_many_as_exist(three: Vector) -> None:
    made = body_of(np.repeat(three, 40, axis=0))
    assert found(made, three[1], 1) == [79]
    assert [row for row in found(made, three[1], 3) if 40 <= row < 80] == [77, 78, 79]
    assert set(found(made, three[1], 41)) >= set(range(40, 80))
    assert found(made, three[1], 1000) == list(range(120))


def test_a_node_is_deleted_with_its_last_row(three: Vector) -> None:
    made = body_of(three[[0, 0, 0, 1]])
    made.delete(np.array([1]))
    assert (found(made, three[0], 10), made.graph.live) == ([0, 2, 3], 2)
    made.delete(np.array([0]))
    assert found(made, three[0], 10) == [2, 3]
    made.delete(np.array([2]))
    assert (found(made, three[0], 10), made.graph.live, made.live) == ([3], 1, 1)
    assert made.dead_share == 0.75


def test_a_vector_that_is_added_again_gets_its_old_node(three: Vector) -> None:
    """Otherwise a memory that is written again and again would fill the graph with equal dead nodes."""
    made = body_of(three)
    for row in range(3, 500):
        made.delete(np.array([row - 3]))
        made.add(np.array([row]), three[[row % 3]])
    assert (made.graph.count, made.graph.dead, made.live) == (3, 0, 3)
    assert found(made, three[0], 3) == [497, 498, 499]


def test_equal_rows_that_are_added_together_get_a_deleted_node(three: Vector) -> None:
    made = body_of(three)
    made.delete(np.array([1]))
    made.add(np.array([3, 4, 5]), three[[1, 0, 1]])
    assert (made.graph.count, made.graph.dead, made.live) == (3, 0, 5)
    assert made.same(np.array([3, 4, 5])).tolist() == [1, 0, 1]
    assert found(made, three[1], 5) == [0, 2, 3, 4, 5]


def test_vectors_with_the_same_hash_stay_apart(three: Vector, monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def digest(self) -> bytes:
            return bytes(8)

    monkeypatch.setattr(body, "blake2b", Constant)
    made = body_of(three[[0, 1, 2, 2]])
    assert made.same(np.arange(4)).tolist() == [0, 1, 2, 2]
    made.add(np.array([4, 5]), three[[2, 1]])
    assert made.same(np.array([4, 5])).tolist() == [2, 3]
    made.delete(np.array([5]))
    made.add(np.array([6]), three[[0]])  # the deleted node has the same hash
    assert (made.same(np.array([6])).tolist(), made.graph.live, made.graph.dead) == ([4], 4, 1)
    assert found(made, three[0], 10) == [0, 1, 2, 3, 4, 6]


def test_usable_rows_of_nodes_that_others_share(rng: np.random.Generator) -> None:
    vectors = normalised(rng.normal(size=(2000, DIM)).astype(np.float32))
    made = body_of(np.concatenate([vectors, vectors]))
    usable = np.arange(4000) % 4 < 2
    usable[[0, 2000]] = False
    nearest = made.nearest_among(vectors[1], 3, usable)
    assert nearest is not None
    assert usable[nearest.rows].all()
    assert {1, 2001} <= set(nearest.rows.tolist())
    usable[2001] = False
    nearest = made.nearest_among(vectors[1], 3, usable)
    assert nearest is not None
    assert 1 in nearest.rows and 2001 not in nearest.rows


def test_keys_are_found_before_and_after_they_are_merged(rng: np.random.Generator) -> None:
    keys = Keys(np.zeros(0, np.int64), np.zeros(0, np.int32))
    put: dict[int, int] = {}
    for node, key in enumerate(rng.integers(-1500, 1500, 6000).tolist()):
        keys.put(key, node)
        put[key] = node
    assert {key: keys.find(key) for key in put} == put
    assert keys.find(10_000) is None
    ordered, nodes = keys.arrays()
    assert dict(zip(ordered.tolist(), nodes.tolist(), strict=True)) == put
    assert ordered.tolist() == sorted(put)


def test_six_facts_among_thousands_of_equal_replies_are_found(rng: np.random.Generator) -> None:
    replies, facts = (normalised(rng.normal(size=(n, 384)).astype(np.float32)) for n in (5, 6))
    vectors = np.concatenate([np.tile(replies, (520, 1)), facts])
    index = index_of(vectors, 384)
    for number, fact in enumerate(facts):
        hits = index.search(fact, 1, no_fetch)
        assert (hits.labels.tolist(), hits.scores.tolist()) == ([2600 + number], [1.0])
    assert index.search(replies[2], 4, no_fetch).labels.tolist() == [2597, 2592, 2587, 2582]
    assert len(index.search(facts[0], 2606, no_fetch).labels) == 2606
    assert recall(index, vectors, facts) == 1.0


def test_recall_with_many_copies_of_few_vectors(rng: np.random.Generator) -> None:
    sentences, replies = (normalised(rng.normal(size=(n, 32)).astype(np.float32)) for n in (2500, 10))
    vectors = np.concatenate([sentences, np.repeat(replies, 300, axis=0)])[rng.permutation(5500)]
    index = index_of(vectors, 32)
    for query in sentences[::10]:
        assert index.search(query, 1, no_fetch).scores.tolist() == [1.0]
    noisy = normalised(sentences[:200] + 0.1 * rng.normal(size=(200, 32)).astype(np.float32))
    assert recall(index, vectors, np.concatenate([noisy, replies])) >= 0.99


POOL = normalised(np.random.default_rng(5).normal(size=(6, 4)).astype(np.float32))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), min_size=1, max_size=8)),
        st.tuples(st.just("delete"), st.lists(st.integers(1, 30), min_size=1, max_size=8)),
        st.tuples(st.just("maintain"), st.integers(1, 40)),
        st.tuples(st.just("restart"), st.none()),
        st.tuples(st.just("search"), st.tuples(st.integers(0, 5), st.sampled_from([1, 2, 5, 100]), st.booleans())),
    ),
    min_size=5,
    max_size=60,
)


@pytest.mark.parametrize("crowd", [64, 2])
def test_every_answer_is_that_of_a_sorted_list(crowd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal scores are ordered by version, wherever the rows are. With a `CROWD` of 2 most rows join the crowd."""
    monkeypatch.setattr(body, "CROWD", crowd)
    monkeypatch.setattr(body, "NEAR", -1.0)
    settings(deadline=None, max_examples=100, phases=[Phase.reuse, Phase.generate])(given(steps)(_run))()


def _run(steps: list[Any]) -> None:
    index = UserIndex(1, 0, 4, IndexOptions(switch=4, step_s=0.001))
    rows: dict[int, tuple[int, int]] = {}  # version and position in the pool, by label
    version = 0

    def fetch(labels: Any) -> Vector:
        return POOL[[rows[label][1] for label in labels.tolist()]]

    for kind, argument in [*steps, ("search", (0, 100, False))]:
        if kind in ("write", "delete"):
            written = dict(argument) if kind == "write" else dict.fromkeys(set(argument) & set(rows))
            if not written:
                continue
            for label in written:
                version += 1
                if kind == "write":
                    rows[label] = version, written[label]
                else:
                    del rows[label]
            labels = np.array(list(written))
            vectors = POOL[list(written.values())] if kind == "write" else np.zeros((0, 4), np.float32)
            versions = np.arange(version - len(labels), version) + 1
            kept = np.full(len(labels), kind == "write")
            index.apply(Changes(labels, versions, kept, np.full(len(vectors), NEVER), vectors))
        elif kind == "maintain":
            for _ in range(argument):
                index.maintain()
        elif kind == "restart":
            state = index.snapshot()
            if state is not None:
                made, labels, expires, alive = state
                restored = Body.restore(made.graph, made.arrays(), alive.copy())
                fresh = UserIndex(1, 0, 4, IndexOptions(switch=4, step_s=0.001))
                fresh.restore(restored, labels.copy(), expires.copy(), alive.copy(), index.version)
                index = fresh
        else:
            query, k, only_odd = argument
            matching = [label for label in rows if not only_odd or label % 2]
            scores = (POOL @ POOL[query].astype(np.float64)).round(5)
            matching.sort(key=lambda label: (-scores[rows[label][1]], -rows[label][0]))
            allowed = np.array(matching, np.int64) if only_odd else None
            hits = index.search(POOL[query], k, fetch, allowed)
            assert hits.labels.tolist() == matching[:k]
            assert index.live == len(rows)


def near(vectors: Vector, distance: float, rng: np.random.Generator) -> Vector:
    noise = rng.normal(size=vectors.shape) / np.sqrt(vectors.shape[1])
    return normalised((vectors + distance * noise).astype(np.float32))


@pytest.mark.parametrize("distance", [1e-6, 0.01, 0.1, 0.3])
def test_recall_among_groups_of_nearly_equal_vectors(rng: np.random.Generator, distance: float) -> None:
    """Without the crowd it is between 0.4 and 0.8, and lower if the groups come first."""
    groups, facts = (normalised(rng.normal(size=(n, 128)).astype(np.float32)) for n in (10, 100))
    vectors = np.concatenate([near(np.tile(groups, (300, 1)), distance, rng), facts])
    index = index_of(vectors, 128)
    for query in facts:
        assert index.search(query, 1, no_fetch).scores.tolist() == [1.0]
    queries = np.concatenate([near(facts, 0.5, rng), near(groups, 0.1, rng)])
    assert recall(index, vectors, queries) >= 0.99


def test_a_row_in_the_crowd_is_deleted_and_erased(rng: np.random.Generator) -> None:
    vectors = near(np.tile(normalised(rng.normal(size=(1, DIM)).astype(np.float32)), (100, 1)), 0.01, rng)
    made = body_of(vectors[:70])
    made.add(np.arange(70, 100), vectors[70:])
    assert made.graph.count == 70
    assert np.array_equal(made.vectors(np.array([99, 3, 70])), vectors[[99, 3, 70]])
    made.delete(np.array([80, 2]))
    assert found(made, vectors[0], 100) == [row for row in range(100) if row not in (2, 80)]
    arrays = made.arrays()
    assert vectors[80].tobytes() not in arrays.crowd.tobytes()
    alive = np.array([row not in (2, 80) for row in range(100)])
    again = Body.restore(made.graph, arrays, alive)
    assert found(again, vectors[0], 100) == np.flatnonzero(alive).tolist()
    assert (again.live, again.dead_share, again.bytes) == (98, made.dead_share, pytest.approx(made.bytes, rel=0.01))
    made.delete(np.flatnonzero(alive)[:-3])
    assert (found(made, vectors[0], 5), made.graph.live) == ([97, 98, 99], 0)
