"""The indexes in memory: those that were used most recently and fit a budget of bytes, as measured.

Guarantees: after `trim` the indexes together take at most `budget_bytes`, or there is only one. An index is evicted
whole. A user whose index is not in memory takes none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from store.index.user_index import UserIndex


class Resident:
    """Indexes by uid, least recently used first."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.bytes = self.peak_bytes = 0
        self.evictions = 0
        self._indexes: OrderedDict[int, tuple[UserIndex, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._indexes)

    def __iter__(self) -> Iterator[UserIndex]:
        return iter([index for index, _ in self._indexes.values()])

    def get(self, uid: int) -> UserIndex | None:
        """The user's index, if it is in memory."""
        found = self._indexes.get(uid)
        return found[0] if found else None

    def put(self, index: UserIndex) -> None:
        """Add or measure an index, as the most recently used."""
        self.measure(index)
        self._indexes.move_to_end(index.uid)

    def measure(self, index: UserIndex) -> None:
        """Record the size of an index."""
        old = self._indexes.get(index.uid)
        size = index.bytes
        self.bytes += size - (old[1] if old else 0)
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        self._indexes[index.uid] = (index, size)

    def drop(self, uid: int) -> None:
        """Drop an index."""
        found = self._indexes.pop(uid, None)
        if found:
            self.bytes -= found[1]

    def trim(self) -> None:
        """Evict the least recently used indexes until the others fit the budget."""
        while self.bytes > self.budget_bytes and len(self._indexes) > 1:
            self.drop(next(iter(self._indexes)))
            self.evictions += 1

    def clear(self) -> None:
        """Drop every index."""
        self._indexes.clear()
        self.bytes = 0
