"""Limits a minute: token buckets that the gateways share.

The store replica that a bucket's name hashes to has the bucket. A gateway takes some of it in advance, a lease, and
admits requests from the lease without asking. When the lease is used up, or a second old, the gateway asks for another
one and gives back what it has not used.

Guarantees:
- What is in the bucket is handed out once. All leases together hold at most `LEASED` of the limit. So what the gateways
  admit together differs from what one bucket would admit by that share, and by what flows into the bucket in a second
  or two.
- If one gateway alone uses a bucket, it admits exactly what the bucket itself would, because it computes the
  bucket too.
- A gateway asks about once a second for each bucket that it uses, and once for each lease that it uses up before. While
  it shares a bucket that is empty, it asks again after `EMPTY_S` at the earliest.
- If a gateway takes more than its lease, because a request has more than the limit or is charged afterwards, it tells
  the store replica at once. So the debt holds for all gateways.
- A gateway that cannot ask admits by its own computation, so the limit then holds for each gateway.

What may be lost: a bucket is in memory alone. If the replica ends, or replicas are added, a bucket may begin anew,
which means full. A key that was not used for a minute has a full bucket, too, so it may use a minute's limit at once,
and the limit again in the minute that follows.

Amounts are requests, or tokens of a model. Times are seconds of a monotonic clock.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from deployments.errors import LocatedError, RateLimited, trace_of

logger = logging.getLogger("memserve.limits")

LEASED = 0.1
"""The share of a limit that all gateways may have in leases."""
LEASE_S = 1.0
EMPTY_S = 0.05
ASK_S = 1.0
"""The longest time that a request waits for a lease."""
_SEEN_S = 60.0  # a gateway that has asked within this time counts as one that uses the bucket
_MAX_BUCKETS = 20_000
_ROUNDING = 1e-6


class TokenBucket:
    """A bucket that holds up to `limit` and fills up within a minute. It is full at first, and may be in debt."""

    __slots__ = ("_at", "_level", "limit")

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at = now

    def level(self, now: float) -> float:
        """How much there is; negative if it is in debt."""
        return min(self.limit, self._level + (now - self._at) * self.limit / 60)

    def set(self, level: float, now: float) -> None:
        """Make the level another one, at most full."""
        self._level = min(self.limit, level)
        self._at = now

    def add(self, amount: float, now: float) -> None:
        """Put an amount in, or take it out if it is negative."""
        self.set(self.level(now) + amount, now)

    def holds(self, amount: float, now: float) -> bool:
        """Whether an amount can be taken. A full bucket holds any amount: it is in debt then."""
        return self.level(now) + _ROUNDING >= min(amount, self.limit)

    def wait_s(self, amount: float, now: float) -> float:
        """The time until `holds` is true."""
        return max(0.0, (min(amount, self.limit) - self.level(now)) * 60 / self.limit)


class Ask(NamedTuple):
    """A gateway's request for a lease.

    Attributes:
        name: of the bucket.
        gateway: that asks.
        limit: of the bucket. If the bucket has another one, it begins anew.
        need: the least amount that is of use.
        unused: of the lease before; negative if more was used than the lease had.
        level: of the bucket and the gateway's lease together, as the gateway has computed it; None if the gateway
            does not know it yet, or no more.
    """

    name: str
    gateway: str
    limit: int
    need: float
    unused: float
    level: float | None


class Lease(NamedTuple):
    """The answer.

    Attributes:
        granted: at least the need, if the bucket holds it.
        left: the level of the bucket without what was granted.
        wait_s: the time until the need can be granted; 0 if it was.
        alone: no other gateway uses the bucket, so what flows into it may be used without asking.
    """

    granted: float
    left: float
    wait_s: float
    alone: bool


class _Shared:
    """A bucket, the gateways that have asked for it, and the one that asked last."""

    __slots__ = ("asked_at", "bucket", "last")

    def __init__(self, limit: int, now: float) -> None:
        self.bucket = TokenBucket(limit, now)
        self.asked_at: dict[str, float] = {}
        self.last = ""


class SharedBuckets:
    """The buckets that one store replica has. Belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shared: OrderedDict[str, _Shared] = OrderedDict()

    def lease(self, ask: Ask) -> Lease:
        """Hand out a part of a bucket, if the bucket holds what is needed."""
        now = self._clock()
        shared = self._shared.get(ask.name)
        if shared is None or shared.bucket.limit != ask.limit:
            shared = self._shared[ask.name] = _Shared(ask.limit, now)
        self._shared.move_to_end(ask.name)
        while len(self._shared) > _MAX_BUCKETS:
            self._shared.popitem(last=False)
        bucket = shared.bucket
        if shared.last == ask.gateway and ask.level is not None:  # it knows when it used what, and so what has flown in
            bucket.set(ask.level, now)
        else:
            bucket.add(ask.unused, now)
        shared.last = ask.gateway
        shared.asked_at[ask.gateway] = now
        shared.asked_at = {gateway: at for gateway, at in shared.asked_at.items() if now - at < _SEEN_S}
        gateways, level, needed = len(shared.asked_at), bucket.level(now), min(ask.need, bucket.limit)
        granted, wait_s = min(level, bucket.limit * LEASED / gateways), 0.0
        if bucket.holds(needed, now):
            granted = max(granted, needed)
        else:
            wait_s = bucket.wait_s(needed, now)
            if gateways > 1:  # another one may need what is left
                granted, wait_s = 0.0, max(wait_s, EMPTY_S)
        granted = max(0.0, granted)
        bucket.add(-granted, now)
        return Lease(granted, bucket.level(now), wait_s, gateways == 1)


AskStore = Callable[[Ask], Awaitable[Lease]]


class LeasedBucket:
    """A bucket as one gateway uses it. Belongs to one event loop.

    Args:
        name: of the bucket, the same in all gateways.
        gateway: the name of this one.
        unit: of the amounts, for messages: `requests` or `tokens`.
    """

    def __init__(
        self, name: str, limit: int, ask: AskStore, *, gateway: str, unit: str, clock: Callable[[], float]
    ) -> None:
        self.limit = limit
        self._name = name
        self._ask = ask
        self._gateway = gateway
        self._unit = unit
        self._clock = clock
        self._computed = TokenBucket(limit, clock())  # the shared bucket and this gateway's lease together
        self._answered = False  # whether the computed level is one of the shared bucket
        self._granted = 0.0  # by the last answer
        self._used = 0.0  # since then
        self._lease = 0.0  # what may still be used of it
        self._leased_at = -math.inf
        self._alone = False
        self._empty_until = -math.inf
        self._empty_for = 0.0  # the least need that was refused until then
        self._renewal: asyncio.Task[None] | None = None

    @property
    def remaining(self) -> int:
        """How much is left, as far as this gateway knows."""
        return max(0, math.floor(self._computed.level(self._clock()) + _ROUNDING))

    @property
    def reset_s(self) -> float:
        """The time until the bucket is full, as far as this gateway knows."""
        return self._computed.wait_s(self.limit, self._clock())

    async def take(self, amount: float) -> None:
        """Take an amount.

        Raises:
            RateLimited: the bucket does not hold it. Nothing was taken.
        """
        needed = min(amount, self.limit)
        while True:
            now = self._clock()
            if now - self._leased_at < LEASE_S:
                if self._leased(now) + _ROUNDING >= needed:
                    self.charge(amount)
                    return
                if self._alone and not self._computed.holds(needed, now):
                    raise self._refusal(amount, self._computed.wait_s(needed, now))
            if now < self._empty_until and needed + _ROUNDING >= self._empty_for:
                raise self._refusal(amount, self._empty_until - now)
            await self._renew(needed)

    def charge(self, amount: float) -> None:
        """Take an amount that is not refused, or give one back if it is negative."""
        now = self._clock()
        self._used += amount
        self._lease -= amount
        self._computed.add(-amount, now)
        if amount > 0 and self._renewal is None and self._lease + self._flown(now) < -_ROUNDING:
            self._begin_to_ask(0.0)

    def _flown(self, now: float) -> float:
        """What has flown into the bucket since the last lease and may be used without asking."""
        return min(now - self._leased_at, LEASE_S) * self.limit / 60 if self._alone else 0.0

    def _leased(self, now: float) -> float:
        """What may be taken without asking."""
        return min(self._lease + self._flown(now), self._computed.level(now))

    async def _renew(self, needed: float) -> None:
        """Ask for a lease, or wait for the one that was asked for."""
        await asyncio.wait([self._renewal or self._begin_to_ask(needed)])

    def _begin_to_ask(self, needed: float) -> asyncio.Task[None]:
        # It serves several requests, so it runs in the context of none.
        loop = asyncio.get_running_loop()
        self._renewal = loop.create_task(self._ask_for(needed), context=contextvars.Context())
        return self._renewal

    async def _ask_for(self, needed: float) -> None:
        """Ask for a lease, and tell what was used of the one before."""
        used, self._lease, self._leased_at = self._used, 0.0, -math.inf
        level, overdrawn = self._computed.level(self._clock()) if self._answered else None, False
        try:
            async with asyncio.timeout(ASK_S):
                ask = Ask(self._name, self._gateway, self.limit, needed, self._granted - used, level)
                lease = await self._ask(ask)
        except Exception as error:  # noqa: BLE001 - without an answer, requests would ask without end
            if not isinstance(error, LocatedError | TimeoutError):  # such as that of a replica of another version
                logger.error("A limit could not be asked for, and is computed here\n%s", trace_of(error))
            now = self._clock()
            self._lease, self._alone = self._computed.level(now), True
        else:
            now = self._clock()
            self._answered = True
            self._used -= used
            self._granted, self._alone = lease.granted, lease.alone
            self._lease = lease.granted - self._used
            self._computed.set(lease.left + self._lease, now)
            self._empty_until, self._empty_for = (-math.inf if lease.alone else now + lease.wait_s), needed
            overdrawn = self._lease < -_ROUNDING  # by amounts that were charged meanwhile
        finally:
            self._renewal = None
        self._leased_at = now
        if overdrawn:
            self._begin_to_ask(0.0)

    def _refusal(self, amount: float, wait_s: float) -> RateLimited:
        wait = max(1, math.ceil(wait_s))
        asked = "" if amount <= 1 else f" This request asks for about {math.ceil(amount)}."
        return RateLimited(
            f"The key has used its limit of {self.limit} {self._unit} a minute.{asked} Try again in {wait} s.",
            retry_after_s=wait,
        )


class KeyLimits(NamedTuple):
    """The buckets of one key; None where it has no limit."""

    requests: LeasedBucket | None
    tokens: LeasedBucket | None

    def by_field(self) -> dict[str, LeasedBucket | None]:
        """The buckets, by the field of a key that has their limit."""
        return {"requests_per_minute": self.requests, "tokens_per_minute": self.tokens}

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers of an answer to this key, as OpenAI names and writes them."""
        found = []
        for unit, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                found += [
                    (f"x-ratelimit-limit-{unit}".encode(), str(bucket.limit).encode()),
                    (f"x-ratelimit-remaining-{unit}".encode(), str(bucket.remaining).encode()),
                    (f"x-ratelimit-reset-{unit}".encode(), duration(bucket.reset_s).encode()),
                ]
        return found


def duration(seconds: float) -> str:
    """A time as OpenAI writes it: `17ms`, `12s`, `1m0s`. Rounded up."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000 - _ROUNDING)}ms" if seconds > 0 else "0s"
    minutes, rest = divmod(math.ceil(seconds - _ROUNDING), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


class RateLimits:
    """The limits of the keys that use one gateway. Belongs to one event loop.

    Args:
        ask: asks the store replica that has a bucket.
        gateway: a name of its own for each gateway.
        requests_per_minute, tokens_per_minute: of keys that have no limit of their own; None for no limit.
    """

    def __init__(
        self,
        ask: AskStore,
        *,
        gateway: str,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._gateway = gateway
        self._requests_per_minute = requests_per_minute
        self._tokens_per_minute = tokens_per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, LeasedBucket] = OrderedDict()

    def reconfigure(self, *, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        """Change these arguments of the constructor. A bucket whose limit changes begins anew."""
        self._requests_per_minute = requests_per_minute
        self._tokens_per_minute = tokens_per_minute

    def of_key(self, id: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> KeyLimits | None:
        """The limits of a key; None if it has none. The numbers are those of the key itself, if it has any."""
        requests = self._requests_per_minute if requests_per_minute is None else requests_per_minute
        tokens = self._tokens_per_minute if tokens_per_minute is None else tokens_per_minute
        if requests is None and tokens is None:
            return None
        return KeyLimits(self._bucket(id, "requests", requests), self._bucket(id, "tokens", tokens))

    def _bucket(self, id: str, unit: str, limit: int | None) -> LeasedBucket | None:
        if limit is None:
            return None
        name = f"{id} {unit}"
        bucket = self._buckets.get(name)
        if bucket is None or bucket.limit != limit:
            bucket = LeasedBucket(name, limit, self._ask, gateway=self._gateway, unit=unit, clock=self._clock)
            self._buckets[name] = bucket
        self._buckets.move_to_end(name)
        while len(self._buckets) > _MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return bucket


tokens_of_request: ContextVar[LeasedBucket | None] = ContextVar("tokens_of_request", default=None)
"""The bucket from which the tokens of the request that is being answered are taken; None if there is no limit."""


@contextmanager
def tokens_from(bucket: LeasedBucket | None) -> Iterator[None]:
    """A context in which the tokens of a request are taken from a bucket; None for no limit."""
    token = tokens_of_request.set(bucket)
    try:
        yield
    finally:
        tokens_of_request.reset(token)
