"""The order of threads, kept up to date in small steps, against a sort of all rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from store.index import timeline
from store.index.timeline import Period, Timeline
from store.log.reading import NO_THREAD, Places


def expected(
    places: Places, alive: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64], row: int, n: int
) -> list[int]:
    """The n rows before and after a row in its thread, as a sort of all rows gives them."""
    thread = int(places.threads[row])
    rows = [other for other in np.flatnonzero(alive).tolist() if places.threads[other] == thread]
    rows.sort(key=lambda other: (places.created[other], labels[other]))
    if thread == NO_THREAD:
        return [-1] * (2 * n)
    at = rows.index(row)
    padded = [*[-1] * n, *rows, *[-1] * n]
    return [*padded[at : at + n], *padded[at + n + 1 : at + 2 * n + 1]]


@pytest.mark.parametrize("inserted", [0, 3, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_neighbours_are_those_of_a_full_sort(monkeypatch: pytest.MonkeyPatch, inserted: int, seed: int) -> None:
    """Rows are added, die and are renumbered; new ones are inserted into the order, or all are sorted."""
    monkeypatch.setattr(timeline, "_INSERTED", inserted)
    rng = np.random.default_rng(seed)
    found, alive, labels = Timeline(), np.zeros(0, np.bool_), np.zeros(0, np.int64)
    for _ in range(30):
        count = int(rng.integers(0, 6))
        created = rng.integers(0, 8, count)  # many are equal
        found.add(Places(created, created + 1, rng.integers(0, 4, count)))
        alive = np.concatenate([alive, np.ones(count, np.bool_)])
        labels = np.concatenate([labels, rng.permutation(count) + len(labels)])
        alive[rng.random(len(alive)) < 0.05] = False
        if rng.random() < 0.1:
            kept = np.flatnonzero(alive)
            found.keep(kept)
            alive, labels = alive[kept], labels[kept]
        rows, n = np.flatnonzero(alive), int(rng.integers(1, 4))
        near = found.neighbours(rows, n, alive, labels)
        places = found.places_of(np.ones(len(alive), np.bool_))
        assert near.tolist() == [expected(places, alive, labels, row, n) for row in rows.tolist()]


def test_a_period_has_its_beginning_and_not_its_end() -> None:
    found = Timeline(Places(np.array([1, 2, 3]), np.zeros(3, np.int64), np.zeros(3, np.int64)))
    for period, inside in (
        (Period(), [True, True, True]),
        (Period(2), [False, True, True]),
        (Period(None, 2), [True, False, False]),
        (Period(2, 3), [False, True, False]),
    ):
        assert found.made_in(period).tolist() == inside


def test_the_places_of_dead_rows_are_not_saved() -> None:
    found = Timeline(Places(np.array([1, 2]), np.array([3, 4]), np.array([5, 6])))
    saved = found.places_of(np.array([True, False]))
    assert [part.tolist() for part in saved] == [[1, 0], [3, 0], [5, 0]]
