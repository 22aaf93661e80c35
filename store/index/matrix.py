"""The vectors of consecutive rows in memory, searched exactly, with one matrix product per query."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from store.records import Vector

Rows = npt.NDArray[np.int64]
"""Numbers of rows."""

BLOCK = 4096  # rows that are allocated, and freed, together
_PRODUCT = 400_000  # numbers a matrix product: above, OpenBLAS uses all cores, and waits for them if they are busy


class Matrix:
    """Rows `first` to `end - 1` with their vectors, L2-normalised, in blocks of `BLOCK` rows."""

    __slots__ = ("_blocks", "dim", "end", "first")

    def __init__(self, dim: int, first: int = 0) -> None:
        self.dim = dim
        self.first = self.end = first
        self._blocks: list[Vector] = []  # (BLOCK, dim) each; the last may be shorter

    @property
    def bytes(self) -> int:
        """Memory that the blocks take."""
        return sum(block.nbytes + 120 for block in self._blocks)

    def append(self, vectors: Vector, *, normalise: bool = True) -> None:
        """Add rows at the end. `vectors: (n, dim) float32` need not be normalised, unless `normalise` is False."""
        taken = 0
        while taken < len(vectors):
            block, at = divmod(self.end - self.first, BLOCK)
            fits = min(BLOCK - at, len(vectors) - taken)
            if block == len(self._blocks):
                self._blocks.append(np.zeros((0, self.dim), np.float32))
            if at + fits > len(self._blocks[block]):
                capacity = min(BLOCK, at + fits + (at + fits) // 16) if at else at + fits
                self._blocks[block] = grown(self._blocks[block], at, capacity)
            part = vectors[taken : taken + fits]
            self._blocks[block][at : at + fits] = normalised(part) if normalise else part
            taken += fits
            self.end += fits

    def wipe(self, rows: Rows) -> None:
        """Overwrite the vectors of rows with zeros."""
        for row in rows.tolist():
            block, at = divmod(row - self.first, BLOCK)
            self._blocks[block][at] = 0.0

    def drop_before(self, row: int) -> None:
        """Free the blocks that hold only rows below `row`."""
        while row - self.first >= BLOCK:
            del self._blocks[0]
            self.first += BLOCK
        if row == self.end:
            self._blocks, self.first = [], row

    def scores(self, query: Vector, start: int) -> npt.NDArray[np.float32]:
        """(end - start,) float32: dot products with `query: (dim,) float32` of the rows from `start` on."""
        piece = max(64, _PRODUCT // self.dim)
        scores = []
        for number, block in enumerate(self._blocks):
            first = self.first + number * BLOCK
            begin, end = max(0, start - first), min(len(block), self.end - first)
            scores += [block[at : min(at + piece, end)] @ query for at in range(begin, end, piece)]
        if len(scores) == 1:
            return scores[0]
        return np.concatenate(scores) if scores else np.zeros(0, np.float32)

    def vectors(self, rows: Rows) -> Vector:
        """(n, dim) float32 of the rows, a copy."""
        vectors = np.empty((len(rows), self.dim), np.float32)
        blocks, at = np.divmod(rows - self.first, BLOCK)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            vectors[here] = self._blocks[block][at[here]]
        return vectors


def normalised(vectors: Vector) -> Vector:
    """`vectors: (n, dim) float32` with rows of length 1. Norms are taken in float64: no overflow, no underflow."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    scaled: Vector = (vectors / norms[:, None]).astype(np.float32)
    return scaled


def grown(old: npt.NDArray[Any], used: int, capacity: int) -> npt.NDArray[Any]:
    """A copy of the first `used` items of an array, with room for `capacity`; the rest is zero."""
    new = np.zeros((capacity, *old.shape[1:]), old.dtype)
    new[:used] = old[:used]
    return new
