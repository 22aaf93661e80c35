"""Vectors that were computed before, in front of the queue: a byte-bounded LRU and single flight.

A hit is bit-identical to the miss that filled it. The same text asked for twice at once is computed once. Holds full
vectors: dimensions and output types are applied after it. Lost with the process; belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

# What an entry costs beside its vector: key, objects and the dictionary's slot.
_ENTRY_BYTES = 400

Key = bytes


@dataclass(frozen=True, slots=True, eq=False)
class CachedVector:
    """A full vector (dim,) float32, read-only, and what usage needs of it."""

    vector: np.ndarray
    tokens: int
    truncated: bool


Compute = Callable[[list[int]], Awaitable[Sequence[CachedVector]]]


def cache_key(revision: str, prompt: str, truncate: str, given: str | Sequence[int]) -> Key:
    """16 bytes that name a computation; two that differ collide with probability 2^-64 among four billion."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (revision, prompt, truncate):
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    if isinstance(given, str):
        digest.update(b"t" + given.encode("utf-8", "surrogatepass"))
    else:
        digest.update(b"i" + np.asarray(given, dtype="<i8").tobytes())
    return digest.digest()


class VectorCache:
    """Least recently used vectors within `max_bytes`; 0 turns it off.

    Attributes:
        hits, misses: lookups since the start. One that waits for another's computation is a hit.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[Key, CachedVector] = OrderedDict()
        self._flights: dict[Key, asyncio.Future[CachedVector]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> CachedVector | None:
        """The entry, now the most recently used; None if it is not there. Does not count as hit or miss."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: Key, entry: CachedVector) -> None:
        """Keep an entry, at the cost of the least recently used. One larger than the whole cache is not kept."""
        size = entry.vector.nbytes + _ENTRY_BYTES
        if size > self.max_bytes:
            return
        old = self._entries.pop(key, None)
        if old is not None:
            self.bytes -= old.vector.nbytes + _ENTRY_BYTES
        self._entries[key] = entry
        self.bytes += size
        self._evict()

    def resize(self, max_bytes: int) -> None:
        """Keep at most so many bytes from now on."""
        self.max_bytes = max_bytes
        self._evict()

    def _evict(self) -> None:
        while self.bytes > self.max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.bytes -= evicted.vector.nbytes + _ENTRY_BYTES

    async def get_or_compute(self, keys: Sequence[Key], compute: Compute) -> list[CachedVector]:
        """The entries of `keys`, in order; what is neither kept nor being computed is computed in one call.

        Args:
            keys: of the inputs; equal ones are computed once.
            compute: takes indices into `keys`, returns an entry each.

        Raises:
            Exception: what `compute` raises. Whoever waits for the same key then computes it anew; when the one who
                computes is cancelled, one of those who wait takes over.
        """
        wanted: dict[Key, int] = {}
        for index, key in enumerate(keys):
            wanted.setdefault(key, index)
        absent = sum(key not in self._entries and key not in self._flights for key in wanted)
        self.misses += absent
        self.hits += len(keys) - absent
        found = await self._resolve(wanted, compute)
        return [found[key] for key in keys]

    async def _resolve(self, wanted: dict[Key, int], compute: Compute) -> dict[Key, CachedVector]:
        found: dict[Key, CachedVector] = {}
        mine: dict[Key, int] = {}
        theirs: dict[Key, asyncio.Future[CachedVector]] = {}
        for key, index in wanted.items():
            if (entry := self.get(key)) is not None:
                found[key] = entry
            elif (flight := self._flights.get(key)) is not None:
                theirs[key] = flight
            else:
                mine[key] = index
        if mine:
            found |= await self._fly(mine, compute)
        failed: dict[Key, int] = {}
        abandoned: dict[Key, int] = {}
        for key, flight in theirs.items():
            await asyncio.wait([flight])
            if flight.cancelled():
                abandoned[key] = wanted[key]
            elif flight.exception() is not None:
                failed[key] = wanted[key]
            else:
                found[key] = flight.result()
        if failed:
            # Their request failed, perhaps for another of its texts: only a try of one's own can tell.
            found |= self._keep(failed, await compute(list(failed.values())))
        if abandoned:
            found |= await self._resolve(abandoned, compute)
        return found

    async def _fly(self, mine: dict[Key, int], compute: Compute) -> dict[Key, CachedVector]:
        loop = asyncio.get_running_loop()
        flights: dict[Key, asyncio.Future[CachedVector]] = {key: loop.create_future() for key in mine}
        self._flights |= flights
        try:
            made = self._keep(mine, await compute(list(mine.values())))
        except Exception as error:
            for flight in flights.values():
                flight.set_exception(error)
                flight.exception()  # whoever waits asks again; if nobody does, that is no news either
            raise
        else:
            for key, flight in flights.items():
                flight.set_result(made[key])
            return made
        finally:
            for key, flight in flights.items():
                flight.cancel()  # does nothing to one that has its result
                del self._flights[key]

    def _keep(self, wanted: dict[Key, int], entries: Sequence[CachedVector]) -> dict[Key, CachedVector]:
        made = dict(zip(wanted, entries, strict=True))
        for key, entry in made.items():
            entry.vector.setflags(write=False)
            self.put(key, entry)
        return made
