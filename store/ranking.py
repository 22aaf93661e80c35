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

EVEN_PEAK = 5.0
"""Words and vectors weigh the same if the best memory by words has so many times the root mean square of all."""

_CROWD = 100  # candidates, at least: the mean of a few says little, so the missing ones count as no match at all
_EQUAL = 2e-6  # scores that differ by less may be equal after rounding

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
    it is the weighted mean of the two, each scaled so that the best has 1; negative measures count as 0. The words
    weigh more if their best memory stands out more from the root mean square of the candidates: a word that one memory
    has outweighs the vectors, and a word that all of them have does not.

    cosine, bm25: the best of the candidates; 0 if none is above 0. None if the search does without this measure.
    words_weight: the share of the words in the mean.
    """

    cosine: float | None
    bm25: float | None
    words_weight: float

    @classmethod
    def of(cls, cosines: Numbers | None, bm25: Numbers | None) -> Fusion:
        """The fusion for a query whose candidates have these measures."""
        cosine, words = (None if found is None else float(found.max(initial=0.0)) for found in (cosines, bm25))
        return cls(cosine, words, 0.0 if bm25 is None else _weight(bm25))

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
            parts["words"] = _scaled(bm25, self.bm25).round(6)
        if self.bm25 is None:
            scores = parts["vector"]
        elif self.cosine is None:
            scores = parts["words"]
        else:
            weight = self.words_weight
            scores = weight * parts["words"] + (1 - weight) * _scaled(parts["vector"], self.cosine)
        return Candidates(labels, rows, scores, parts)


def best(candidates: Candidates, k: int, least: float | None) -> Candidates:
    """The k candidates with the highest scores, the best first; only those that score at least `least`, if given."""
    order = np.argsort(-candidates.scores, kind="stable")
    scores = candidates.scores[order]
    if len(candidates.parts) > 1 and len(scores):
        follows = np.diff(scores) < -_EQUAL
        scores = scores[np.flatnonzero(np.append(True, follows))][np.append(0, np.cumsum(follows))]
    scores = scores.round(6)
    place = np.lexsort((-candidates.rows[order], -scores))
    if least is not None:
        place = place[scores[place] >= least]
    place = place[:k]
    return candidates.at(order[place])._replace(scores=scores[place])


def _weight(bm25: Numbers) -> float:
    """The share of the words in a mean, in [0, 1); 0 if no candidate has a word of the query."""
    greatest = float(bm25.max(initial=0.0))
    if greatest == 0:
        return 0.0
    peak = greatest / math.sqrt(float(bm25 @ bm25) / max(len(bm25), _CROWD))
    return peak / (peak + EVEN_PEAK)


def _scaled(values: Numbers, greatest: float | None) -> Numbers:
    """Values divided by the greatest, in [0, 1]."""
    return np.clip(values / greatest, 0.0, 1.0) if greatest else np.zeros(len(values))
