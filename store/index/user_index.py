"""One user's index: a cache of the log's vectors that answers nearest-neighbour questions.

Up to `IndexOptions.switch` memories it is an exact matrix; above, an HNSW graph (hnswlib) for the older rows and an
exact tail for the newer ones, which `fold` moves into the graph in small steps.

Guarantees: it holds nothing that the log did not, is never repaired (it is dropped and loaded anew), and an answer
holds min(k, rows that match) rows. Rows are numbered in the order of the log's versions, so that of two rows the one
with the greater number is the newer. A row's vector never changes: an update is a new row, so hnswlib never meets a
label twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import hnswlib
import numpy as np
import numpy.typing as npt

from store.log.reading import NEVER, Changes
from store.records import IndexOptions, Vector

Rows = npt.NDArray[np.int64]
FilterKey = bytes
Fetch = Callable[[Rows], Vector]
"""From labels (n,) to the log's vectors (n, dim) float32, as the model made them."""

BLOCK = 4096  # rows of the tail that are allocated, and freed, together
_EMPTY = np.zeros(0, np.int64)
_EXACT_SCAN = 2000  # so many rows of the graph are fetched and scanned rather than searched for
_FILTERS = 8
_PRODUCT = 400_000  # numbers a matrix product: above, OpenBLAS takes all cores, and waits for them where they are busy
_TIE = 2e-6  # scores this near round alike


class Hits(NamedTuple):
    """labels (n,) int64 and scores (n,) float64 in [-1, 1], rounded to six decimals, best first, ties by newest."""

    labels: Rows
    scores: npt.NDArray[np.float64]


class Graph:
    """An hnswlib index whose labels are row numbers, with what hnswlib does not know of itself."""

    __slots__ = ("count", "dead", "dim", "hnsw", "options")

    def __init__(self, dim: int, options: IndexOptions, capacity: int) -> None:
        self.dim = dim
        self.options = options
        self.count = 0
        self.dead = 0
        self.hnsw = hnswlib.Index("ip", dim)
        self.hnsw.init_index(
            max(capacity, 16), M=options.m, ef_construction=options.ef_construction, allow_replace_deleted=False
        )
        self.hnsw.set_num_threads(1)

    @classmethod
    def load(cls, path: str, dim: int, options: IndexOptions, *, count: int, dead: int) -> Graph:
        """Read what hnswlib's save_index wrote, from a file that was verified.

        Raises:
            RuntimeError: hnswlib refuses it, or it holds another number of rows.
        """
        graph = cls.__new__(cls)
        graph.dim, graph.options, graph.count, graph.dead = dim, options, count, dead
        graph.hnsw = hnswlib.Index("ip", dim)
        graph.hnsw.load_index(path, max_elements=count + count // 16)
        graph.hnsw.set_num_threads(1)
        if graph.hnsw.get_current_count() != count:
            raise RuntimeError("The graph holds another number of rows than its snapshot says.")
        return graph

    @property
    def live(self) -> int:
        """Rows that a search can find."""
        return self.count - self.dead

    @property
    def bytes(self) -> int:
        """Memory that hnswlib 0.8.0 holds, by its allocations: level 0, upper levels, locks, levels, look-up table."""
        m, capacity = self.options.m, self.hnsw.get_max_elements()
        level0 = 4 * self.dim + 8 + 4 * 2 * m + 4
        upper = (4 * m + 4) / (m - 1) + 16
        return int(capacity * (level0 + 8 + 40 + 4 + 2) + self.count * (upper + 48)) + 65_536 * 40

    def add(self, rows: Rows, vectors: Vector) -> None:
        """Add rows with L2-normalised vectors (n, dim)."""
        if self.count + len(rows) > self.hnsw.get_max_elements():
            self.hnsw.resize_index(max(self.count + len(rows), self.count + self.count // 8))
        self.hnsw.add_items(vectors, rows, num_threads=1)
        self.count += len(rows)

    def bury(self, rows: Rows) -> None:
        """Hide rows from searches."""
        for row in rows.tolist():
            self.hnsw.mark_deleted(row)
        self.dead += len(rows)

    def nearest(self, query: Vector, k: int) -> tuple[Rows, npt.NDArray[np.float32]] | None:
        """Rows and scores of the k nearest; None where the graph does not lead to k rows."""
        self.hnsw.set_ef(max(self.options.ef, k))
        try:
            rows, distances = self.hnsw.knn_query(query, k=k, num_threads=1)
        except RuntimeError:  # "Cannot return the results in a contiguous 2D array": fewer than k were reached
            return None
        return rows[0].astype(np.int64), 1.0 - distances[0]

    def vectors(self, rows: Rows) -> Vector:
        """(n, dim) float32, L2-normalised. Slow: some 20 us a row."""
        found: Vector = np.asarray(self.hnsw.get_items(rows, return_type="numpy"), np.float32)
        return found


class _Rebuild:
    """A graph or, for a user that has become small, a matrix in the making: from the live rows of the old graph."""

    __slots__ = ("at", "graph", "parts", "rows")

    def __init__(self, graph: Graph | None) -> None:
        self.graph = graph
        self.at = 0  # rows of the old graph below this number are taken over
        self.rows: list[Rows] = []  # the old numbers of what was taken
        self.parts: list[Vector] = []


class UserIndex:
    """The vectors of one user's live memories, L2-normalised, with their labels."""

    __slots__ = (
        "_alive",
        "_base",
        "_blocks",
        "_dead",
        "_expires",
        "_folded",
        "_graph",
        "_labels",
        "_max_label",
        "_next_expiry",
        "_options",
        "_rebuild",
        "_row_s",
        "_rows",
        "dim",
        "epoch",
        "filters",
        "uid",
        "version",
    )

    def __init__(self, uid: int, epoch: int, dim: int, options: IndexOptions) -> None:
        self.uid = uid
        self.epoch = epoch
        self.dim = dim
        self.version = 0
        self.filters: dict[FilterKey, tuple[int, Rows]] = {}  # least recently used first
        self._options = options
        self._rows = 0
        self._dead = 0
        self._folded = 0  # rows below are in the graph, or were dead when their turn came
        self._base = 0  # number of the first row in `_blocks`
        self._labels = np.zeros(0, np.int64)
        self._expires = np.zeros(0, np.int64)
        self._alive = np.zeros(0, np.bool_)
        self._blocks: list[Vector] = []  # (BLOCK, dim) each; the last may be shorter
        self._graph: Graph | None = None
        self._rebuild: _Rebuild | None = None
        self._next_expiry = int(NEVER)
        self._max_label = 0
        self._row_s = 0.0005  # what adding a row to the graph takes, measured as it goes

    @property
    def kind(self) -> Literal["exact", "hnsw"]:
        """How the older rows are searched."""
        return "exact" if self._graph is None else "hnsw"

    @property
    def live(self) -> int:
        """Rows that a search can find."""
        return self._rows - self._dead

    @property
    def bytes(self) -> int:
        """Memory that this index holds."""
        size = self._labels.nbytes + self._expires.nbytes + self._alive.nbytes + 1500
        size += sum(block.nbytes + 120 for block in self._blocks)
        size += sum(labels.nbytes + 300 for _, labels in self.filters.values())
        graphs = (self._graph, self._rebuild.graph if self._rebuild else None)
        return size + sum(graph.bytes for graph in graphs if graph is not None)

    def apply(self, changes: Changes) -> None:
        """Take in what comes next in the log after `self.version`."""
        if len(changes.labels):
            if int(changes.labels.min()) <= self._max_label:  # else they are all new: labels only grow
                rows = np.flatnonzero(np.isin(self._labels[: self._rows], changes.labels))
                self._bury(rows[self._alive[rows]])
            self._add(changes.labels[changes.kept], changes.expires, changes.vectors)
            self.version = int(changes.versions[-1])

    def remember(self, filter: FilterKey, labels: Rows) -> None:
        """Keep the labels that match a filter at this version; the filters that were used last are kept."""
        self.filters[filter] = self.version, labels
        while len(self.filters) > _FILTERS:
            del self.filters[next(iter(self.filters))]

    def expire(self, now: int) -> None:
        """Leave out the rows whose time is over, `now` in microseconds."""
        if now < self._next_expiry:
            return
        alive = self._alive[: self._rows]
        self._bury(np.flatnonzero(alive & (self._expires[: self._rows] <= now)))
        left = self._expires[: self._rows][alive]
        self._next_expiry = int(left.min()) if len(left) else int(NEVER)

    def search(self, query: Vector, k: int, fetch: Fetch, allowed: Rows | None = None) -> Hits:
        """The k nearest rows to `query: (dim,) float32, L2-normalised`, among the labels `allowed` where given."""
        usable = self._alive[: self._rows]
        if allowed is not None:
            usable = usable & np.isin(self._labels[: self._rows], allowed)
        tail = np.flatnonzero(usable[self._folded :]) + self._folded
        scores = self._tail_scores(query)[tail - self._folded]
        if self._graph is not None:
            found, near = self._search_graph(query, k, usable[: self._folded], fetch, allowed is not None)
            tail, scores = np.concatenate([found, tail]), np.concatenate([near, scores])
        return self._best(tail, scores, k)

    def maintain(self) -> bool:
        """Do one step of background work, some `step_s` long. True where more is waiting."""
        options = self._options
        if self._rebuild is not None:
            self._continue_rebuild(self._rebuild)
            return True
        if self._graph is None:
            if self.live > options.switch:
                self._graph = Graph(self.dim, options, self.live + self.live // 16)
            elif self._dead > 64 and self._dead > self._rows * options.max_deleted_share:
                self._compact()
                return False
            else:
                return False
        graph = self._graph
        if self.live <= options.switch // 2:
            self._rebuild = _Rebuild(None)
            return True
        if graph.dead > graph.count * options.max_deleted_share:
            self._rebuild = _Rebuild(Graph(self.dim, options, graph.live + graph.live // 16))
            return True
        if self._folded < self._rows:
            rows, self._folded = self._slice(self._folded, self._rows)
            if len(rows):
                self._add_to(graph, rows, self._tail_vectors(rows))
            while self._folded - self._base >= BLOCK:
                del self._blocks[0]
                self._base += BLOCK
            if self._folded == self._rows:
                self._blocks, self._base = [], self._rows
        return self._folded < self._rows

    def snapshot(self) -> tuple[Graph, Rows, Rows, npt.NDArray[np.bool_]] | None:
        """The graph with the labels, expiries and alive flags of its rows; None while there is no whole graph."""
        if self._graph is None or self._rebuild is not None or self._folded < self._rows:
            return None
        n = self._rows
        return self._graph, self._labels[:n], self._expires[:n], self._alive[:n]

    def restore(self, graph: Graph, labels: Rows, expires: Rows, alive: npt.NDArray[np.bool_], version: int) -> None:
        """Begin with what `snapshot` gave, instead of from nothing."""
        self._graph, self._labels, self._expires, self._alive, self.version = graph, labels, expires, alive, version
        self._rows = self._folded = self._base = len(labels)
        self._dead = int(len(alive) - alive.sum())
        self._max_label = int(labels.max(initial=0))
        self._next_expiry = int(expires[alive].min(initial=NEVER))

    # The exact part

    def _add(self, labels: Rows, expires: Rows, vectors: Vector) -> None:
        count = len(labels)
        if count == 0:
            return
        first, self._rows = self._rows, self._rows + count
        if self._rows > len(self._labels):
            capacity = self._rows if first == 0 else self._rows + self._rows // 16 + 4
            for name in ("_labels", "_expires", "_alive"):
                setattr(self, name, _grown(getattr(self, name), first, capacity))
        part = slice(first, self._rows)
        self._labels[part], self._expires[part], self._alive[part] = labels, expires, True
        self._next_expiry = min(self._next_expiry, int(expires.min()))
        self._max_label = max(self._max_label, int(labels.max()))
        taken = 0
        while taken < count:
            block, at = divmod(first + taken - self._base, BLOCK)
            fits = min(BLOCK - at, count - taken)
            if block == len(self._blocks):
                self._blocks.append(np.zeros((0, self.dim), np.float32))
            if at + fits > len(self._blocks[block]):
                capacity = min(BLOCK, at + fits + (at + fits) // 16) if at else at + fits
                self._blocks[block] = _grown(self._blocks[block], at, capacity)
            self._blocks[block][at : at + fits] = normalised(vectors[taken : taken + fits])
            taken += fits

    def _bury(self, rows: Rows) -> None:
        """Rows that are alive die: their vectors are wiped from the tail, and hidden in the graph."""
        self._alive[rows] = False
        self._dead += len(rows)
        if self._graph is not None:
            self._graph.bury(rows[rows < self._folded])
        for row in rows[rows >= self._folded].tolist():
            block, at = divmod(row - self._base, BLOCK)
            self._blocks[block][at] = 0.0

    def _tail_scores(self, query: Vector) -> npt.NDArray[np.float32]:
        """Of the rows from `_folded` on, dead ones too."""
        piece = max(64, _PRODUCT // self.dim)
        scores = []
        for number, block in enumerate(self._blocks):
            first = self._base + number * BLOCK
            start, end = max(0, self._folded - first), min(len(block), self._rows - first)
            scores += [block[at : min(at + piece, end)] @ query for at in range(start, end, piece)]
        if len(scores) == 1:
            return scores[0]
        return np.concatenate(scores) if scores else np.zeros(0, np.float32)

    def _tail_vectors(self, rows: Rows) -> Vector:
        vectors = np.empty((len(rows), self.dim), np.float32)
        blocks, at = np.divmod(rows - self._base, BLOCK)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            vectors[here] = self._blocks[block][at[here]]
        return vectors

    def _compact(self) -> None:
        """Forget the dead rows of an exact index."""
        alive = np.flatnonzero(self._alive[: self._rows])
        vectors, labels, expires = self._tail_vectors(alive), self._labels[alive], self._expires[alive]
        self._rows = self._dead = self._folded = self._base = 0
        self._labels, self._expires, self._alive = _EMPTY, _EMPTY, np.zeros(0, np.bool_)
        self._blocks, self._graph = [], None
        self._next_expiry = int(NEVER)
        self._add(labels, expires, vectors)

    # The graph

    def _search_graph(
        self, query: Vector, k: int, usable: npt.NDArray[np.bool_], fetch: Fetch, filtered: bool
    ) -> tuple[Rows, npt.NDArray[np.float32]]:
        """At least min(k, matches) rows of the graph with their scores, in no order."""
        assert self._graph is not None
        graph = self._graph
        matches = int(np.count_nonzero(usable)) if filtered else graph.live
        wanted = min(k, matches)
        if wanted == 0:
            return _EMPTY, np.zeros(0, np.float32)
        if not filtered:
            found = graph.nearest(query, wanted)
            return found if found is not None else self._scan(query, usable, fetch)
        if matches <= max(_EXACT_SCAN, 2 * k):
            return self._scan(query, usable, fetch)
        depth = math.ceil(1.5 * wanted * graph.live / matches) + 16
        while depth < graph.live // 8:
            found = graph.nearest(query, depth)
            if found is None:
                break
            rows, scores = found
            good = usable[rows]
            if np.count_nonzero(good) >= wanted:
                return rows[good], scores[good]
            depth *= 4
        return self._scan(query, usable, fetch)

    def _scan(self, query: Vector, usable: npt.NDArray[np.bool_], fetch: Fetch) -> tuple[Rows, npt.NDArray[np.float32]]:
        """Every usable row of the graph, scored by the log's own vectors."""
        rows = np.flatnonzero(usable)
        scores = [
            normalised(fetch(self._labels[rows[start : start + BLOCK]])) @ query for start in range(0, len(rows), BLOCK)
        ]
        return rows, np.concatenate(scores) if scores else np.zeros(0, np.float32)

    def _slice(self, first: int, end: int) -> tuple[Rows, int]:
        """The next live rows from `first` on, as many as one step can add, and the row to go on from."""
        n = max(1, int(self._options.step_s / self._row_s))
        end = min(end, first + max(64 * n, 1024))  # dead rows on the way cost little, but not nothing
        rows = np.flatnonzero(self._alive[first:end])[:n] + first
        return rows, int(rows[-1]) + 1 if len(rows) == n else end

    def _add_to(self, graph: Graph, rows: Rows, vectors: Vector) -> None:
        """Add rows, and measure what one takes."""
        began = time.perf_counter()
        graph.add(rows, vectors)
        self._row_s = 0.5 * self._row_s + 0.5 * (time.perf_counter() - began) / len(rows)

    def _continue_rebuild(self, rebuild: _Rebuild) -> None:
        assert self._graph is not None
        rows, rebuild.at = self._slice(rebuild.at, self._folded)
        if len(rows):
            vectors = self._graph.vectors(rows)
            if rebuild.graph is None:
                rebuild.parts.append(vectors)
            else:
                taken = rebuild.graph.count
                self._add_to(rebuild.graph, np.arange(taken, taken + len(rows)), vectors)
            rebuild.rows.append(rows)
        if rebuild.at >= self._folded:
            self._finish_rebuild(rebuild)

    def _finish_rebuild(self, rebuild: _Rebuild) -> None:
        """Number the rows anew: those that were taken over, then the tail."""
        taken = np.concatenate(rebuild.rows) if rebuild.rows else _EMPTY
        tail = np.flatnonzero(self._alive[self._folded : self._rows]) + self._folded
        vectors = self._tail_vectors(tail)
        if rebuild.graph is None:
            kept = self._alive[taken]  # some may have died since they were taken
            parts = np.concatenate(rebuild.parts)[kept] if rebuild.parts else np.zeros((0, self.dim), np.float32)
            vectors, tail = np.concatenate([parts, vectors]), np.concatenate([taken[kept], tail])
            taken = _EMPTY
        labels, expires, alive = self._labels[tail], self._expires[tail], self._alive[taken]
        self._labels, self._expires, self._alive = self._labels[taken], self._expires[taken], alive
        self._graph, self._rebuild, self._blocks = rebuild.graph, None, []
        self._rows = self._folded = self._base = len(taken)
        self._dead = int(len(taken) - alive.sum())
        if self._graph is not None:
            self._graph.bury(np.flatnonzero(~alive))
        self._next_expiry = int(self._expires[alive].min(initial=NEVER))
        self._add(labels, expires, vectors)

    def _best(self, rows: Rows, scores: npt.NDArray[np.float32], k: int) -> Hits:
        if k < len(scores):
            # Equal vectors may differ in the last bit, by their place in the matrix product: keep all that round alike.
            threshold = np.partition(scores, len(scores) - k)[len(scores) - k] - _TIE
            near = scores >= threshold
            rows, scores = rows[near], scores[near]
        rounded: npt.NDArray[np.float64] = np.clip(np.round(scores.astype(np.float64), 6), -1.0, 1.0)
        order = np.lexsort((-rows, -rounded))[:k]
        return Hits(self._labels[rows[order]], rounded[order])


def normalised(vectors: Vector) -> Vector:
    """`vectors: (n, dim) float32` with rows of length 1. Norms are taken in float64: no overflow, no underflow."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    scaled: Vector = (vectors / norms[:, None]).astype(np.float32)
    return scaled


def _grown(old: npt.NDArray[Any], used: int, capacity: int) -> npt.NDArray[Any]:
    new = np.zeros((capacity, *old.shape[1:]), old.dtype)
    new[:used] = old[:used]
    return new
