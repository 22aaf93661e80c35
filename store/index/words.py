"""The words of the rows of one user's index, ranked by BM25: a cache of the log, as the vectors are.

Guarantees: a score depends on nothing but the texts of the rows that may be found: neither deleted or filtered rows nor
other users count. `arrays`, which is what a snapshot holds, has nothing of a deleted row. No word is kept as text: a
word is known by a hash.

A word's postings are in segments, as in a log-structured merge tree: rows that are added together make a segment, and
small segments are merged. In each, the postings are sorted by word, then by row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from store.index.matrix import Rows, grown
from store.index.tokens import keys_of_all

Keys = Counter[int]
"""How often each word occurs in a query, by its key."""

_MAX_COUNT = 255  # occurrences of a word in one row; more count as so many
_STEP = 50_000  # postings that one step of a merge handles: about 3 ms
_AT_ONCE = 20_000  # segments of no more postings together are merged when rows are added


class Arrays(NamedTuple):
    """What `Words.restore` needs.

    lengths: (rows,) int32, the number of words of each row.
    words: (words,) int64, ascending, the hashes of the words.
    starts: (words,) int32, the position of the first posting of each.
    rows: (postings,) int32, the row, ascending for each word.
    counts: (postings,) uint8, how often the word occurs in it.
    """

    lengths: npt.NDArray[np.int32]
    words: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    counts: npt.NDArray[np.uint8]


class _Segment(NamedTuple):
    """The postings of some rows. The fields are those of `Arrays`."""

    words: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    counts: npt.NDArray[np.uint8]

    @property
    def bytes(self) -> int:
        return self.words.nbytes + self.starts.nbytes + self.rows.nbytes + self.counts.nbytes + 500

    def places(self, words: npt.NDArray[np.int64]) -> list[tuple[int, slice]]:
        """The number and the postings of each of the words (n,) that occurs."""
        at = self.words.searchsorted(words)
        inside = np.flatnonzero(at < len(self.words))
        there = inside[self.words[at[inside]] == words[inside]].tolist()
        return [(n, slice(int(self.starts[at[n]]), self._start(int(at[n]) + 1))) for n in there]

    def between(self, low: int, high: int) -> _Segment:
        """The part with the words from `low` to `high`."""
        first, end = int(self.words.searchsorted(low)), int(self.words.searchsorted(high, "right"))
        postings = slice(self._start(first), self._start(end))
        return _Segment(
            self.words[first:end], self.starts[first:end] - postings.start, self.rows[postings], self.counts[postings]
        )

    def only(self, kept: npt.NDArray[np.bool_], rows: npt.NDArray[np.int32]) -> _Segment:
        """The postings that are kept, with these numbers of their rows (postings,), in the same order."""
        if not len(self.rows):
            return self
        left = np.add.reduceat(kept, self.starts, dtype=np.int32)
        words, left = self.words[left > 0], left[left > 0]
        starts = np.zeros(len(left), np.int32)
        np.cumsum(left[:-1], out=starts[1:])
        return _Segment(words, starts, rows[kept], self.counts[kept])

    def expanded(self) -> npt.NDArray[np.int64]:
        """The word of each posting."""
        return np.repeat(self.words, np.diff(self.starts, append=len(self.rows)))

    def _start(self, at: int) -> int:
        return int(self.starts[at]) if at < len(self.starts) else len(self.rows)


class _Merge:
    """Neighbouring segments while they are merged, one range of words after another."""

    __slots__ = ("_bounds", "dead", "first", "parts", "segments")

    def __init__(self, first: int, segments: Sequence[_Segment], dead: int) -> None:
        self.first = first  # the place of the first one in the list of all
        self.segments = segments
        self.dead = dead  # rows when the merge began
        self.parts: list[_Segment] = []
        steps = 1 + sum(len(segment.rows) for segment in segments) // _STEP
        self._bounds = [-(2**63) + (2**64 * n) // steps for n in range(1, steps)] + [2**63]  # hashes are uniform

    def step(self, alive: npt.NDArray[np.bool_]) -> _Segment | None:
        """Merge the next range, without the postings of dead rows. Returns the merged segment after the last one."""
        low = -(2**63) if not self.parts else self._bounds[len(self.parts) - 1]
        high = self._bounds[len(self.parts)] - 1
        ranges = [segment.between(low, high) for segment in self.segments]
        self.parts.append(_merged([part.only(alive[part.rows], part.rows) for part in ranges]))
        return _joined(self.parts) if len(self.parts) == len(self._bounds) else None


class Words:
    """The words of numbered rows. Whoever uses them knows which rows are alive, and says so in each call.

    Args:
        k1, b: the parameters of BM25 (https://doi.org/10.1561/1500000019, section 3.5): how soon repetitions of a word
            stop counting, and how much a long text counts less.
    """

    __slots__ = ("_lengths", "_merge", "_purged", "_rows", "_segments", "_total", "b", "k1")

    def __init__(self, k1: float, b: float) -> None:
        self.k1 = k1
        self.b = b
        self._rows = 0
        self._lengths = np.zeros(0, np.int32)
        self._total = 0  # the sum of all lengths
        self._segments: list[_Segment] = []  # the oldest first, and each much larger than the next
        self._merge: _Merge | None = None
        self._purged = 0  # dead rows without postings

    @property
    def bytes(self) -> int:
        """Memory that the words take."""
        parts = self._merge.parts if self._merge is not None else []
        return self._lengths.nbytes + sum(segment.bytes for segment in [*self._segments, *parts]) + 500

    def add(self, rows: Rows, texts: Sequence[str]) -> None:
        """Add rows (n,), whose numbers ascend and are greater than all before, with their texts.

        Numbers that are left out are rows without words.
        """
        if len(rows) == 0:
            return
        words, lengths = keys_of_all(texts)
        self.extend(int(rows[-1]) + 1)
        self._lengths[rows] = lengths
        self._total += len(words)
        self._segments.append(_counted(words, np.repeat(rows.astype(np.int32), lengths)))
        start = self._uneven(most=_AT_ONCE)
        if start is not None:
            self._segments[start:] = [_merged(self._segments[start:])]

    def extend(self, rows: int) -> None:
        """Add rows without words, so that there are so many rows."""
        if rows > len(self._lengths):
            capacity = rows if self._rows == 0 else rows + rows // 16 + 4
            self._lengths = grown(self._lengths, self._rows, capacity)
        self._rows = rows

    def scores(self, query: Keys, usable: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        """(rows,) the BM25 score of each row; 0 if it has no word of the query, or is not one of the usable (rows,)."""
        count = int(np.count_nonzero(usable))
        words = np.fromiter(query, np.int64, len(query))
        places = [(segment, *place) for segment in self._segments for place in segment.places(words)]
        if count == 0 or not places:
            return np.zeros(self._rows, np.float32)
        rows = np.concatenate([segment.rows[at] for segment, _, at in places])
        counts = np.concatenate([segment.counts[at] for segment, _, at in places])
        of = np.repeat([n for _, n, _ in places], [at.stop - at.start for _, _, at in places])
        lengths, total = self._lengths[: self._rows], self._total
        if count < self._rows:
            kept = usable[rows]
            rows, counts, of = rows[kept], counts[kept], of[kept]
            total = int(lengths[usable].sum())
        having = np.bincount(of, minlength=len(words))  # how many rows have each word
        rarity = np.log1p((count - having + 0.5) / (having + 0.5)) * np.fromiter(query.values(), np.int64, len(words))
        norms = self.k1 * (1 - self.b) + self.k1 * self.b / max(total / count, 1.0) * lengths[rows]
        gains = ((self.k1 + 1) * rarity)[of] * (counts / (counts + norms))
        return np.bincount(rows, gains, minlength=self._rows).astype(np.float32)

    def keep(self, rows: Rows) -> None:
        """Renumber the rows: these, which ascend, become 0, 1, 2 ... All others are forgotten."""
        number = np.full(self._rows, -1, np.int32)
        number[rows] = np.arange(len(rows), dtype=np.int32)
        numbers = [number[segment.rows] for segment in self._segments]
        self._segments = [
            segment.only(new >= 0, new)
            for segment, new in zip(self._segments, numbers, strict=True)
            if (new >= 0).any()
        ]
        self._lengths = self._lengths[rows]
        self._rows, self._total = len(rows), int(self._lengths.sum())
        self._merge, self._purged = None, 0

    def maintain(self, alive: npt.NDArray[np.bool_], max_deleted_share: float) -> bool:
        """Do one step of merging. Returns True if there is more to do.

        Segments are merged if one is not much larger than the next, and all of them if a larger share of the rows than
        `max_deleted_share` has died since they were last merged. `alive: (rows,)`.
        """
        if self._merge is None:
            dead = self._rows - int(np.count_nonzero(alive))
            start = 0 if dead - self._purged > self._rows * max_deleted_share else self._uneven()
            if start is None:
                return False
            self._merge = _Merge(start, self._segments[start:], dead)
        merge = self._merge
        merged = merge.step(alive)
        if merged is not None:
            self._segments[merge.first : merge.first + len(merge.segments)] = [merged]
            self._merge = None
            if merge.first == 0:
                self._purged = merge.dead
        return True

    def arrays(self, alive: npt.NDArray[np.bool_]) -> Arrays:
        """The words as a snapshot holds them. `alive: (rows,)`."""
        merged = _merged([segment.only(alive[segment.rows], segment.rows) for segment in self._segments])
        self._segments, self._merge = [merged], None
        self._purged = self._rows - int(np.count_nonzero(alive))
        return Arrays(np.where(alive, self._lengths[: self._rows], 0).astype(np.int32), *merged)

    @classmethod
    def restore(cls, arrays: Arrays, alive: npt.NDArray[np.bool_], k1: float, b: float) -> Words:
        """The words that had these arrays, with the alive rows of that time."""
        words = cls(k1, b)
        words._lengths, words._rows, words._total = arrays.lengths, len(arrays.lengths), int(arrays.lengths.sum())
        words._segments = [_Segment(*arrays[1:])]
        words._purged = words._rows - int(np.count_nonzero(alive))
        return words

    def _uneven(self, most: float = math.inf) -> int | None:
        """The place of the first of the last segments that should be one; None if there are not two.

        Args:
            most: the number of postings that they may have together.
        """
        end = 0 if self._merge is None else self._merge.first + len(self._merge.segments)
        start = len(self._segments) - 1
        size = len(self._segments[start].rows) if self._segments else 0
        while start > end and 2 * size >= (older := len(self._segments[start - 1].rows)) and size + older <= most:
            start, size = start - 1, size + older
        return start if 0 <= start < len(self._segments) - 1 else None


def _counted(words: npt.NDArray[np.int64], rows: npt.NDArray[np.int32]) -> _Segment:
    """The segment of words (n,) and the rows (n,) that they occur in, ascending."""
    order = np.argsort(words, kind="stable")
    words, rows = words[order], rows[order]
    first = np.ones(len(words), np.bool_)  # whether an occurrence is the first of its word in its row
    first[1:] = (words[1:] != words[:-1]) | (rows[1:] != rows[:-1])
    starts = np.flatnonzero(first)
    counts = np.minimum(np.diff(starts, append=len(words)), _MAX_COUNT).astype(np.uint8)
    return _sorted(words[starts], rows[starts], counts)


def _sorted(words: npt.NDArray[np.int64], rows: npt.NDArray[np.int32], counts: npt.NDArray[np.uint8]) -> _Segment:
    """The segment of postings that are sorted by word, then by row."""
    first = np.ones(len(words), np.bool_)
    first[1:] = words[1:] != words[:-1]
    starts = np.flatnonzero(first)
    return _Segment(words[starts], starts.astype(np.int32), rows, counts)


def _merged(segments: Sequence[_Segment]) -> _Segment:
    """One segment of several, the oldest first."""
    if len(segments) == 1:
        return segments[0]
    if not segments:
        return _counted(np.zeros(0, np.int64), np.zeros(0, np.int32))
    words = np.concatenate([segment.expanded() for segment in segments])
    order = np.argsort(words, kind="stable")  # merges what is sorted already
    rows = np.concatenate([segment.rows for segment in segments])[order]
    return _sorted(words[order], rows, np.concatenate([segment.counts for segment in segments])[order])


def _joined(parts: Sequence[_Segment]) -> _Segment:
    """One segment of parts, each of which has greater words than the one before."""
    sizes = np.cumsum([0, *(len(part.rows) for part in parts[:-1])], dtype=np.int32)
    return _Segment(
        np.concatenate([part.words for part in parts]),
        np.concatenate([part.starts + size for part, size in zip(parts, sizes, strict=True)]),
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.counts for part in parts]),
    )
