"""How the memories that match a query are ranked: their measures become scores, and the best are taken.

Guarantees: these are pure functions of arrays, so the same memories are always ranked alike, whichever index found
them. A memory's score depends on the measures of the candidates of its own query alone. Of equal scores, the newest
comes first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

EVEN_PEAK = 6.0
"""Words and vectors weigh the same if the best memory by words has so many times the root mean square of all."""

_SPREAD = 0.02  # of cosine similarities, at least: smaller differences say nothing
_CROWD = 100  # candidates, at least: the mean of a few says little, so the missing ones count as no match at all
_EQUAL = 1.5e-6  # cosine similarities that differ by less may be equal before rounding


Numbers = npt.NDArray[np.float64]


class Candidates(NamedTuple):
    """Memories that a search may answer with, in any order.

    labels: (n,) int64.
    rows: (n,) int64, of which the greater is that of the newer memory.
    scores: (n,) float64.
    parts: what the scores were made of, by name, (n,) float64 each.
    """

    labels: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    scores: Numbers
    parts: Mapping[str, Numbers]

    def at(self, places: npt.NDArray[np.int64]) -> Candidates:
        """The candidates at these places, in this order."""
        parts = {name: part[places] for name, part in self.parts.items()}
        return Candidates(self.labels[places], self.rows[places], self.scores[places], parts)


NOBODY = Candidates(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), {})


class Fusion(NamedTuple):
    """How the measures of one query become scores. Found once per query, so that later candidates get equal scores.

    By vectors alone a score is the cosine similarity. By words alone it is BM25, scaled so that the best has 1. By both
    it is the weighted mean of the two, with the cosine similarities scaled so that the best has 1 and the worst 0:
    models differ in how near they put unrelated texts. The words weigh more if their best memory stands out more from
    the root mean square of the candidates: a word that one memory has outweighs the vectors, and a word that all of
    them have does not.

    nearest, farthest: cosine similarities of the candidates; None if the search does without vectors.
    bm25: of the best candidate; 0 if none has a word of the query. None if the search does without words.
    words_weight: the share of the words in the mean.
    """

    nearest: float | None
    farthest: float | None
    bm25: float | None
    words_weight: float

    @classmethod
    def of(cls, cosines: Numbers | None, bm25: Numbers | None) -> Fusion:
        """The fusion for a query whose candidates have these measures."""
        nearest = farthest = words = None
        if cosines is not None:
            nearest, farthest = (float(cosines.max()), float(cosines.min())) if len(cosines) else (0.0, 0.0)
        if bm25 is not None:
            words = float(bm25.max(initial=0.0))
        return cls(nearest, farthest, words, 0.0 if bm25 is None else _weight(bm25))

    def candidates(
        self,
        labels: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        cosines: Numbers | None,
        bm25: Numbers | None,
    ) -> Candidates:
        """Candidates of this query, scored."""
        parts = {}
        if cosines is not None:
            parts["vector"] = cosines
        if bm25 is not None:
            parts["words"] = (bm25 / self.bm25 if self.bm25 else np.zeros(len(bm25))).clip(0.0, 1.0).round(6)
        if self.bm25 is None:
            scores = parts["vector"]
        elif self.nearest is None or self.farthest is None:
            scores = parts["words"]
        else:
            below = (self.nearest - _without_noise(parts["vector"])) / max(self.nearest - self.farthest, _SPREAD)
            scores = self.words_weight * parts["words"] + (1 - self.words_weight) * (1 - below).clip(0.0, 1.0)
        return Candidates(labels, rows, scores, parts)


def best(candidates: Candidates, k: int, least: float | None) -> Candidates:
    """The k candidates with the highest scores, the best first; only those that score at least `least`, if given."""
    scores = candidates.scores.round(6)
    places = np.lexsort((-candidates.rows, -scores))
    if least is not None:
        places = places[scores[places] >= least]
    places = places[:k]
    return candidates.at(places)._replace(scores=scores[places])


def _weight(bm25: Numbers) -> float:
    """The share of the words in a mean, in [0, 1); 0 if no candidate has a word of the query."""
    greatest = float(bm25.max(initial=0.0))
    if greatest == 0:
        return 0.0
    peak = greatest / math.sqrt(float(bm25 @ bm25) / max(len(bm25), _CROWD))
    return peak / (peak + EVEN_PEAK)


def _without_noise(cosines: Numbers) -> Numbers:
    """Cosine similarities, of which those that may be equal are: the newest of equal memories must come first."""
    order = np.argsort(-cosines)
    falling = cosines[order]
    steps = np.diff(falling, prepend=np.inf) < -_EQUAL
    equal = np.empty_like(cosines)
    equal[order] = falling[steps][np.cumsum(steps) - 1]
    return equal
