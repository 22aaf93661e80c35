"""The indexes that are in memory: the most recently used ones that fit the budget, by measured bytes.

Guarantees: after `trim` the indexes together hold at most `budget_bytes`, or there is only one; an index is evicted
whole. A user that is not resident costs nothing.
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
        """The user's index, where it is resident."""
        found = self._indexes.get(uid)
        return found[0] if found else None

    def put(self, index: UserIndex) -> None:
        """Keep an index, and measure it anew, as the most recently used."""
        self.measure(index)
        self._indexes.move_to_end(index.uid)

    def measure(self, index: UserIndex) -> None:
        """Take note of the index's size."""
        old = self._indexes.get(index.uid)
        size = index.bytes
        self.bytes += size - (old[1] if old else 0)
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        self._indexes[index.uid] = (index, size)

    def drop(self, uid: int) -> None:
        """Forget an index."""
        found = self._indexes.pop(uid, None)
        if found:
            self.bytes -= found[1]

    def trim(self) -> None:
        """Evict the least recently used until the rest fits the budget."""
        while self.bytes > self.budget_bytes and len(self._indexes) > 1:
            self.drop(next(iter(self._indexes)))
            self.evictions += 1

    def clear(self) -> None:
        """Forget every index."""
        self._indexes.clear()
        self.bytes = 0
