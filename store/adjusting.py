"""How the scores of memories change with time, and with the memories before and after them in their threads.

Guarantees: these are pure functions of arrays. Scores stay at most 1, and those that are not negative stay so.

The constants were chosen with six conversations of LoCoMo: see docs/search.md.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from store.ranking import Candidates

LENT = 0.5
"""A memory's score moves so far towards 1 if a neighbour in its thread has the score 1."""

LEAST_RECENCY = 0.75
"""The factor of the oldest memories. Without such a floor, old memories that answer the question are not found."""


def with_recency(candidates: Candidates, happened: npt.NDArray[np.int64], now: int, half_life_s: float) -> Candidates:
    """The candidates, with scores that are multiplied by 2^(-age / half-life), or LEAST_RECENCY if that is more.

    A score below 0 is divided by it.

    Args:
        happened: (n,) int64, when what the memories tell happened, and `now`, in microseconds. What happens later than
            now has the age 0.
    """
    ages_s = np.maximum(now - happened, 0) / 1e6
    with np.errstate(over="ignore"):  # by a very short half-life, after which the factor is 0
        factors = np.maximum(np.exp2(-ages_s / half_life_s), LEAST_RECENCY)
    scores = np.where(candidates.scores < 0, candidates.scores / factors, candidates.scores * factors)
    return candidates._replace(scores=scores, parts={**candidates.parts, "recency": factors.round(6)})


def with_neighbours(candidates: Candidates, neighbours: npt.NDArray[np.int64]) -> Candidates:
    """The candidates, with scores that the better of the two neighbours raises by a part of what lacks to 1.

    Args:
        neighbours: (n, 2) the rows of the memories before and after each in its thread, or -1. A memory that is no
            candidate itself does not count.
    """
    order = np.argsort(candidates.rows)
    known = candidates.rows[order]
    place = np.minimum(known.searchsorted(neighbours), max(len(known) - 1, 0))
    scores = np.where(known[place] == neighbours, candidates.scores[order[place]], 0.0) if len(known) else place
    lent = LENT * scores.max(axis=1, initial=0.0) * (1 - candidates.scores)
    parts = {**candidates.parts, "context": lent.round(6)}
    return candidates._replace(scores=candidates.scores + lent, parts=parts)


def joined(first: Candidates, second: Candidates) -> Candidates:
    """The candidates of both, which have the same parts."""
    parts = {name: np.concatenate([part, second.parts[name]]) for name, part in first.parts.items()}
    arrays = (np.concatenate(pair) for pair in zip(first[:3], second[:3], strict=True))
    labels, rows, scores = arrays
    return Candidates(labels, rows, scores, parts)
