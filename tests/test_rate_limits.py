"""Token buckets that gateways share: what one admits alone, and what several admit together."""

from __future__ import annotations

import asyncio
import random

import pytest

from deployments.errors import RateLimited, Unavailable
from deployments.rate_limits import (
    EMPTY_S,
    LEASE_S,
    Ask,
    KeyLimits,
    Lease,
    LeasedBucket,
    RateLimits,
    SharedBuckets,
    TokenBucket,
    duration,
)
from tests.repetitions import repetitions


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Cluster:
    """Some gateways, and the store replica that has the bucket, with one clock. `asks` counts their calls."""

    def __init__(self, gateways: int, limit: int) -> None:
        self.clock = Clock()
        self.store = SharedBuckets(self.clock)
        self.asks = 0
        self.error: Exception | None = None
        self.gateways = [
            LeasedBucket("key requests", limit, self.ask, gateway=str(n), unit="requests", clock=self.clock)
            for n in range(gateways)
        ]

    async def ask(self, ask: Ask) -> Lease:
        self.asks += 1
        if self.error is not None:
            raise self.error
        return self.store.lease(ask)

    async def admits(self, gateway: int, amount: float = 1) -> bool:
        try:
            await self.gateways[gateway].take(amount)
        except RateLimited:
            return False
        return True


def test_a_bucket_is_full_at_first_and_fills_up_within_a_minute() -> None:
    bucket = TokenBucket(60, 0.0)
    bucket.add(-60, 0.0)
    assert (bucket.level(0.0), bucket.level(30.0), bucket.level(60.0), bucket.level(90.0)) == (0, 30, 60, 60)
    assert (bucket.holds(1, 0.9), bucket.holds(1, 1.0), bucket.wait_s(5, 1.0)) == (False, True, 4.0)


def test_more_than_the_limit_is_taken_from_a_full_bucket_alone() -> None:
    bucket = TokenBucket(60, 0.0)
    assert bucket.holds(100, 0.0)
    bucket.add(-100, 0.0)
    assert (bucket.level(0.0), bucket.holds(1, 40.0), bucket.holds(1, 41.0)) == (-40, False, True)


async def test_a_burst_is_admitted_up_to_the_limit() -> None:
    cluster = Cluster(1, 60)
    assert [await cluster.admits(0) for _ in range(62)] == 60 * [True] + 2 * [False]
    with pytest.raises(RateLimited) as refused:
        await cluster.gateways[0].take(1)
    assert refused.value.message == "The key has used its limit of 60 requests a minute. Try again in 1 s."
    assert (refused.value.code, refused.value.retry_after_s) == ("rate_limit_exceeded", 1)
    cluster.clock.now += 1.0
    assert [await cluster.admits(0) for _ in range(2)] == [True, False]


@pytest.mark.parametrize("limit", [1, 7, 60, 1000, 100_000])
@pytest.mark.parametrize("load", [0.3, 1.0, 3.0])
async def test_one_gateway_admits_exactly_what_the_bucket_would(limit: int, load: float) -> None:
    """At random times, in bursts and pauses, for ten minutes; with corrections of amounts that were estimated."""
    rng = random.Random(f"{limit} {load}")
    cluster = Cluster(1, limit)
    bucket = TokenBucket(limit, cluster.clock.now)
    amounts = [1] if limit < 1000 else [1, limit // 100, limit // 10, 2 * limit]
    mean = sum(amounts) / len(amounts)
    for number in range(repetitions(1500, quick=700)):
        cluster.clock.now += rng.expovariate(load * limit / 60 / mean) if number % 500 else 90
        amount, now = rng.choice(amounts), cluster.clock.now
        expected = bucket.holds(amount, now)
        assert await cluster.admits(0, amount) == expected, number
        if expected:
            correction = rng.choice([0, 0, -amount // 2, amount // 2])
            bucket.add(-amount, now)
            bucket.add(-correction, now)
            cluster.gateways[0].charge(correction)
    assert cluster.gateways[0].remaining == max(0, int(bucket.level(cluster.clock.now) + 1e-6))


@pytest.mark.parametrize("limit", [10, 60, 6000])
@pytest.mark.parametrize(
    "shares", [(1, 1), (1, 1, 1, 1), (20, 1), (20, 1, 1, 1), (8, 4, 2, 1), (1, 1, 1, 1, 1, 1, 1, 1)]
)
@pytest.mark.parametrize("load", [0.5, 1.5, 4.0])
async def test_gateways_admit_together_what_one_bucket_would(limit: int, shares: tuple[int, ...], load: float) -> None:
    """Within 20 %, if requests reach the gateways evenly or not, below the limit and above it.

    At half of the limit none is refused.
    """
    rng = random.Random(f"{limit} {shares} {load}")
    cluster = Cluster(len(shares), limit)
    bucket = TokenBucket(limit, cluster.clock.now)
    admitted = ideal = asked = 0
    end = cluster.clock.now + 600
    while cluster.clock.now < end and asked < repetitions(4_000, quick=600):
        cluster.clock.now += rng.expovariate(load * limit / 60)
        asked += 1
        (gateway,) = rng.choices(range(len(shares)), shares)
        admitted += await cluster.admits(gateway)
        if bucket.holds(1, cluster.clock.now):
            bucket.add(-1, cluster.clock.now)
            ideal += 1
    assert abs(admitted - ideal) <= 0.2 * ideal
    if load < 1:
        assert admitted == asked


@pytest.mark.parametrize("gateways", [2, 4, 8])
@pytest.mark.parametrize("limit", [5, 60, 6000])
async def test_a_burst_over_several_gateways_is_admitted_up_to_the_limit(gateways: int, limit: int) -> None:
    cluster = Cluster(gateways, limit)
    admitted = sum([await cluster.admits(n % gateways) for n in range(3 * limit)])
    assert 0.9 * limit <= admitted <= limit


async def test_after_an_idle_hour_the_leases_add_little() -> None:
    cluster = Cluster(4, 100)
    for n in range(8):
        await cluster.admits(n % 4)
    cluster.clock.now += 3600
    admitted = sum([await cluster.admits(n % 4) for n in range(400)])
    assert 90 <= admitted <= 110


async def test_a_gateway_asks_seldom() -> None:
    """Once for a tenth of the limit, and about once a second; not for each request that is refused."""
    cluster = Cluster(1, 6000)
    for _ in range(12_000):
        cluster.clock.now += 0.005
        await cluster.admits(0)
    assert cluster.asks <= 60 / LEASE_S + 20
    shared = Cluster(2, 6000)
    for n in range(12_000):
        shared.clock.now += 0.005
        await shared.admits(n % 2)
    assert shared.asks <= 60 * 2 / EMPTY_S * 2


async def test_requests_that_wait_for_a_lease_share_it() -> None:
    cluster = Cluster(1, 60)
    assert sum(await asyncio.gather(*(cluster.admits(0) for _ in range(100)))) == 60
    assert cluster.asks <= 12


@pytest.mark.parametrize("error", [Unavailable("away"), TimeoutError(), AttributeError("an older store")])
async def test_a_gateway_that_cannot_ask_counts_by_itself(error: Exception) -> None:
    cluster = Cluster(2, 60)
    cluster.error = error
    assert [sum([await cluster.admits(n) for _ in range(100)]) for n in range(2)] == [60, 60]
    cluster.clock.now += 10
    assert sum([await cluster.admits(0) for _ in range(100)]) == 10
    assert cluster.asks == 3  # not once a request
    cluster.error = None
    cluster.clock.now += LEASE_S
    assert sum([await cluster.admits(n % 2) for n in range(100)]) == 0  # the store is told of what was used meanwhile


async def test_what_a_gateway_gives_back_can_be_used_by_another() -> None:
    cluster = Cluster(2, 100)
    assert await cluster.admits(0, 90)
    cluster.gateways[0].charge(-90)
    cluster.clock.now += LEASE_S
    assert await cluster.admits(0)
    assert await cluster.admits(1, 80)


async def turns(count: int = 5) -> None:
    """Let the tasks that tell the store of a debt end."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_request_that_is_larger_than_the_limit_is_a_debt_in_all_gateways() -> None:
    cluster = Cluster(2, 1000)
    assert await cluster.admits(0, 50_000)
    await turns()
    cluster.clock.now += 61
    assert not await cluster.admits(1, 50_000)
    assert not await cluster.admits(1, 1)
    cluster.clock.now += 50 * 60
    assert await cluster.admits(1, 1)


async def test_an_amount_that_is_charged_afterwards_is_a_debt_in_all_gateways() -> None:
    """Before the gateway has asked for a lease, during its call, and when the lease is long used up."""
    for admitted, pause_s in ((0, 0), (1, 0), (1, 60)):
        cluster = Cluster(2, 1000)
        for _ in range(admitted):
            assert await cluster.admits(0)
        cluster.clock.now += pause_s
        cluster.gateways[0].charge(25_000)
        await asyncio.sleep(0)
        cluster.gateways[0].charge(25_000)
        await turns()
        cluster.clock.now += 61
        assert not await cluster.admits(1, 900), (admitted, pause_s)


async def test_a_debt_is_told_while_a_call_is_in_progress() -> None:
    """By a second call that follows the first one, and none after it."""
    cluster = Cluster(2, 1000)
    called, answer = asyncio.Event(), asyncio.Event()
    ask = cluster.ask

    async def slow(one: Ask) -> Lease:
        lease = await ask(one)
        called.set()
        await answer.wait()
        return lease

    cluster.gateways[0]._ask = slow
    request = asyncio.create_task(cluster.admits(0))
    await called.wait()
    cluster.gateways[0].charge(50_000)
    answer.set()
    assert not await request
    await turns()
    assert cluster.asks == 2
    assert not await cluster.admits(1, 900)


async def test_a_gateway_that_has_dropped_a_bucket_does_not_fill_it_up() -> None:
    cluster = Cluster(1, 60)
    assert sum([await cluster.admits(0) for _ in range(50)]) == 50
    cluster.gateways[0] = LeasedBucket(
        "key requests", 60, cluster.ask, gateway="0", unit="requests", clock=cluster.clock
    )
    assert 4 <= sum([await cluster.admits(0) for _ in range(50)]) <= 10


async def test_a_limit_that_changes_begins_anew() -> None:
    clock = Clock()
    store = SharedBuckets(clock)

    async def ask(ask: Ask) -> Lease:
        return store.lease(ask)

    limits = RateLimits(ask, gateway="one", requests_per_minute=None, tokens_per_minute=None, clock=clock)
    assert limits.of_key("key", None, None) is None
    first = limits.of_key("key", 2, None)
    assert first is not None and first.requests is not None and first.tokens is None
    await first.requests.take(1)
    await first.requests.take(1)
    assert limits.of_key("key", 2, None) == first
    changed = limits.of_key("key", 3, None)
    assert changed is not None and changed.requests is not None and changed.requests.remaining == 3


def test_the_defaults_are_for_keys_without_limits_of_their_own() -> None:
    async def ask(_: Ask) -> Lease:
        raise AssertionError

    limits = RateLimits(ask, gateway="one", requests_per_minute=5, tokens_per_minute=None)
    found = [limits.of_key("a", None, None), limits.of_key("b", 7, 8)]
    assert [
        (one.requests and one.requests.limit, one.tokens and one.tokens.limit) for one in found if one is not None
    ] == [(5, None), (7, 8)]


async def test_the_headers_are_those_of_openai() -> None:
    requests, tokens = (Cluster(1, limit).gateways[0] for limit in (60, 150_000))
    await requests.take(1)
    await tokens.take(16)
    limits = KeyLimits(requests, tokens)
    assert limits.headers() == [
        (b"x-ratelimit-limit-requests", b"60"),
        (b"x-ratelimit-remaining-requests", b"59"),
        (b"x-ratelimit-reset-requests", b"1s"),
        (b"x-ratelimit-limit-tokens", b"150000"),
        (b"x-ratelimit-remaining-tokens", b"149984"),
        (b"x-ratelimit-reset-tokens", b"7ms"),
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0064, "7ms"), (0.9, "900ms"), (1, "1s"), (12.1, "13s"), (60, "1m0s"), (361, "6m1s")],
)
def test_a_duration_is_written_as_openai_writes_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text
