"""One user's index: a cache of the log's vectors that answers nearest-neighbour questions.

Guarantees: it never holds anything that the log did not, is never repaired (it is dropped and loaded anew), and an
answer holds min(k, rows that match) rows. Rows are numbered in the order of the log's versions, so that of two rows
the one with the greater number is the newer.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from store.reading import NEVER, Changes
from store.records import IndexOptions, Vector

Rows = npt.NDArray[np.int64]
_EMPTY = np.zeros(0, np.int64)


class Hits(NamedTuple):
    """labels (n,) int64 and scores (n,) float64 in [-1, 1], best first, ties by newest."""

    labels: Rows
    scores: npt.NDArray[np.float64]


class UserIndex:
    """The vectors of one user's live memories, L2-normalised, with their labels."""

    def __init__(self, uid: int, dim: int, options: IndexOptions) -> None:
        self.uid = uid
        self.dim = dim
        self.epoch = 0
        self.version = 0
        self.live = 0
        self._options = options
        self._rows = 0
        self._labels = np.zeros(0, np.int64)
        self._expires = np.zeros(0, np.int64)
        self._alive = np.zeros(0, np.bool_)
        self._vectors = np.zeros((0, dim), np.float32)
        self._next_expiry = int(NEVER)

    @property
    def kind(self) -> Literal["exact", "hnsw"]:
        """How most rows are searched."""
        return "exact"

    @property
    def bytes(self) -> int:
        """Memory that this index holds."""
        return self._labels.nbytes + self._expires.nbytes + self._alive.nbytes + self._vectors.nbytes + 2048

    def apply(self, changes: Changes, version: int) -> None:
        """Take in what the log has after `self.version`, up to `version`."""
        if len(changes.labels):
            self._kill(changes.labels)
            self._add(changes.labels[changes.kept], changes.expires, changes.vectors)
        self.version = version

    def expire(self, now: int) -> None:
        """Leave out the rows whose time is over."""
        if now < self._next_expiry:
            return
        self._bury(np.flatnonzero(self._alive[: self._rows] & (self._expires[: self._rows] <= now)))
        left = self._expires[: self._rows][self._alive[: self._rows]]
        self._next_expiry = int(left.min()) if len(left) else int(NEVER)

    def search(self, query: Vector, k: int, allowed: Rows | None = None) -> Hits:
        """The k nearest rows to `query: (dim,) float32`, among the labels `allowed` where given."""
        rows = np.flatnonzero(self._alive[: self._rows])
        if allowed is not None:
            rows = rows[np.isin(self._labels[rows], allowed)]
        if len(rows) == 0:
            return Hits(_EMPTY, np.zeros(0))
        vectors = self._vectors[: self._rows] if len(rows) == self._rows else self._vectors[rows]
        scores = vectors @ query
        return _best(self._labels[rows], rows, scores, k)

    def _kill(self, labels: Rows) -> None:
        rows = np.flatnonzero(np.isin(self._labels[: self._rows], labels))
        self._bury(rows[self._alive[rows]])

    def _bury(self, rows: Rows) -> None:
        self._alive[rows] = False
        self._vectors[rows] = 0.0
        self.live -= len(rows)

    def _add(self, labels: Rows, expires: Rows, vectors: Vector) -> None:
        needed = self._rows + len(labels)
        if needed > len(self._labels):
            capacity = needed if self._rows == 0 else max(needed, self._rows + self._rows // 8 + 4)
            for name in ("_labels", "_expires", "_alive", "_vectors"):
                old = getattr(self, name)
                new = np.zeros((capacity, *old.shape[1:]), old.dtype)
                new[: self._rows] = old[: self._rows]
                setattr(self, name, new)
        part = slice(self._rows, needed)
        self._labels[part] = labels
        self._expires[part] = expires
        self._alive[part] = True
        self._vectors[part] = normalised(vectors)
        if len(expires):
            self._next_expiry = min(self._next_expiry, int(expires.min()))
        self._rows = needed
        self.live += len(labels)


def normalised(vectors: Vector) -> Vector:
    """`vectors: (n, dim) float32` with rows of length 1. Norms are taken in float64: no overflow, no underflow."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    scaled: Vector = (vectors / norms[:, None]).astype(np.float32)
    return scaled


def _best(labels: Rows, rows: Rows, scores: npt.NDArray[np.float32], k: int) -> Hits:
    if k < len(scores):
        # Equal vectors may differ in the last bit, by their place in the matrix product: keep all that round alike.
        threshold = np.partition(scores, len(scores) - k)[len(scores) - k] - 2e-6
        near = np.flatnonzero(scores >= threshold)
        labels, rows, scores = labels[near], rows[near], scores[near]
    rounded: npt.NDArray[np.float64] = np.clip(np.round(scores.astype(np.float64), 6), -1.0, 1.0)
    order = np.lexsort((-rows, -rounded))[:k]
    return Hits(labels[order], rounded[order])
