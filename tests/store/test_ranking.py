"""How measures become scores, and scores an order."""

from __future__ import annotations

import numpy as np
import pytest

from store.ranking import NOBODY, Candidates, Fusion, best


def ranked(
    cosines: list[float] | None, bm25: list[float] | None, k: int = 10, least: float | None = None
) -> Candidates:
    """The best of candidates whose labels are 100, 101 ... and whose rows are 0, 1 ..."""
    sides = [None if side is None else np.array(side, np.float64) for side in (cosines, bm25)]
    rows = np.arange(len(cosines or bm25 or []))
    return best(Fusion.of(*sides).candidates(rows + 100, rows, *sides), k, least)


def test_by_vectors_alone_a_score_is_the_cosine_similarity() -> None:
    found = ranked([0.2, -0.5, 0.9], None)
    assert (found.labels.tolist(), found.scores.tolist()) == ([102, 100, 101], [0.9, 0.2, -0.5])
    assert {name: part.tolist() for name, part in found.parts.items()} == {"vector": [0.9, 0.2, -0.5]}


def test_by_words_alone_the_best_has_one() -> None:
    found = ranked(None, [2.0, 8.0])
    assert (found.labels.tolist(), found.scores.tolist()) == ([101, 100], [1.0, 0.25])


def test_by_both_a_score_is_the_weighted_mean() -> None:
    cosines, bm25 = [0.5, 0.25, -0.25, *[0.0] * 97], [0.0, 2.0, 4.0, *[0.0] * 97]
    found = ranked(cosines, bm25)
    weight = Fusion.of(np.array(cosines), np.array(bm25)).words_weight
    peak = 4.0 / np.sqrt((2.0**2 + 4.0**2) / 100)
    assert weight == pytest.approx(peak / (peak + 6))
    assert found.labels.tolist()[:3] == [102, 101, 100]
    assert found.scores.tolist()[:3] == pytest.approx([weight, weight / 2 + (1 - weight) * 2 / 3, 1 - weight], abs=1e-6)


@pytest.mark.parametrize("others", [1, 5, 99, 199])
def test_a_word_that_one_memory_has_decides(others: int) -> None:
    found = ranked([0.0, *[0.9] * others], [5.0, *[0.0] * others])
    assert found.labels[0] == 100
    assert found.scores[0] > 0.5


def test_a_word_that_all_memories_have_weighs_little() -> None:
    cosines = np.array([0.5] * 150)
    assert Fusion.of(cosines, np.array([1.0, 1.0] * 75)).words_weight == pytest.approx(1 / 7)
    assert Fusion.of(cosines, np.array([1.0, 0.0] * 75)).words_weight == pytest.approx(2**0.5 / (2**0.5 + 6))


@pytest.mark.parametrize("bm25", [[0.0, 0.0, 0.0], None])
def test_if_no_memory_has_a_word_the_order_is_that_of_the_vectors(bm25: list[float] | None) -> None:
    found = ranked([0.25, -0.1, 0.5], bm25)
    assert found.labels.tolist() == [102, 100, 101]
    assert found.scores.tolist() == ([0.5, 0.25, -0.1] if bm25 is None else [1.0, 0.583333, 0.0])


@pytest.mark.parametrize(("cosines", "bm25"), [([0.3], [2.0]), ([0.3] * 4, [2.0] * 4)])
def test_memories_that_are_equally_good_have_one_and_the_newest_come_first(
    cosines: list[float], bm25: list[float]
) -> None:
    found = ranked(cosines, bm25)
    assert found.scores.tolist() == [1.0] * len(cosines)
    assert found.rows.tolist() == list(range(len(cosines)))[::-1]


def test_differences_of_rounding_do_not_decide_between_equal_memories() -> None:
    found = ranked([0.400001, 0.4, 0.400001, 0.1], [3.0, 3.0, 3.0, 0.0])
    assert found.rows.tolist() == [2, 1, 0, 3]
    assert found.scores.tolist() == [1.0, 1.0, 1.0, 0.0]
    found = ranked([0.4, 0.4001, 0.4], [3.0, 3.0, 3.0])
    assert found.rows.tolist() == [1, 2, 0]  # a difference that may be meant, but hardly counts
    assert found.scores[2] > 0.99


def test_a_later_candidate_is_scored_as_the_first_ones_are() -> None:
    cosines, bm25 = np.array([0.5, 0.3]), np.array([2.0, 0.0])
    fusion, rows = Fusion.of(cosines, bm25), np.arange(2)
    first = fusion.candidates(rows, rows, cosines, bm25)
    later = fusion.candidates(rows, rows, np.array([0.3, 0.1]), np.array([0.0, 1.0]))
    assert later.scores[0] == first.scores[1] == 0.0
    assert later.scores[1] == fusion.words_weight / 2  # farther than all candidates


def test_the_least_score_and_the_number_bound_the_answer() -> None:
    assert ranked(None, [4.0, 3.0, 2.0, 1.0], k=2).labels.tolist() == [100, 101]
    assert ranked(None, [4.0, 3.0, 2.0, 1.0], least=0.5).labels.tolist() == [100, 101, 102]
    assert best(NOBODY, 10, None).labels.tolist() == []
    assert ranked([], []).labels.tolist() == []
