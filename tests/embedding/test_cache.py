"""The cache: hits are bit-identical, memory is bounded, and concurrent lookups of a key share a computation."""

from __future__ import annotations

import asyncio
import tracemalloc

import numpy as np
import pytest

from deployments.embedding.cache import _ENTRY_BYTES, CachedVector, VectorCache, cache_key
from deployments.errors import DeadlineExceeded


def entry(value: float, dim: int = 4) -> CachedVector:
    return CachedVector(np.full(dim, value, np.float32), 3, False)


def keys(*texts: str) -> list[bytes]:
    return [cache_key("t", "r1", "", "end", text) for text in texts]


class Counting:
    """A `compute` that records the indices it was called with, may wait for a gate, and may fail."""

    def __init__(self, gate: asyncio.Event | None = None, fail: bool = False) -> None:
        self.asked: list[list[int]] = []
        self.gate = gate
        self.fail = fail

    async def __call__(self, indices: list[int]) -> list[CachedVector]:
        self.asked.append(indices)
        if self.gate is not None:
            await self.gate.wait()
        if self.fail:
            raise RuntimeError("down")
        return [entry(index + 0.1) for index in indices]


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_hit_is_bit_identical_and_computes_nothing() -> None:
    cache, compute = VectorCache(10_000), Counting()
    first = await cache.get_or_compute(keys("a", "b"), compute)
    second = await cache.get_or_compute(keys("b", "c", "a"), compute)
    assert compute.asked == [[0, 1], [1]]
    assert second[2].vector.tobytes() == first[0].vector.tobytes()
    assert second[0] is first[1]
    assert (cache.hits, cache.misses, len(cache)) == (2, 3, 3)
    with pytest.raises(ValueError, match="read-only"):
        first[0].vector[0] = 0


async def test_equal_texts_of_one_call_are_computed_once() -> None:
    cache, compute = VectorCache(10_000), Counting()
    answers = await cache.get_or_compute(keys("a", "b", "a"), compute)
    assert compute.asked == [[0, 1]]
    assert answers[0] is answers[2]
    assert (cache.hits, cache.misses) == (1, 2)


async def test_concurrent_lookups_of_a_text_compute_it_once() -> None:
    gate = asyncio.Event()
    cache, one, two = VectorCache(10_000), Counting(gate), Counting(gate)
    first = asyncio.create_task(cache.get_or_compute(keys("a", "b"), one))
    await turns()
    second = asyncio.create_task(cache.get_or_compute(keys("c", "b"), two))
    await turns()
    gate.set()
    assert (await first)[1] is (await second)[1]
    assert (one.asked, two.asked) == ([[0, 1]], [[0]])
    assert (cache.hits, cache.misses) == (1, 3)


async def test_if_the_computing_call_is_cancelled_one_of_the_waiting_calls_takes_over() -> None:
    gate = asyncio.Event()
    cache, first, others = VectorCache(10_000), Counting(gate), [Counting(gate) for _ in range(3)]
    gone = asyncio.create_task(cache.get_or_compute(keys("a"), first))
    await turns()
    waiting = [asyncio.create_task(cache.get_or_compute(keys("a"), other)) for other in others]
    await turns()
    gone.cancel()
    await turns()
    gate.set()
    answers = [(await task)[0] for task in waiting]
    assert [other.asked for other in others] == [[[0]], [], []]
    assert answers[0] is answers[1] is answers[2]


async def test_a_call_does_not_fail_because_the_call_that_it_waited_for_failed() -> None:
    gate = asyncio.Event()
    cache, failing, fine = VectorCache(10_000), Counting(gate, fail=True), Counting(gate)
    first = asyncio.create_task(cache.get_or_compute(keys("a", "poison"), failing))
    await turns()
    second = asyncio.create_task(cache.get_or_compute(keys("a"), fine))
    await turns()
    gate.set()
    with pytest.raises(RuntimeError, match="down"):
        await first
    assert (await second)[0].vector[0] == np.float32(0.1)
    assert fine.asked == [[0]]


def test_the_least_recently_used_entry_is_dropped_first() -> None:
    size = 16 + _ENTRY_BYTES
    cache = VectorCache(3 * size)
    a, b, c, d = keys("a", "b", "c", "d")
    for key in (a, b, c):
        cache.put(key, entry(1))
    assert cache.get(a) is not None
    cache.put(d, entry(1))
    assert [cache.get(key) is not None for key in (a, b, c, d)] == [True, False, True, True]
    assert cache.bytes == 3 * size
    cache.put(d, entry(2))
    assert (cache.bytes, len(cache)) == (3 * size, 3)


async def test_a_limit_of_0_bytes_keeps_nothing() -> None:
    cache, compute = VectorCache(0), Counting()
    await cache.get_or_compute(keys("a"), compute)
    await cache.get_or_compute(keys("a"), compute)
    assert compute.asked == [[0], [0]]
    assert (len(cache), cache.bytes) == (0, 0)


def test_the_counted_bytes_are_the_used_memory() -> None:
    cache = VectorCache(1 << 30)
    tracemalloc.start()
    for index in range(5_000):
        cache.put(cache_key("t", "r1", "", "end", str(index)), entry(index, dim=384))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.8 * cache.bytes <= taken <= 1.05 * cache.bytes


def test_the_key_depends_on_all_that_determines_the_vector() -> None:
    made = [
        cache_key("t", "r1", "", "end", "ab"),
        cache_key("t", "r2", "", "end", "ab"),
        cache_key("u", "r1", "", "end", "ab"),
        cache_key("", "tr1", "", "end", "ab"),
        cache_key("t", "r1", "p", "end", "ab"),
        cache_key("t", "r1", "", "start", "ab"),
        cache_key("t", "r1", "", "end", "abc"),
        cache_key("t", "r1", "a", "end", "b"),
        cache_key("t", "r1", "", "end", [1, 2]),
        cache_key("t", "r1", "", "end", [2, 1]),
        cache_key("t", "r1", "", "end", "\x01\x00\x00\x00\x00\x00\x00\x00"),
        cache_key("t", "r1", "", "end", [1]),
    ]
    assert len(set(made)) == len(made)


async def test_an_urgent_request_does_not_wait_for_the_computation_of_a_bulk_request() -> None:
    cache, gate = VectorCache(10_000), asyncio.Event()
    bulk, urgent, too = Counting(gate), Counting(), Counting()
    computing = asyncio.create_task(cache.get_or_compute(keys("a", "b"), bulk, bulk=True))
    await turns()
    (answer,) = await cache.get_or_compute(keys("b"), urgent)
    assert (bulk.asked, urgent.asked) == ([[0, 1]], [[0]])
    waiting = asyncio.create_task(cache.get_or_compute(keys("a"), too, bulk=True))  # bulk waits for bulk
    await turns()
    gate.set()
    await computing
    assert (await waiting)[0] is (await computing)[0]
    assert too.asked == []
    assert answer.vector.tobytes() == entry(0.1).vector.tobytes()
    assert (cache.hits, cache.misses) == (1, 3)


async def test_a_bulk_request_waits_for_the_computation_of_an_urgent_one() -> None:
    cache, gate = VectorCache(10_000), asyncio.Event()
    urgent, bulk = Counting(gate), Counting()
    computing = asyncio.create_task(cache.get_or_compute(keys("a"), urgent))
    await turns()
    waiting = asyncio.create_task(cache.get_or_compute(keys("a", "b"), bulk, bulk=True))
    await turns()
    gate.set()
    assert (await waiting)[0] is (await computing)[0]
    assert (urgent.asked, bulk.asked) == ([[0]], [[1]])


async def test_a_call_waits_for_the_computation_of_another_until_its_deadline() -> None:
    now = [10.0]
    cache, gate = VectorCache(10_000, clock=lambda: now[0]), asyncio.Event()
    first, other = Counting(gate), Counting()
    computing = asyncio.create_task(cache.get_or_compute(keys("a"), first))
    await turns()
    patient = asyncio.create_task(cache.get_or_compute(keys("a"), other, deadline=999.0))
    for deadline in (10.001, 10.0, 5.0):
        with pytest.raises(DeadlineExceeded):
            await cache.get_or_compute(keys("a", "b"), other, deadline=deadline)
    gate.set()
    assert (await patient)[0] is (await computing)[0]
    assert other.asked == [[1]]  # "b", once, which is kept
