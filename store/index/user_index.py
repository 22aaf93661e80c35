"""One user's index: a cache of the log's vectors, which answers nearest-neighbour queries, and of its words.

Up to `IndexOptions.switch` memories it is an exact matrix. Above, the older rows are in a body with an HNSW graph. The
newer rows, the tail, are in the matrix, from which `maintain` moves them into the body in small steps. The words are
there from the first search on that needs them: to read and split all texts takes time and memory.

Guarantees: the index holds nothing that the log did not hold at its version. A search returns min(k, matching rows)
rows. Rows are numbered in the order of the log's versions, so the row with the greater number is always the
newer. The vector of a row never changes: an update is a new row, so that hnswlib never gets a label twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from store.index.body import TIE, Body, Found
from store.index.graph import Graph
from store.index.matrix import BLOCK, Matrix, Rows, grown, normalised
from store.index.timeline import ANY_TIME, Period, Timeline, nowhere
from store.index.words import Words
from store.log.reading import NEVER, Changes, Places
from store.records import IndexOptions, Vector

Labels = npt.NDArray[np.int64]
FilterKey = bytes
Fetch = Callable[[Labels], Vector]
"""From labels (n,) to the log's vectors (n, dim) float32, as the model made them."""

_EMPTY = np.zeros(0, np.int64)
_SCAN_ROWS = 2000  # up to so many rows of the body are fetched from the log and scanned instead of searched for
_READ_S = 0.00002  # time to read a row's vector from the graph
_EQUAL = 4e-7  # scores of equal vectors differ by less
_FILTERS = 8  # filters whose matches are remembered


class Hits(NamedTuple):
    """Labels (n,) int64, scores (n,) float64 in [-1, 1], rounded to six decimals, and rows (n,) int64.

    The best come first, and the newest of those with equal scores.
    """

    labels: Labels
    scores: npt.NDArray[np.float64]
    rows: Rows


class _Rebuild:
    """The next body, or matrix if the user has become small, while it is made from the live rows of the old body."""

    __slots__ = ("at", "body", "count", "parts", "rows")

    def __init__(self, body: Body | None) -> None:
        self.body = body
        self.count = 0  # rows that have been copied
        self.at = 0  # rows of the old body below this number have been copied
        self.rows: list[Rows] = []  # the old numbers of the rows that were copied
        self.parts: list[Vector] = []


class UserIndex:
    """The vectors of one user's live memories with their labels, at one version of the log."""

    __slots__ = (
        "_alive",
        "_body",
        "_dead",
        "_expires",
        "_labels",
        "_matrix",
        "_max_label",
        "_next_expiry",
        "_options",
        "_rebuild",
        "_rows",
        "_tail_start",
        "dim",
        "epoch",
        "filters",
        "is_placed",
        "timeline",
        "uid",
        "version",
        "words",
    )

    def __init__(self, uid: int, epoch: int, dim: int, options: IndexOptions) -> None:
        self.uid = uid
        self.epoch = epoch
        self.dim = dim
        self.version = 0
        self.words: Words | None = None  # of the same rows, if they are needed
        self.timeline = Timeline()  # of the same rows
        self.is_placed = True  # whether the timeline has the places of the rows: see `place`
        self.filters: dict[FilterKey, tuple[int, Labels]] = {}  # version and matching labels, least recently used first
        self._options = options
        self._rows = 0
        self._dead = 0
        self._tail_start = 0  # rows below are in the body, or were dead before they were moved there
        self._labels = np.zeros(0, np.int64)
        self._expires = np.zeros(0, np.int64)
        self._alive = np.zeros(0, np.bool_)
        self._matrix = Matrix(dim)  # all rows from the tail's first on, and perhaps some before
        self._body: Body | None = None
        self._rebuild: _Rebuild | None = None
        self._next_expiry = int(NEVER)
        self._max_label = 0

    @property
    def kind(self) -> Literal["exact", "hnsw"]:
        """`hnsw` if there is a body."""
        return "exact" if self._body is None else "hnsw"

    @property
    def live(self) -> int:
        """Number of rows that a search can find."""
        return self._rows - self._dead

    @property
    def bytes(self) -> int:
        """Memory that this index holds."""
        size = self._labels.nbytes + self._expires.nbytes + self._alive.nbytes + self._matrix.bytes + 1500
        size += sum(labels.nbytes + 300 for _, labels in self.filters.values())
        size += 0 if self.words is None else self.words.bytes
        size += self.timeline.bytes
        bodies = (self._body, self._rebuild.body if self._rebuild else None)
        return size + sum(body.bytes for body in bodies if body is not None)

    def apply(self, changes: Changes) -> None:
        """Apply the log's next changes after `self.version`. They must have texts if there are words."""
        if len(changes.labels):
            if int(changes.labels.min()) <= self._max_label:  # otherwise all labels are new, since labels only grow
                rows = np.flatnonzero(np.isin(self._labels[: self._rows], changes.labels))
                self._remove(rows[self._alive[rows]])
            first = self._rows
            self._add(changes.labels[changes.kept], changes.expires, changes.vectors)
            self.timeline.add(changes.places or nowhere(self._rows - first))
            if self.words is not None:
                assert changes.texts is not None
                self.words.add(np.arange(first, self._rows), changes.texts)
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

    def add_words(self, pages: Iterable[tuple[Labels, Sequence[str]]]) -> None:
        """Add the words of all rows.

        Args:
            pages: labels (n,) int64 and texts of all memories of the log at this version, in the order of their
                versions. Those that have expired here are left out.
        """
        words = Words(self._options.k1, self._options.b)
        for labels, texts in pages:
            rows = self.rows_of(labels)
            words.add(rows[rows >= 0], [text for row, text in zip(rows.tolist(), texts, strict=True) if row >= 0])
        words.extend(self._rows)
        self.words = words

    def place(self, labels: Labels | None, places: Places) -> None:
        """Give the rows of a restored index their places: those with these labels, or all rows."""
        if labels is None:
            self.timeline = Timeline(places)
        else:
            rows = self.rows_of(labels)
            self.timeline.put(rows[rows >= 0], Places(*(values[rows >= 0] for values in places)))
        self.is_placed = True

    def usable(self, allowed: Labels | None, period: Period = ANY_TIME) -> npt.NDArray[np.bool_]:
        """(rows,) whether a row may be found: it is alive, was made in the period, and has an allowed label."""
        usable = self._alive[: self._rows]
        if allowed is not None:
            usable = usable & np.isin(self._labels[: self._rows], allowed)
        return usable if period == ANY_TIME else usable & self.timeline.made_in(period)

    def neighbours(self, rows: Rows, n: int) -> Rows:
        """(m, 2n) the live rows before and after each of m live rows in its thread: see `Timeline.neighbours`."""
        return self.timeline.neighbours(rows, n, self._alive[: self._rows], self._labels[: self._rows])

    def search(self, query: Vector, k: int, fetch: Fetch, allowed: Labels | None = None) -> Hits:
        """The k nearest rows to `query: (dim,) float32, L2-normalised`, among the labels `allowed` if given."""
        return self.nearest(query, k, fetch, self.usable(allowed), filtered=allowed is not None)

    def nearest(self, query: Vector, k: int, fetch: Fetch, usable: npt.NDArray[np.bool_], *, filtered: bool) -> Hits:
        """The k nearest of the usable rows. `filtered`: some rows that are alive are not usable."""
        start = self._tail_start
        rows = np.flatnonzero(usable[start:]) + start
        scores = self._matrix.scores(query, start)[rows - start]
        if self._body is not None:
            found = self._search_body(self._body, query, k, usable[:start], fetch, filtered=filtered)
            rows, scores = np.concatenate([found.rows, rows]), np.concatenate([found.scores, scores])
        return self._best(rows, scores, k)

    def cosines(self, rows: Rows, query: Vector, fetch: Fetch) -> npt.NDArray[np.float64]:
        """(n,) the scores of live rows, as `search` gives them."""
        scores = np.empty(len(rows), np.float64)
        tail = rows >= self._tail_start
        scores[tail] = self._matrix.vectors(rows[tail]) @ query
        if not tail.all():
            scores[~tail] = normalised(fetch(self._labels[rows[~tail]])) @ query
        return np.clip(scores.round(6), -1.0, 1.0)

    def live_labels(self) -> Labels:
        """(n,) the labels of all live rows, ascending."""
        return np.sort(self._labels[: self._rows][self._alive[: self._rows]])

    def labels_of(self, rows: Rows) -> Labels:
        """(n,) the labels of rows."""
        return self._labels[rows]

    def rows_of(self, labels: Labels) -> Rows:
        """(n,) the live row of each label; -1 if there is none."""
        known = self._labels[: self._rows]
        if self._rows == 0:
            return np.full(len(labels), -1)
        if (known[1:] > known[:-1]).all():
            rows = np.maximum(known.searchsorted(labels, "right") - 1, 0)
        else:
            order = np.argsort(known, kind="stable")  # an updated memory has several rows, the last of which may live
            rows = order[np.maximum(known.searchsorted(labels, "right", sorter=order) - 1, 0)]
        return np.where(self._alive[rows] & (known[rows] == labels), rows, -1)

    def maintain(self) -> bool:
        """Do one step of background work, of about `step_s`. Returns True if there is more to do.

        It moves rows from the tail into the body, rebuilds a body with many dead rows, turns a body that has become
        small into a matrix, frees the dead rows of a matrix, and merges words.
        """
        return self._maintain_vectors() or self._maintain_words()

    def _maintain_words(self) -> bool:
        words = self.words
        return words is not None and words.maintain(self._alive[: self._rows], self._options.max_deleted_share)

    def _maintain_vectors(self) -> bool:
        options = self._options
        if self._rebuild is not None:
            self._continue_rebuild(self._rebuild)
            return True
        if self._body is None:
            if self.live > options.switch:
                self._body = Body(Graph(self.dim, options, min(options.switch, BLOCK)))
            else:
                if self._dead > 64 and self._dead > self._rows * options.max_deleted_share:
                    self._compact()
                return False
        body = self._body
        if self.live <= options.switch // 2:
            self._rebuild = _Rebuild(None)
            return True
        if body.dead_share > options.max_deleted_share:
            self._rebuild = _Rebuild(Body(Graph(self.dim, options, body.graph.live + body.graph.live // 16)))
            return True
        self._shorten_tail(body)
        return self._tail_start < self._rows

    def snapshot(self) -> tuple[Body, Labels, npt.NDArray[np.int64], npt.NDArray[np.bool_]] | None:
        """The body with the labels, expiries and alive flags of its rows. None while some rows are not in a body.

        The words are taken from `words`.
        """
        if self._body is None or self._rebuild is not None or self._tail_start < self._rows:
            return None
        n = self._rows
        return self._body, self._labels[:n], self._expires[:n], self._alive[:n]

    def restore(
        self,
        body: Body,
        labels: Labels,
        expires: npt.NDArray[np.int64],
        alive: npt.NDArray[np.bool_],
        version: int,
    ) -> None:
        """Start from the values of an earlier `snapshot`. The index must be empty. `place` must follow."""
        self._body, self._labels, self._expires, self._alive, self.version = body, labels, expires, alive, version
        self._rows = self._tail_start = len(labels)
        self._matrix = Matrix(self.dim, len(labels))
        self._dead = int(len(alive) - alive.sum())
        self._max_label = int(labels.max(initial=0))
        self._next_expiry = int(expires[alive].min(initial=NEVER))
        self.timeline, self.is_placed = Timeline(nowhere(len(labels))), False

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
        """Mark live rows as dead: their vectors are overwritten in the tail, and hidden in the body."""
        self._alive[rows] = False
        self._dead += len(rows)
        if self._body is not None:
            self._body.delete(rows[rows < self._tail_start])
        self._matrix.wipe(rows[rows >= self._tail_start])

    def _compact(self) -> None:
        """Free the dead rows of an exact index."""
        alive = np.flatnonzero(self._alive[: self._rows])
        vectors, labels, expires = self._matrix.vectors(alive), self._labels[alive], self._expires[alive]
        self.timeline.keep(alive)
        if self.words is not None:
            self.words.keep(alive)
        self._rows = self._dead = 0
        self._labels, self._expires, self._alive = _EMPTY, _EMPTY, np.zeros(0, np.bool_)
        self._matrix = Matrix(self.dim)
        self._next_expiry = int(NEVER)
        self._add(labels, expires, vectors)

    # The body

    def _search_body(
        self, body: Body, query: Vector, k: int, usable: npt.NDArray[np.bool_], fetch: Fetch, *, filtered: bool
    ) -> Found:
        """At least min(k, matches) of the usable rows of the body, in no order."""
        matches = int(np.count_nonzero(usable)) if filtered else body.live
        if matches == 0:
            return Found(_EMPTY, np.zeros(0, np.float32))
        found = None
        if not filtered:
            found = body.nearest(query, k)
        elif matches > max(_SCAN_ROWS, 2 * k):
            found = body.nearest_among(query, k, usable)
        return found if found is not None else self._scan(body, query, usable, fetch)

    def _scan(self, body: Body, query: Vector, usable: npt.NDArray[np.bool_], fetch: Fetch) -> Found:
        """Every usable row of the body, scored by the vectors in the log, one for rows with equal vectors."""
        rows = np.flatnonzero(usable)
        _, first, place = np.unique(body.same(rows), return_index=True, return_inverse=True)
        labels = self._labels[rows[first]]
        scores = [normalised(fetch(labels[start : start + BLOCK])) @ query for start in range(0, len(labels), BLOCK)]
        return Found(rows, np.concatenate(scores)[place])

    def _shorten_tail(self, body: Body) -> None:
        """Move the next rows of the tail into the body."""
        if self._tail_start < self._rows:
            rows, self._tail_start = self._slice(self._tail_start, self._rows, body)
            if len(rows):
                body.add(rows, self._matrix.vectors(rows))
            self._matrix.drop_before(self._tail_start)

    def _slice(self, first: int, end: int, body: Body | None) -> tuple[Rows, int]:
        """The next live rows from `first` on, and the row that the next step starts at.

        They are as many as one step can add to `body`, or read if there is none.
        """
        n = max(1, int(self._options.step_s / (_READ_S if body is None else body.row_s)))
        end = min(end, first + max(64 * n, 1024))  # a bound, since dead rows take some time too
        rows = np.flatnonzero(self._alive[first:end])[:n] + first
        return rows, int(rows[-1]) + 1 if len(rows) == n else end

    def _continue_rebuild(self, rebuild: _Rebuild) -> None:
        assert self._body is not None
        rows, rebuild.at = self._slice(rebuild.at, self._tail_start, rebuild.body)
        if len(rows):
            vectors = self._body.vectors(rows)
            if rebuild.body is None:
                rebuild.parts.append(vectors)
            else:
                rebuild.body.add(np.arange(rebuild.count, rebuild.count + len(rows)), vectors)
            rebuild.rows.append(rows)
            rebuild.count += len(rows)
        if rebuild.at >= self._tail_start:
            self._finish_rebuild(rebuild)

    def _finish_rebuild(self, rebuild: _Rebuild) -> None:
        """Renumber the rows: first those that were copied, then the tail."""
        copied = np.concatenate(rebuild.rows) if rebuild.rows else _EMPTY
        tail = np.flatnonzero(self._alive[self._tail_start : self._rows]) + self._tail_start
        vectors = self._matrix.vectors(tail)
        if rebuild.body is None:
            kept = self._alive[copied]  # some may have been deleted since they were copied
            parts = np.concatenate(rebuild.parts)[kept] if rebuild.parts else np.zeros((0, self.dim), np.float32)
            vectors, tail = np.concatenate([parts, vectors]), np.concatenate([copied[kept], tail])
            copied = _EMPTY
        self.timeline.keep(np.concatenate([copied, tail]))
        if self.words is not None:
            self.words.keep(np.concatenate([copied, tail]))
        labels, expires, alive = self._labels[tail], self._expires[tail], self._alive[copied]
        self._labels, self._expires, self._alive = self._labels[copied], self._expires[copied], alive
        self._body, self._rebuild = rebuild.body, None
        self._rows = self._tail_start = len(copied)
        self._matrix = Matrix(self.dim, len(copied))
        self._dead = int(len(copied) - alive.sum())
        if self._body is not None:
            self._body.delete(np.flatnonzero(~alive))
        self._next_expiry = int(self._expires[alive].min(initial=NEVER))
        self._add(labels, expires, vectors)

    def _best(self, rows: Rows, scores: npt.NDArray[np.float32], k: int) -> Hits:
        """The k rows with the highest scores. Rows with equal vectors have one score, and the newest comes first."""
        if k < len(scores):
            near = scores >= np.partition(scores, len(scores) - k)[len(scores) - k] - TIE
            rows, scores = rows[near], scores[near]
        order = np.argsort(-scores)
        rows, rounded = rows[order], np.clip(_rounded(scores[order]), -1.0, 1.0)
        order = np.lexsort((-rows, -rounded))[:k]
        return Hits(self._labels[rows[order]], rounded[order], rows[order])


def _rounded(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Scores (n,), falling, rounded to six decimals.

    The scores of equal vectors may differ in the last bits, by their place in the matrix or in the graph. Scores that
    differ by no more than `_EQUAL` are rounded to the same value, so that such rows are ordered by age.
    """
    rounded = []
    first, value = math.inf, math.inf
    for score in scores.tolist():
        if first - score > _EQUAL:
            first, value = score, round(score, 6)
        rounded.append(value)
    return np.array(rounded, np.float64)
