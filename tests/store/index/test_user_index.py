"""The index alone: HNSW against brute force while rows are added, deleted, updated and filtered."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from store.index.matrix import BLOCK, normalised
from store.index.user_index import UserIndex
from store.log.reading import NEVER, Changes
from store.records import IndexOptions, Vector

DIM = 32


class Truth:
    """The rows that an index should hold, and the answers that it should give."""

    def __init__(self, rng: np.random.Generator, options: IndexOptions, dim: int = DIM) -> None:
        self.rng = rng
        self.dim = dim
        self.index = UserIndex(1, 0, dim, options)
        self.vectors: dict[int, Vector] = {}
        self.version = 0
        centres = rng.normal(size=(50, dim))
        self.centres = centres

    def draw(self, count: int) -> Vector:
        noise = self.rng.normal(size=(count, self.dim))
        return (self.centres[self.rng.integers(0, 50, count)] + 0.7 * noise).astype(np.float32)

    def add(self, count: int) -> None:
        first = max(self.vectors, default=0) + 1
        self.write(np.arange(first, first + count))

    def write(self, labels: np.ndarray) -> None:
        fresh = self.draw(len(labels))
        self.vectors.update(zip(labels.tolist(), fresh, strict=True))
        self.apply(labels, np.ones(len(labels), np.bool_), fresh)

    def delete(self, labels: np.ndarray) -> None:
        for label in labels.tolist():
            del self.vectors[label]
        self.apply(labels, np.zeros(len(labels), np.bool_), np.zeros((0, self.dim), np.float32))

    def apply(self, labels: np.ndarray, kept: np.ndarray, vectors: Vector) -> None:
        versions = np.arange(len(labels)) + self.version + 1
        expires = np.full(int(kept.sum()), NEVER)
        self.version += len(labels)
        self.index.apply(Changes(labels, versions, kept, expires, vectors))

    def fetch(self, labels: np.ndarray) -> Vector:
        return np.array([self.vectors[label] for label in labels.tolist()], np.float32)

    def settle(self) -> None:
        while self.index.maintain():
            pass

    def recall(self, queries: int = 50, k: int = 10, allowed: np.ndarray | None = None) -> float:
        labels = np.array(sorted(self.vectors) if allowed is None else allowed)
        matrix = normalised(self.fetch(labels))
        hit = wanted = 0
        for query in normalised(self.draw(queries)):
            scores = matrix @ query
            best = np.sort(scores)[-k:]
            hits = self.index.search(query, k, self.fetch, allowed)
            assert len(hits.labels) == min(k, len(labels))
            assert len(set(hits.labels.tolist())) == len(hits.labels)
            assert (np.diff(hits.scores) <= 0).all()
            true = dict(zip(labels.tolist(), scores.tolist(), strict=True))
            assert [true[label] for label in hits.labels.tolist()] == pytest.approx(hits.scores.tolist(), abs=2e-6)
            hit += int((hits.scores >= best[0] - 2e-6).sum())
            wanted += len(best)
        return hit / wanted


def test_exact_below_the_switch(rng: np.random.Generator) -> None:
    truth = Truth(rng, IndexOptions(switch=2000))
    truth.add(1500)
    truth.settle()
    assert truth.index.kind == "exact"
    assert truth.recall() == 1.0
    truth.delete(np.arange(1, 1000))
    truth.write(np.arange(1200, 1300))
    assert truth.recall() == 1.0
    truth.settle()
    assert truth.recall() == 1.0
    assert truth.index.live == 501


def test_a_graph_against_brute_force_from_its_first_row_to_its_rebuild(rng: np.random.Generator) -> None:
    truth = Truth(rng, IndexOptions(switch=500))
    truth.add(3000)
    assert truth.recall() == 1.0  # all rows are still in the exact tail
    for _ in range(5):
        truth.index.maintain()
    assert truth.index.kind == "hnsw"
    assert truth.recall() >= 0.98
    truth.settle()
    assert truth.recall() >= 0.98

    one_percent = rng.choice(3000, 30, replace=False) + 1
    assert truth.recall(allowed=one_percent) == 1.0  # few enough to be scanned
    half = rng.choice(3000, 1500, replace=False) + 1
    assert truth.recall(allowed=half) >= 0.98
    assert truth.recall(k=1000, queries=5) >= 0.98

    truth.delete(rng.choice(3000, 1500, replace=False) + 1)
    assert truth.recall() >= 0.98  # before the rebuild
    truth.settle()
    assert truth.recall() >= 0.98

    truth.write(np.array(sorted(truth.vectors)))
    assert truth.recall() >= 0.98
    truth.settle()
    assert truth.recall() >= 0.98
    assert truth.index.live == 1500


def test_a_filter_that_matches_thousands_searches_the_graph(rng: np.random.Generator) -> None:
    truth = Truth(rng, IndexOptions(switch=500), dim=16)
    truth.add(5000)
    truth.settle()
    scanned: list[int] = []

    def fetch(labels: np.ndarray) -> Vector:
        scanned.append(len(labels))
        return truth.fetch(labels)

    allowed = np.arange(1, 5001, 2)
    for query in normalised(truth.draw(20)):
        hits = truth.index.search(query, 10, fetch, allowed)
        assert len(hits.labels) == 10
        assert (hits.labels % 2 == 1).all()
    assert scanned == []


def test_changes_during_a_rebuild_are_not_lost(rng: np.random.Generator) -> None:
    truth = Truth(rng, IndexOptions(switch=200, step_s=0.0005))
    truth.add(1000)
    truth.settle()
    truth.delete(np.arange(1, 401))
    for step in range(60):
        truth.index.maintain()
        if step % 3 == 0:
            live = np.array(sorted(truth.vectors))
            truth.delete(rng.choice(live, 3, replace=False))
            truth.write(rng.choice(np.array(sorted(truth.vectors)), 3, replace=False))
            truth.add(4)
    assert truth.recall(queries=20) >= 0.98
    truth.settle()
    assert truth.recall(queries=20) >= 0.98
    assert truth.index.live == len(truth.vectors)


def test_a_user_that_has_become_small_is_exact_again(rng: np.random.Generator) -> None:
    truth = Truth(rng, IndexOptions(switch=200))
    truth.add(400)
    truth.settle()
    assert truth.index.kind == "hnsw"
    truth.delete(np.arange(1, 351))
    assert truth.recall(k=100) == 1.0
    truth.settle()
    assert truth.index.kind == "exact"
    assert truth.recall(k=100) == 1.0


def test_a_search_finds_k_rows_if_there_are_k(rng: np.random.Generator) -> None:
    truth = Truth(rng, IndexOptions(switch=50, m=2, ef_construction=4, ef=4))  # a graph that falls apart
    truth.add(600)
    truth.settle()
    truth.delete(rng.choice(600, 110, replace=False) + 1)
    for k in (1, 10, 300, 490, 10_000):
        truth.recall(queries=5, k=k)


def test_rows_in_several_blocks(rng: np.random.Generator) -> None:
    truth = Truth(rng, IndexOptions(switch=100_000), dim=4)
    for count in (1, 5, BLOCK - 7, 3, BLOCK, 10):
        truth.add(count)
    truth.delete(np.array([1, 2, BLOCK, BLOCK + 1, 2 * BLOCK]))
    assert truth.recall(queries=5) == 1.0
    query = normalised(truth.draw(1))[0]
    assert len(truth.index.search(query, 100_000, truth.fetch).labels) == len(truth.vectors)


def test_expired_rows_are_left_out_of_graph_and_tail(rng: np.random.Generator) -> None:
    index = UserIndex(1, 0, 4, IndexOptions(switch=10))
    vectors = rng.normal(size=(40, 4)).astype(np.float32)
    expires = np.where(np.arange(40) % 2 == 0, 1000, NEVER)
    index.apply(Changes(np.arange(30), np.arange(30) + 1, np.ones(30, np.bool_), expires[:30], vectors[:30]))
    while index.maintain():
        pass
    later = np.arange(30, 40)
    index.apply(Changes(later, later + 1, np.ones(10, np.bool_), expires[30:], vectors[30:]))
    index.expire(999)
    assert len(index.search(vectors[0], 100, lambda labels: vectors[labels]).labels) == 40
    index.expire(1000)
    found = index.search(vectors[0], 100, lambda labels: vectors[labels]).labels
    assert sorted(found.tolist()) == list(range(1, 40, 2))


def test_a_step_of_maintenance_is_short(rng: np.random.Generator) -> None:
    truth = Truth(rng, IndexOptions(switch=500, step_s=0.005), dim=64)
    truth.add(4000)
    took = []
    more = True
    while more:
        began = time.thread_time()
        more = truth.index.maintain()
        took.append(time.thread_time() - began)
    assert np.median(took) < 0.010
    assert np.quantile(took, 0.95) < 0.025


_MEASURE = """
import sys
import numpy as np
from store.index.user_index import UserIndex
from store.log.reading import NEVER, Changes
from store.records import IndexOptions

count, rows, dim = int(sys.argv[1]), int(sys.argv[2]), 128
part = min(rows, 500)
vectors = np.random.default_rng(0).normal(size=(part, dim)).astype("f4")

def fill(count, rows, options):
    indexes = [UserIndex(n, 0, dim, options) for n in range(count)]
    for index in indexes:
        for first in range(0, rows, part):
            labels = np.arange(first, first + part)
            kept = np.ones(part, bool)
            index.apply(Changes(labels, labels + 1, kept, np.full(part, NEVER), vectors + first))
            while index.maintain():
                pass
    return indexes

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

warm = fill(1, 500, IndexOptions(switch=100, ef_construction=20))
before = resident()
indexes = fill(count, rows, IndexOptions(ef_construction=20))
print(resident() - before, sum(index.bytes for index in indexes))
"""


@pytest.mark.parametrize(("count", "rows"), [(50, 500), (5000, 10), pytest.param(1, 20_000, marks=pytest.mark.slow)])
def test_reported_bytes_match_the_growth_of_the_process(count: int, rows: int) -> None:
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    command = [sys.executable, "-c", _MEASURE, str(count), str(rows)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    grown, counted = map(int, answer.stdout.split())
    assert 0.75 < counted / grown < 1.25, (grown, counted)  # allocators round sizes, and keep freed memory
