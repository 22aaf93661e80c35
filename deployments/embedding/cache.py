"""A cache of vectors in front of the queue: least recently used entries within a byte limit, and single flight.

Guarantees:
- A hit is bit-identical to the miss that filled it.
- A text that several requests need at the same time is computed once, except that an urgent request does not wait for
  the computation of a bulk request.
- A request fails only if its own computation fails, never because another request's did; or if its deadline passes
  while it waits for the computation of another request.

The cache holds full vectors; dimensions and output types are applied to what it returns. It is lost with the process,
and it belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deployments.errors import DeadlineExceeded

# The memory of an entry in addition to its vector: the key, the objects and the slot in the dictionary.
_ENTRY_BYTES = 400

Key = bytes


@dataclass(frozen=True, slots=True, eq=False)
class CachedVector:
    """A full vector, (dim,) float32 and read-only, and what the answer says about its input."""

    vector: np.ndarray
    tokens: int
    truncated: bool


Compute = Callable[[list[int]], Awaitable[Sequence[CachedVector]]]
Flights = dict[Key, asyncio.Future[CachedVector]]  # the entries that are being computed


def cache_key(realm: str, revision: str, prompt: str, truncate: str, given: str | Sequence[int]) -> Key:
    """Hash all that determines a vector, and whose request it is, to 16 bytes.

    Among four billion keys, a collision has probability 2^-64. A hit is faster than a miss. So the callers of one realm
    would learn what another realm has sent if both had entries in common.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (realm, revision, prompt, truncate):
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    if isinstance(given, str):
        digest.update(b"t")
        digest.update(given.encode("utf-8", "surrogatepass"))
    else:
        digest.update(b"i" + np.asarray(given, dtype="<i8").tobytes())
    return digest.digest()


class VectorCache:
    """Keeps the most recently used vectors within `max_bytes`; 0 keeps none.

    Args:
        clock: seconds, monotonic; the clock of the deadlines.

    Attributes:
        hits, misses: lookups since the start. A lookup that waits for a computation in progress is a hit.
    """

    def __init__(self, max_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes = max_bytes
        self._clock = clock
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[Key, CachedVector] = OrderedDict()
        self._urgent_flights: Flights = {}
        self._bulk_flights: Flights = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> CachedVector | None:
        """Look up an entry and mark it as the most recently used. Counts neither as a hit nor as a miss."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: Key, entry: CachedVector) -> None:
        """Keep an entry and drop the least recently used ones. An entry larger than the whole cache is not kept."""
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
        """Change the limit and drop the least recently used entries that exceed it."""
        self.max_bytes = max_bytes
        self._evict()

    def _evict(self) -> None:
        while self.bytes > self.max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.bytes -= evicted.vector.nbytes + _ENTRY_BYTES

    async def get_or_compute(
        self, keys: Sequence[Key], compute: Compute, *, bulk: bool = False, deadline: float | None = None
    ) -> list[CachedVector]:
        """Return the entries of `keys`, in order. Entries neither kept nor being computed are computed in one call.

        If a computation fails, each caller that waited for it computes the key again by itself. If the computing caller
        is cancelled, one of the waiting callers takes over.

        Args:
            keys: of the inputs; equal keys are computed once.
            compute: takes indices into `keys` and returns an entry for each.
            bulk: the request may wait for the computations of bulk requests, and urgent requests do not wait for its.
            deadline: until then the request may wait for computations of other requests; None for no limit.

        Raises:
            DeadlineExceeded: the deadline passed while the request waited for the computation of another one.
            Exception: any error that `compute` raises.
        """
        wanted: dict[Key, int] = {}
        for index, key in enumerate(keys):
            wanted.setdefault(key, index)
        absent = sum(key not in self._entries and self._flight(key, bulk) is None for key in wanted)
        self.misses += absent
        self.hits += len(keys) - absent
        found = await self._resolve(wanted, compute, bulk, deadline)
        return [found[key] for key in keys]

    def _flight(self, key: Key, bulk: bool) -> asyncio.Future[CachedVector] | None:
        """The computation in progress that a request may wait for."""
        return self._urgent_flights.get(key) or (self._bulk_flights.get(key) if bulk else None)

    async def _resolve(
        self, wanted: dict[Key, int], compute: Compute, bulk: bool, deadline: float | None
    ) -> dict[Key, CachedVector]:
        found: dict[Key, CachedVector] = {}
        mine: dict[Key, int] = {}
        theirs: dict[Key, asyncio.Future[CachedVector]] = {}
        for key, index in wanted.items():
            if (entry := self.get(key)) is not None:
                found[key] = entry
            elif (flight := self._flight(key, bulk)) is not None:
                theirs[key] = flight
            else:
                mine[key] = index
        if mine:
            found |= await self._fly(mine, compute, self._bulk_flights if bulk else self._urgent_flights)
        failed: dict[Key, int] = {}
        abandoned: dict[Key, int] = {}
        for key, flight in theirs.items():
            remaining_s = None if deadline is None else max(0.0, deadline - self._clock())
            done, _ = await asyncio.wait([flight], timeout=remaining_s)
            if not done:
                raise DeadlineExceeded("The request waited for another one with the same text until its deadline.")
            if flight.cancelled():
                abandoned[key] = wanted[key]
            elif flight.exception() is not None:
                failed[key] = wanted[key]
            else:
                found[key] = flight.result()
        if failed:
            # The other request may have failed because of another of its texts: only a new try can tell.
            found |= self._keep(failed, await compute(list(failed.values())))
        if abandoned:
            found |= await self._resolve(abandoned, compute, bulk, deadline)
        return found

    async def _fly(self, mine: dict[Key, int], compute: Compute, table: Flights) -> dict[Key, CachedVector]:
        loop = asyncio.get_running_loop()
        flights: Flights = {key: loop.create_future() for key in mine}
        table |= flights
        try:
            made = self._keep(mine, await compute(list(mine.values())))
        except Exception as error:
            for flight in flights.values():
                flight.set_exception(error)
                flight.exception()  # marks it as seen: asyncio would log an error that no caller waits for
            raise
        else:
            for key, flight in flights.items():
                flight.set_result(made[key])
            return made
        finally:
            for key, flight in flights.items():
                flight.cancel()  # has no effect on a future that has its result
                del table[key]

    def _keep(self, wanted: dict[Key, int], entries: Sequence[CachedVector]) -> dict[Key, CachedVector]:
        made = dict(zip(wanted, entries, strict=True))
        for key, entry in made.items():
            entry.vector.setflags(write=False)
            self.put(key, entry)
        return made
