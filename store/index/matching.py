"""One query against one user's index, by vectors, by words or by both.

Guarantees: if both are asked for, each memory that is among the best by either has both measures, each of them exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from store.index.matrix import Rows
from store.index.timeline import ANY_TIME, Period
from store.index.user_index import Fetch, Labels, UserIndex
from store.index.words import Keys
from store.records import Vector

Measure = npt.NDArray[np.float64]


class Query(NamedTuple):
    """What memories are compared with: a vector (dim,) float32, L2-normalised, or words, or both."""

    vector: Vector | None
    words: Keys | None


class Matches(NamedTuple):
    """Memories and how well they match a query, in no order.

    labels: (n,) int64.
    rows: (n,) int64, of which the greater is that of the newer memory.
    cosines: (n,) float64 in [-1, 1], rounded to six decimals; None if the query has no vector.
    bm25: (n,) float64, 0 for a memory without a word of the query; None if the query is not matched by words.
    """

    labels: Labels
    rows: Rows
    cosines: Measure | None
    bm25: Measure | None


class Matcher:
    """One query against one index that has caught up. The index must not change meanwhile.

    Args:
        fetch: reads vectors from the log.
        allowed: labels (n,) of the memories that may be found; None for all.
        period: only memories that were made in it may be found.
    """

    def __init__(
        self,
        index: UserIndex,
        query: Query,
        fetch: Fetch,
        allowed: Labels | None,
        period: Period = ANY_TIME,
    ) -> None:
        self._index = index
        self._query = query
        self._fetch = fetch
        self._filtered = allowed is not None or period != ANY_TIME
        self._usable = index.usable(allowed, period)
        self._bm25: npt.NDArray[np.float32] | None = None
        if query.words is not None:
            assert index.words is not None
            self._bm25 = index.words.scores(query.words, self._usable)

    def best(self, k: int) -> Matches:
        """The k best by vectors, and the k best by words."""
        query, bm25 = self._query, self._bm25
        if query.vector is None:
            assert bm25 is not None
            return self._measured(_best(bm25, k), None)
        hits = self._index.nearest(query.vector, k, self._fetch, self._usable, filtered=self._filtered)
        if bm25 is None:
            return self._measured(hits.rows, hits.scores)
        others = self._without(_best(bm25, k), hits.rows)
        cosines = self._index.cosines(others, query.vector, self._fetch)
        return self._measured(np.concatenate([hits.rows, others]), np.concatenate([hits.scores, cosines]))

    def of(self, labels: Labels) -> Matches:
        """Those of the memories (n,) that may be found."""
        rows = self._index.rows_of(labels)
        rows = rows[rows >= 0]
        rows = rows[self._usable[rows]]
        vector = self._query.vector
        return self._measured(rows, None if vector is None else self._index.cosines(rows, vector, self._fetch))

    def may_find(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Whether rows, in an array of any shape, may be found; -1 may not."""
        return (rows >= 0) & self._usable[rows]

    def _without(self, rows: Rows, others: Rows) -> Rows:
        """The rows that are not among the others."""
        known = np.zeros(len(self._usable), np.bool_)
        known[others] = True
        return rows[~known[rows]]

    def _measured(self, rows: Rows, cosines: Measure | None) -> Matches:
        bm25 = None if self._bm25 is None else self._bm25[rows].astype(np.float64)
        return Matches(self._index.labels_of(rows), rows, cosines, bm25)


def _best(scores: npt.NDArray[np.float32], k: int) -> Rows:
    """The rows of the k highest scores above 0, the newest of those that have the last of them."""
    rows = np.flatnonzero(scores)
    if k < len(rows):
        found = scores[rows]
        least = np.partition(found, len(rows) - k)[len(rows) - k]
        above, equal = rows[found > least], rows[found == least]
        rows = np.concatenate([above, equal[len(equal) - (k - len(above)) :]])
    return rows
