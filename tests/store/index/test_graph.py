"""The graph and the matrix alone: the guarantees that hnswlib itself does not give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from store.index.graph import Graph, overwrite_deleted
from store.index.matrix import BLOCK, Matrix, normalised
from store.records import IndexOptions, Vector

DIM = 16


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vector:
    return normalised(rng.normal(size=(300, DIM)).astype(np.float32))


def graph_of(vectors: Vector, **options: int) -> Graph:
    graph = Graph(DIM, IndexOptions(**options), capacity=0)
    graph.add(vectors)
    return graph


def test_a_graph_grows_beyond_its_capacity(vectors: Vector) -> None:
    graph = graph_of(vectors[:10])
    graph.add(vectors[10:])
    assert (graph.count, graph.live) == (300, 300)
    found = graph.nearest(vectors[299], 1)
    assert found is not None
    assert found.nodes.tolist() == [299]
    assert found.scores.tolist() == pytest.approx([1.0], abs=1e-6)


def test_k_may_exceed_ef(vectors: Vector) -> None:
    found = graph_of(vectors, ef=4).nearest(vectors[0], 300)
    assert found is not None
    assert sorted(found.nodes.tolist()) == list(range(300))


def test_a_graph_that_does_not_reach_k_nodes_says_so(vectors: Vector) -> None:
    graph = graph_of(vectors[:10])
    assert graph.nearest(vectors[0], 11) is None


def test_deleted_nodes_are_not_found(vectors: Vector) -> None:
    graph = graph_of(vectors)
    for node in range(0, 300, 2):
        graph.delete(node)
    assert (graph.count, graph.live, graph.dead) == (300, 150, 150)
    found = graph.nearest(vectors[0], 10)
    assert found is not None
    assert (found.nodes % 2 == 1).all()


def test_the_nearest_usable_nodes(vectors: Vector, rng: np.random.Generator) -> None:
    many = normalised(rng.normal(size=(5000, DIM)).astype(np.float32))
    graph = graph_of(many)
    usable = np.arange(5000) % 2 == 0
    found = graph.nearest_among(many[0], 5, usable, 2500)
    assert found is not None
    assert len(found.nodes) >= 5
    assert usable[found.nodes].all()
    few = np.zeros(5000, np.bool_)
    few[7] = True
    assert graph.nearest_among(many[0], 1, few, 1) is None  # the graph would be searched almost whole


def test_a_saved_graph_holds_no_vector_of_a_deleted_node(vectors: Vector, tmp_path: Path) -> None:
    graph = graph_of(vectors)
    for node in (5, 6):
        graph.delete(node)
    path = tmp_path / "graph"
    graph.save(path)
    assert vectors[5].tobytes() in path.read_bytes()
    overwrite_deleted(path, count=300, dim=DIM, m=16)
    written = path.read_bytes()
    assert [vectors[n].tobytes() in written for n in (4, 5, 6, 7)] == [True, False, False, True]
    loaded = Graph.load(path, DIM, IndexOptions(), count=300, dead=2)
    found = loaded.nearest(vectors[7], 298)
    assert found is not None
    assert sorted(found.nodes.tolist()) == [n for n in range(300) if n not in (5, 6)]


def test_a_file_of_another_layout_is_not_written_to(vectors: Vector, tmp_path: Path) -> None:
    path = tmp_path / "graph"
    graph_of(vectors).save(path)
    before = path.read_bytes()
    for wrong in ({"count": 299}, {"dim": DIM + 1}, {"m": 8}):
        with pytest.raises(OSError, match="layout"):
            overwrite_deleted(path, **{"count": 300, "dim": DIM, "m": 16, **wrong})
    assert path.read_bytes() == before
    with pytest.raises(RuntimeError):
        Graph.load(path, DIM, IndexOptions(), count=299, dead=0)


def test_a_matrix_keeps_its_rows_through_blocks_that_come_and_go(rng: np.random.Generator) -> None:
    vectors = normalised(rng.normal(size=(2 * BLOCK + 10, 4)).astype(np.float32))
    matrix = Matrix(4, first=100)
    for first, end in ((0, 1), (1, BLOCK - 1), (BLOCK - 1, 2 * BLOCK + 10)):
        matrix.append(3 * vectors[first:end])
    assert (matrix.first, matrix.end) == (100, 100 + len(vectors))
    rows = np.array([100, 99 + BLOCK, 100 + BLOCK, 109 + 2 * BLOCK])
    assert np.allclose(matrix.vectors(rows), vectors[rows - 100], atol=1e-6)
    matrix.wipe(np.array([100 + BLOCK]))
    vectors[BLOCK] = 0
    full = matrix.bytes
    matrix.drop_before(100 + BLOCK + 5)
    assert (matrix.first, matrix.bytes < full) == (100 + BLOCK, True)
    assert np.allclose(matrix.scores(vectors[3], 100 + BLOCK), vectors[BLOCK:] @ vectors[3], atol=1e-6)
    matrix.drop_before(matrix.end)
    assert (matrix.first, matrix.bytes, len(matrix.scores(vectors[3], matrix.end))) == (matrix.end, 0, 0)
