"""How recency and neighbours change scores, computed without an index."""

from __future__ import annotations

import numpy as np
import pytest

from store import adjusting
from store.ranking import Candidates

DAY_US = 86_400_000_000


def candidates(*scores: float) -> Candidates:
    """Candidates with the rows 10, 11, ... and these scores."""
    rows = np.arange(10, 10 + len(scores))
    return Candidates(rows + 100, rows, np.array(scores), {"vector": np.array(scores)})


def test_a_score_halves_with_each_half_life_down_to_the_floor() -> None:
    ages = np.array([0, 1, 2, 1000, -5]) * DAY_US
    found = adjusting.with_recency(candidates(1.0, 0.8, 0.8, 0.4, 0.2), -ages, 0, 5 * 86_400.0)
    assert found.parts["recency"].tolist() == [1.0, 0.870551, 0.757858, 0.75, 1.0]
    assert found.scores.round(6).tolist() == [1.0, 0.69644, 0.606287, 0.3, 0.2]


def test_an_old_memory_with_a_negative_score_becomes_no_better() -> None:
    found = adjusting.with_recency(candidates(-0.6), np.array([-1000 * DAY_US]), 0, 86_400.0)
    assert found.scores.tolist() == [pytest.approx(-0.8)]


def test_the_better_neighbour_raises_a_score() -> None:
    near = np.array([[-1, 11], [10, 12], [11, -1], [-1, -1], [99, -1]])  # 99 is no candidate
    found = adjusting.with_neighbours(candidates(0.8, 0.2, -0.5, 0.4, 0.4), near)
    assert found.parts["context"].tolist() == [0.02, 0.32, 0.15, 0.0, 0.0]
    assert found.scores.round(6).tolist() == [0.82, 0.52, -0.35, 0.4, 0.4]


def test_no_score_passes_1() -> None:
    found = adjusting.with_neighbours(candidates(1.0, 0.999999), np.array([[-1, 11], [10, -1]]))
    assert found.scores.max() <= 1.0


def test_nothing_is_adjusted_if_there_are_no_candidates() -> None:
    empty = adjusting.with_neighbours(candidates(), np.zeros((0, 2), np.int64))
    assert adjusting.with_recency(empty, np.zeros(0, np.int64), 0, 1.0).scores.tolist() == []


@pytest.mark.filterwarnings("error")
def test_a_very_short_half_life_gives_old_memories_the_floor() -> None:
    found = adjusting.with_recency(candidates(1.0, 1.0), np.array([-1000 * DAY_US, 0]), 0, 5e-324)
    assert found.scores.tolist() == [0.75, 1.0]
