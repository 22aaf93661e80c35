"""Near duplicates of the memories that a transaction adds: in the log, and among those that it adds itself.

Two memories are near duplicates if the cosine similarity of their vectors, rounded to six decimals, is high enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from store.log.rows import unit_vectors

Find = Callable[[int, npt.NDArray[np.float32], float], list[list[bytes]]]
"""From a uid, vectors (n, dim) float32 of length 1 and the least similarity to the keys of the user's memories in the
log that are near duplicates of each vector, the nearest first."""

Found = dict[tuple[int, float, bytes], list[bytes]]
"""The keys of the near duplicates in the log, by the uid, the least similarity and the bytes of a vector."""


class NearDuplicates:
    """The near duplicates of the memories of one transaction."""

    def __init__(self, found: Found) -> None:
        self._found = found
        self._keys: dict[int, list[bytes]] = {}  # of the memories that the transaction writes, by uid
        self._vectors: dict[int, npt.NDArray[np.float32]] = {}  # (capacity, dim), theirs

    def add(self, uid: int, key: bytes, embedding: bytes) -> None:
        """Note the vector of a memory that the transaction writes, in place of the one that it had."""
        keys = self._keys.setdefault(uid, [])
        vector = unit_vectors([embedding])
        vectors = self._vectors.get(uid, vector)
        if len(keys) == len(vectors):
            vectors = np.concatenate([vectors, np.zeros_like(vectors)])
        vectors[len(keys)] = vector[0]
        self._vectors[uid] = vectors
        keys.append(key)

    def mark(self) -> dict[int, int]:
        """What has been noted so far, for `forget_since`."""
        return {uid: len(keys) for uid, keys in self._keys.items()}

    def forget_since(self, mark: Mapping[int, int]) -> None:
        """Forget what was noted since a mark."""
        for uid, keys in self._keys.items():
            del keys[mark.get(uid, 0) :]

    def of(self, uid: int, embedding: bytes, least: float) -> Iterator[bytes]:
        """The keys of near duplicates of a vector, the nearest first, those in the log before the others."""
        keys = self._keys.get(uid, [])
        newest = {key: place for place, key in enumerate(keys)}
        yield from (key for key in self._found.get((uid, least, embedding), ()) if key not in newest)
        if keys:
            scores = (self._vectors[uid][: len(keys)] @ unit_vectors([embedding])[0]).round(6)
            near = np.flatnonzero(scores >= least)
            for place in near[np.argsort(-scores[near], kind="stable")].tolist():
                if newest[keys[place]] == place:
                    yield keys[place]
