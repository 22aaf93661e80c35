"""When the memories of one user were made and what they tell happened, and their threads: a part of the user's index.

Rows are those of the index. Times are in microseconds since 1970 UTC.
"""

from __future__ import annotations

from bisect import bisect
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from store.index.matrix import Rows, grown
from store.log.reading import NO_THREAD, Places

_INSERTED = 1000  # new rows; if there are more, all rows are sorted


class Period(NamedTuple):
    """The time from `since` on and before `until`, in microseconds; None is no limit."""

    since: int | None = None
    until: int | None = None


ANY_TIME = Period()


def nowhere(n: int) -> Places:
    """The places of n memories that are in no thread, at the time 0."""
    return Places(*np.zeros((3, n), np.int64))


class Timeline:
    """The places of an index's rows."""

    __slots__ = ("_order", "_ordered", "_place", "_rows", "created", "happened", "threads")

    def __init__(self, places: Places | None = None) -> None:
        self.created, self.happened, self.threads = places or nowhere(0)
        self._rows = len(self.created)
        self._forget_order()

    def _forget_order(self) -> None:
        """`_order` has the rows that are in threads, thread by thread, and `_place` where a row is in it, or -1.

        `_ordered` are the numbers of rows, and of rows alive, that they were made for.
        """
        self._order = self._place = np.zeros(0, np.int64)
        self._ordered = (0, 0)

    @property
    def bytes(self) -> int:
        """Memory that this takes."""
        return 3 * self.created.nbytes + self._order.nbytes + self._place.nbytes + 500

    def add(self, places: Places) -> None:
        """Add rows."""
        first, self._rows = self._rows, self._rows + len(places.created)
        if self._rows > len(self.created):
            capacity = self._rows if first == 0 else self._rows + self._rows // 16 + 4
            for name in Places._fields:
                setattr(self, name, grown(getattr(self, name), first, capacity))
        for name, values in places._asdict().items():
            getattr(self, name)[first : self._rows] = values

    def put(self, rows: Rows, places: Places) -> None:
        """Replace the places of rows."""
        for name, values in places._asdict().items():
            getattr(self, name)[rows] = values
        self._forget_order()

    def keep(self, rows: Rows) -> None:
        """Keep these rows alone, in this order."""
        for name in Places._fields:
            setattr(self, name, getattr(self, name)[rows])
        self._rows = len(rows)
        self._forget_order()

    def places_of(self, alive: npt.NDArray[np.bool_]) -> Places:
        """The places of all rows; 0 for those that are not alive."""
        return Places(*(np.where(alive, getattr(self, name)[: self._rows], 0) for name in Places._fields))

    def made_in(self, period: Period) -> npt.NDArray[np.bool_]:
        """(rows,) whether a memory was made in a period."""
        inside = np.ones(self._rows, np.bool_)
        created = self.created[: self._rows]
        if period.since is not None:
            inside &= created >= period.since
        if period.until is not None:
            inside &= created < period.until
        return inside

    def neighbours(
        self, rows: Rows, n: int, alive: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """(m, 2n) int64: the n rows before and the n after each of m rows in its thread, -1 if there are not so many.

        The first n columns are those before a row, the nearest of them last.

        Args:
            alive: (rows,) the rows that count; the others are in no thread.
            labels: (rows,) which order memories of one thread that were made at one time.
        """
        state = (self._rows, int(np.count_nonzero(alive)))  # rows are only added, or die, until `keep`
        if state != self._ordered:
            self._update_order(alive, labels)
            self._ordered = state
        steps = np.concatenate([np.arange(-n, 0), np.arange(1, n + 1)])
        places = self._place[rows][:, None] + steps  # (m, 2n)
        inside = (places >= 0) & (places < len(self._order)) & (self._place[rows] >= 0)[:, None]
        if not inside.any():
            return np.full(places.shape, -1)
        found = self._order[np.where(inside, places, 0)]
        return np.where(inside & (self.threads[found] == self.threads[rows][:, None]), found, -1)

    def _update_order(self, alive: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64]) -> None:
        """Bring the order up to date. A few new rows are inserted into it, since sorting takes 50 ms at 100,000."""
        first = self._ordered[0]
        threads = self.threads[: self._rows]
        new = np.flatnonzero(alive[first:] & (threads[first:] != NO_THREAD)) + first
        old = self._order[alive[self._order]]
        if len(new) > _INSERTED:
            rows = np.concatenate([old, new])
            self._order = rows[np.lexsort((labels[rows], self.created[rows], threads[rows]))]
        else:
            new = new[np.lexsort((labels[new], self.created[new], threads[new]))]
            of_order = threads[old]
            begins = of_order.searchsorted(threads[new], "left").tolist()
            ends = of_order.searchsorted(threads[new], "right").tolist()

            def key(row: int) -> tuple[int, int]:
                return int(self.created[row]), int(labels[row])

            at = [
                bisect(old, key(row), begin, end, key=key)
                for row, begin, end in zip(new.tolist(), begins, ends, strict=True)
            ]
            self._order = np.insert(old, at, new)
        self._place = np.full(self._rows, -1)
        self._place[self._order] = np.arange(len(self._order))
