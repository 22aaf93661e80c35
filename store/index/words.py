"""The words of one user's live memories, ranked by BM25: a cache of the log, as the vectors are.

Guarantees: a search finds only memories that were added and not removed since. Its scores depend on nothing but the
texts of the memories that may be found: neither removed or filtered memories nor other users count. `arrays`, which is
what a snapshot holds, has nothing of a removed memory. No word is kept as text: a word is known by a hash.

A word's postings are in segments, as in a log-structured merge tree: memories that are added together make a segment,
and small segments are merged. In each, the postings are sorted by word, then by age.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from store.index.matrix import grown
from store.index.tokens import keys_of, query_keys

Labels = npt.NDArray[np.int64]
_MAX_COUNT = 255  # occurrences of a word in one memory; more count as so many


class Arrays(NamedTuple):
    """What `Words.restore` needs.

    labels: (memories,) int64, the oldest first.
    lengths: (memories,) int32, the number of words of each.
    words: (words,) int64, ascending, the hashes of the words.
    starts: (words,) int32, the position of the first posting of each.
    rows: (postings,) int32, the position of a memory in `labels`, ascending for each word.
    counts: (postings,) uint8, how often the word occurs in it.
    """

    labels: Labels
    lengths: npt.NDArray[np.int32]
    words: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    counts: npt.NDArray[np.uint8]


class Ranked(NamedTuple):
    """labels (n,) int64 and their scores (n,) float32, above 0, best first, ties by newest."""

    labels: Labels
    scores: npt.NDArray[np.float32]


class _Segment(NamedTuple):
    """The postings of some memories. The fields are those of `Arrays`."""

    words: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    counts: npt.NDArray[np.uint8]

    @property
    def bytes(self) -> int:
        return self.words.nbytes + self.starts.nbytes + self.rows.nbytes + self.counts.nbytes + 500

    def of(self, word: int) -> slice:
        """The postings of a word."""
        at = int(self.words.searchsorted(word))
        if at == len(self.words) or self.words[at] != word:
            return slice(0, 0)
        return slice(int(self.starts[at]), int(self.starts[at + 1]) if at + 1 < len(self.starts) else len(self.rows))

    def expanded(self) -> npt.NDArray[np.int64]:
        """The word of each posting."""
        return np.repeat(self.words, np.diff(self.starts, append=len(self.rows)))


class Words:
    """The words of memories with their labels. A memory whose text has no words is never found.

    Args:
        k1, b: the parameters of BM25 (https://doi.org/10.1561/1500000019, section 3.5): how soon repetitions of a word
            stop counting, and how much a long text counts less.
    """

    def __init__(self, k1: float = 1.2, b: float = 0.75) -> None:
        self.k1 = k1
        self.b = b
        self._rows = 0
        self._dead = 0
        self._labels = np.zeros(0, np.int64)
        self._lengths = np.zeros(0, np.int32)
        self._alive = np.zeros(0, np.bool_)
        self._segments: list[_Segment] = []  # the oldest first, and each much larger than the next

    @property
    def live(self) -> int:
        """Number of memories."""
        return self._rows - self._dead

    @property
    def bytes(self) -> int:
        """Memory that the words take."""
        rows = self._labels.nbytes + self._lengths.nbytes + self._alive.nbytes
        return rows + sum(segment.bytes for segment in self._segments) + 500

    def add(self, labels: Labels, texts: Sequence[str]) -> None:
        """Add memories, whose labels (n,) are not there."""
        count = len(labels)
        if count == 0:
            return
        found = [keys_of(text) for text in texts]
        first, self._rows = self._rows, self._rows + count
        if self._rows > len(self._labels):
            capacity = self._rows if first == 0 else self._rows + self._rows // 16 + 4
            self._labels, self._lengths, self._alive = (
                grown(array, first, capacity) for array in (self._labels, self._lengths, self._alive)
            )
        part = slice(first, self._rows)
        lengths = np.fromiter(map(len, found), np.int32, count)
        self._labels[part], self._lengths[part], self._alive[part] = labels, lengths, True
        words = np.fromiter((word for words in found for word in words), np.int64, int(lengths.sum()))
        rows = np.repeat(np.arange(first, self._rows, dtype=np.int32), lengths)
        self._segments.append(_counted(words, rows))
        while len(self._segments) > 1 and 2 * len(self._segments[-1].rows) >= len(self._segments[-2].rows):
            newer, older = self._segments.pop(), self._segments.pop()
            self._segments.append(_merged([older, newer]))

    def remove(self, labels: Labels) -> None:
        """Remove memories. Labels that are not there are ignored."""
        alive = self._alive[: self._rows]
        gone = alive & np.isin(self._labels[: self._rows], labels)
        alive[gone] = False
        self._dead += int(np.count_nonzero(gone))

    def search(self, query: str, k: int, allowed: Labels | None = None) -> Ranked:
        """The k memories that rank highest, among the labels `allowed` if given. There may be fewer."""
        scores = self._scores(query, allowed)
        rows = np.flatnonzero(scores)
        if k < len(rows):
            threshold = np.partition(scores[rows], len(rows) - k)[len(rows) - k]
            rows = rows[scores[rows] >= threshold]
        rows = rows[np.lexsort((-rows, -scores[rows]))][:k]
        return Ranked(self._labels[rows], scores[rows])

    def scores_of(self, query: str, labels: Labels, allowed: Labels | None = None) -> npt.NDArray[np.float32]:
        """(n,) the scores of memories, 0 for one that is not there. `allowed` as in `search`."""
        alive = np.flatnonzero(self._alive[: self._rows])
        scores = self._scores(query, allowed)[alive]
        order = np.argsort(self._labels[alive])
        at = np.searchsorted(self._labels[alive], labels, sorter=order)
        found = np.zeros(len(labels), np.float32)
        inside = at < len(alive)
        rows = order[at[inside]]
        found[inside] = np.where(self._labels[alive][rows] == labels[inside], scores[rows], 0)
        return found

    def maintain(self, max_deleted_share: float) -> None:
        """Free removed memories if they are a larger share than this."""
        if self._dead > self._rows * max_deleted_share:
            self._compact()

    def arrays(self) -> Arrays:
        """The memories as a snapshot holds them."""
        self._compact()
        return Arrays(self._labels, self._lengths, *self._segments[0])

    @classmethod
    def restore(cls, arrays: Arrays, k1: float = 1.2, b: float = 0.75) -> Words:
        """The words that had these arrays."""
        words = cls(k1, b)
        words._labels, words._lengths = arrays.labels, arrays.lengths
        words._rows = len(arrays.labels)
        words._alive = np.ones(words._rows, np.bool_)
        words._segments = [_Segment(*arrays[2:])]
        return words

    def _scores(self, query: str, allowed: Labels | None) -> npt.NDArray[np.float32]:
        """(rows,) the score of each memory; 0 if it has no word of the query or may not be found."""
        usable = self._alive[: self._rows]
        if allowed is not None:
            usable = usable & np.isin(self._labels[: self._rows], allowed)
        scores = np.zeros(self._rows, np.float32)
        live = int(np.count_nonzero(usable))
        if live == 0:
            return scores
        average = max(float(self._lengths[: self._rows][usable].mean()), 1.0)
        for word, times in query_keys(query).items():
            parts = [(segment, segment.of(word)) for segment in self._segments]
            rows = np.concatenate([segment.rows[at] for segment, at in parts])
            counts = np.concatenate([segment.counts[at] for segment, at in parts])
            kept = usable[rows]
            rows, counts = rows[kept], counts[kept].astype(np.float32)
            rarity = times * np.log1p((live - len(rows) + 0.5) / (len(rows) + 0.5))
            norm = self.k1 * (1 - self.b + self.b * self._lengths[rows] / average)
            scores[rows] += (rarity * (self.k1 + 1) * counts / (counts + norm)).astype(np.float32)
        return scores

    def _compact(self) -> None:
        """Drop removed memories, and merge all segments."""
        alive = self._alive[: self._rows]
        number = (np.cumsum(alive) - 1).astype(np.int32)  # of each live row, without the dead
        kept = []
        for segment in self._segments:
            live = alive[segment.rows]
            kept.append(_sorted(segment.expanded()[live], number[segment.rows[live]], segment.counts[live]))
        self._segments = [_merged(kept)]
        self._labels, self._lengths = self._labels[: self._rows][alive], self._lengths[: self._rows][alive]
        self._rows, self._dead = len(self._labels), 0
        self._alive = np.ones(self._rows, np.bool_)


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
    if not segments:
        return _counted(np.zeros(0, np.int64), np.zeros(0, np.int32))
    words = np.concatenate([segment.expanded() for segment in segments])
    order = np.argsort(words, kind="stable")  # merges what is sorted already
    rows = np.concatenate([segment.rows for segment in segments])[order]
    return _sorted(words[order], rows, np.concatenate([segment.counts for segment in segments])[order])
