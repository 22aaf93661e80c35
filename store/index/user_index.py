"""One user's index: a cache of the log's vectors that answers nearest-neighbour queries.

Up to `IndexOptions.switch` memories it is an exact matrix. Above, the older rows are in an HNSW graph, and the newer
rows, the tail, are in the matrix, from which `maintain` moves them into the graph in small steps.

Guarantees: the index holds nothing that the log did not hold at its version. A search returns min(k, matching rows)
rows. Rows are numbered in the order of the log's versions, so the row with the greater number is always the
newer. The vector of a row never changes: an update is a new row, so that hnswlib never gets a label twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from store.index.graph import Found, Graph
from store.index.matrix import BLOCK, Matrix, Rows, grown, normalised
from store.log.reading import NEVER, Changes
from store.records import IndexOptions, Vector

Labels = npt.NDArray[np.int64]
FilterKey = bytes
Fetch = Callable[[Labels], Vector]
"""From labels (n,) to the log's vectors (n, dim) float32, as the model made them."""

_EMPTY = np.zeros(0, np.int64)
_SCAN_ROWS = 2000  # up to so many rows of the graph are fetched from the log and scanned instead of searched for
_FILTERS = 8  # filters whose matches are remembered
_TIE = 2e-6  # scores that differ by less may be equal after rounding


class Hits(NamedTuple):
    """labels (n,) int64 and scores (n,) float64 in [-1, 1], rounded to six decimals, best first, ties by newest."""

    labels: Labels
    scores: npt.NDArray[np.float64]


class _Rebuild:
    """The next graph, or matrix if the user has become small, while it is made from the live rows of the old graph."""

    __slots__ = ("at", "graph", "parts", "rows")

    def __init__(self, graph: Graph | None) -> None:
        self.graph = graph
        self.at = 0  # rows of the old graph below this number have been copied
        self.rows: list[Rows] = []  # the old numbers of the rows that were copied
        self.parts: list[Vector] = []


class UserIndex:
    """The vectors of one user's live memories with their labels, at one version of the log."""

    __slots__ = (
        "_alive",
        "_dead",
        "_expires",
        "_graph",
        "_labels",
        "_matrix",
        "_max_label",
        "_next_expiry",
        "_options",
        "_rebuild",
        "_row_s",
        "_rows",
        "_tail_start",
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
        self.filters: dict[FilterKey, tuple[int, Labels]] = {}  # version and matching labels, least recently used first
        self._options = options
        self._rows = 0
        self._dead = 0
        self._tail_start = 0  # rows below are in the graph, or were dead before they were moved there
        self._labels = np.zeros(0, np.int64)
        self._expires = np.zeros(0, np.int64)
        self._alive = np.zeros(0, np.bool_)
        self._matrix = Matrix(dim)  # all rows from the tail's first on, and perhaps some before
        self._graph: Graph | None = None
        self._rebuild: _Rebuild | None = None
        self._next_expiry = int(NEVER)
        self._max_label = 0
        self._row_s = 0.0005  # time to add a row to the graph, measured with each step

    @property
    def kind(self) -> Literal["exact", "hnsw"]:
        """`hnsw` if there is a graph."""
        return "exact" if self._graph is None else "hnsw"

    @property
    def live(self) -> int:
        """Number of rows that a search can find."""
        return self._rows - self._dead

    @property
    def bytes(self) -> int:
        """Memory that this index holds."""
        size = self._labels.nbytes + self._expires.nbytes + self._alive.nbytes + self._matrix.bytes + 1500
        size += sum(labels.nbytes + 300 for _, labels in self.filters.values())
        graphs = (self._graph, self._rebuild.graph if self._rebuild else None)
        return size + sum(graph.bytes for graph in graphs if graph is not None)

    def apply(self, changes: Changes) -> None:
        """Apply the log's next changes after `self.version`."""
        if len(changes.labels):
            if int(changes.labels.min()) <= self._max_label:  # otherwise all labels are new, since labels only grow
                rows = np.flatnonzero(np.isin(self._labels[: self._rows], changes.labels))
                self._remove(rows[self._alive[rows]])
            self._add(changes.labels[changes.kept], changes.expires, changes.vectors)
            self.version = int(changes.versions[-1])

    def remember(self, filter: FilterKey, labels: Labels) -> None:
        """Keep the labels that match a filter at this version, in place of the least recently used filter's."""
        self.filters[filter] = self.version, labels
        while len(self.filters) > _FILTERS:
            del self.filters[next(iter(self.filters))]

    def expire(self, now: int) -> None:
        """Remove the rows that have expired. `now` is in microseconds."""
        if now < self._next_expiry:
            return
        alive = self._alive[: self._rows]
        self._remove(np.flatnonzero(alive & (self._expires[: self._rows] <= now)))
        left = self._expires[: self._rows][alive]
        self._next_expiry = int(left.min()) if len(left) else int(NEVER)

    def search(self, query: Vector, k: int, fetch: Fetch, allowed: Labels | None = None) -> Hits:
        """The k nearest rows to `query: (dim,) float32, L2-normalised`, among the labels `allowed` if given."""
        usable = self._alive[: self._rows]
        if allowed is not None:
            usable = usable & np.isin(self._labels[: self._rows], allowed)
        start = self._tail_start
        rows = np.flatnonzero(usable[start:]) + start
        scores = self._matrix.scores(query, start)[rows - start]
        if self._graph is not None:
            found = self._search_graph(self._graph, query, k, usable[:start], fetch, filtered=allowed is not None)
            rows, scores = np.concatenate([found.rows, rows]), np.concatenate([found.scores, scores])
        return self._best(rows, scores, k)

    def maintain(self) -> bool:
        """Do one step of background work, of about `step_s`. Returns True if there is more to do.

        It moves rows from the tail into the graph, rebuilds a graph with many dead rows, turns a graph that has become
        small into a matrix, and frees the dead rows of a matrix.
        """
        options = self._options
        if self._rebuild is not None:
            self._continue_rebuild(self._rebuild)
            return True
        if self._graph is None:
            if self.live > options.switch:
                self._graph = Graph(self.dim, options, self.live + self.live // 16)
            else:
                if self._dead > 64 and self._dead > self._rows * options.max_deleted_share:
                    self._compact()
                return False
        graph = self._graph
        if self.live <= options.switch // 2:
            self._rebuild = _Rebuild(None)
            return True
        if graph.dead > graph.count * options.max_deleted_share:
            self._rebuild = _Rebuild(Graph(self.dim, options, graph.live + graph.live // 16))
            return True
        self._shorten_tail(graph)
        return self._tail_start < self._rows

    def snapshot(self) -> tuple[Graph, Labels, npt.NDArray[np.int64], npt.NDArray[np.bool_]] | None:
        """The graph with the labels, expiries and alive flags of its rows. None while some rows are not in a graph."""
        if self._graph is None or self._rebuild is not None or self._tail_start < self._rows:
            return None
        n = self._rows
        return self._graph, self._labels[:n], self._expires[:n], self._alive[:n]

    def restore(
        self,
        graph: Graph,
        labels: Labels,
        expires: npt.NDArray[np.int64],
        alive: npt.NDArray[np.bool_],
        version: int,
    ) -> None:
        """Start from the values of an earlier `snapshot`. The index must be empty."""
        self._graph, self._labels, self._expires, self._alive, self.version = graph, labels, expires, alive, version
        self._rows = self._tail_start = len(labels)
        self._matrix = Matrix(self.dim, len(labels))
        self._dead = int(len(alive) - alive.sum())
        self._max_label = int(labels.max(initial=0))
        self._next_expiry = int(expires[alive].min(initial=NEVER))

    # Rows

    def _add(self, labels: Labels, expires: npt.NDArray[np.int64], vectors: Vector) -> None:
        count = len(labels)
        if count == 0:
            return
        first, self._rows = self._rows, self._rows + count
        if self._rows > len(self._labels):
            capacity = self._rows if first == 0 else self._rows + self._rows // 16 + 4
            for name in ("_labels", "_expires", "_alive"):
                setattr(self, name, grown(getattr(self, name), first, capacity))
        part = slice(first, self._rows)
        self._labels[part], self._expires[part], self._alive[part] = labels, expires, True
        self._next_expiry = min(self._next_expiry, int(expires.min()))
        self._max_label = max(self._max_label, int(labels.max()))
        self._matrix.append(vectors)

    def _remove(self, rows: Rows) -> None:
        """Mark live rows as dead: their vectors are overwritten in the tail, and hidden in the graph."""
        self._alive[rows] = False
        self._dead += len(rows)
        if self._graph is not None:
            self._graph.delete(rows[rows < self._tail_start])
        self._matrix.wipe(rows[rows >= self._tail_start])

    def _compact(self) -> None:
        """Free the dead rows of an exact index."""
        alive = np.flatnonzero(self._alive[: self._rows])
        vectors, labels, expires = self._matrix.vectors(alive), self._labels[alive], self._expires[alive]
        self._rows = self._dead = 0
        self._labels, self._expires, self._alive = _EMPTY, _EMPTY, np.zeros(0, np.bool_)
        self._matrix = Matrix(self.dim)
        self._next_expiry = int(NEVER)
        self._add(labels, expires, vectors)

    # The graph

    def _search_graph(
        self, graph: Graph, query: Vector, k: int, usable: npt.NDArray[np.bool_], fetch: Fetch, *, filtered: bool
    ) -> Found:
        """At least min(k, matches) of the usable rows of the graph, in no order."""
        matches = int(np.count_nonzero(usable)) if filtered else graph.live
        wanted = min(k, matches)
        if wanted == 0:
            return Found(_EMPTY, np.zeros(0, np.float32))
        found = None
        if not filtered:
            found = graph.nearest(query, wanted)
        elif matches > max(_SCAN_ROWS, 2 * k):
            found = graph.nearest_among(query, wanted, usable, matches)
        return found if found is not None else self._scan(query, usable, fetch)

    def _scan(self, query: Vector, usable: npt.NDArray[np.bool_], fetch: Fetch) -> Found:
        """Every usable row of the graph, scored by the vectors in the log."""
        rows = np.flatnonzero(usable)
        scores = [
            normalised(fetch(self._labels[rows[start : start + BLOCK]])) @ query for start in range(0, len(rows), BLOCK)
        ]
        return Found(rows, np.concatenate(scores) if scores else np.zeros(0, np.float32))

    def _shorten_tail(self, graph: Graph) -> None:
        """Move the next rows of the tail into the graph."""
        if self._tail_start < self._rows:
            rows, self._tail_start = self._slice(self._tail_start, self._rows)
            if len(rows):
                self._add_to(graph, rows, self._matrix.vectors(rows))
            self._matrix.drop_before(self._tail_start)

    def _slice(self, first: int, end: int) -> tuple[Rows, int]:
        """The next live rows from `first` on, as many as one step can add, and the row that the next step starts at."""
        n = max(1, int(self._options.step_s / self._row_s))
        end = min(end, first + max(64 * n, 1024))  # a bound, since dead rows take some time too
        rows = np.flatnonzero(self._alive[first:end])[:n] + first
        return rows, int(rows[-1]) + 1 if len(rows) == n else end

    def _add_to(self, graph: Graph, rows: Rows, vectors: Vector) -> None:
        """Add rows, and measure the time that a row takes."""
        began = time.perf_counter()
        graph.add(rows, vectors)
        self._row_s = 0.5 * self._row_s + 0.5 * (time.perf_counter() - began) / len(rows)

    def _continue_rebuild(self, rebuild: _Rebuild) -> None:
        assert self._graph is not None
        rows, rebuild.at = self._slice(rebuild.at, self._tail_start)
        if len(rows):
            vectors = self._graph.vectors(rows)
            if rebuild.graph is None:
                rebuild.parts.append(vectors)
            else:
                first = rebuild.graph.count
                self._add_to(rebuild.graph, np.arange(first, first + len(rows)), vectors)
            rebuild.rows.append(rows)
        if rebuild.at >= self._tail_start:
            self._finish_rebuild(rebuild)

    def _finish_rebuild(self, rebuild: _Rebuild) -> None:
        """Renumber the rows: first those that were copied, then the tail."""
        copied = np.concatenate(rebuild.rows) if rebuild.rows else _EMPTY
        tail = np.flatnonzero(self._alive[self._tail_start : self._rows]) + self._tail_start
        vectors = self._matrix.vectors(tail)
        if rebuild.graph is None:
            kept = self._alive[copied]  # some may have been deleted since they were copied
            parts = np.concatenate(rebuild.parts)[kept] if rebuild.parts else np.zeros((0, self.dim), np.float32)
            vectors, tail = np.concatenate([parts, vectors]), np.concatenate([copied[kept], tail])
            copied = _EMPTY
        labels, expires, alive = self._labels[tail], self._expires[tail], self._alive[copied]
        self._labels, self._expires, self._alive = self._labels[copied], self._expires[copied], alive
        self._graph, self._rebuild = rebuild.graph, None
        self._rows = self._tail_start = len(copied)
        self._matrix = Matrix(self.dim, len(copied))
        self._dead = int(len(copied) - alive.sum())
        if self._graph is not None:
            self._graph.delete(np.flatnonzero(~alive))
        self._next_expiry = int(self._expires[alive].min(initial=NEVER))
        self._add(labels, expires, vectors)

    def _best(self, rows: Rows, scores: npt.NDArray[np.float32], k: int) -> Hits:
        if k < len(scores):
            # The scores of equal vectors may differ in the last bit, by their place in the matrix product. Keep rows
            # whose score may equal the k-th after rounding, so that ties are decided by age.
            threshold = np.partition(scores, len(scores) - k)[len(scores) - k] - _TIE
            near = scores >= threshold
            rows, scores = rows[near], scores[near]
        rounded: npt.NDArray[np.float64] = np.clip(np.round(scores.astype(np.float64), 6), -1.0, 1.0)
        order = np.lexsort((-rows, -rounded))[:k]
        return Hits(self._labels[rows[order]], rounded[order])
