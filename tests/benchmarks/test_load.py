"""The load generator: its arrivals, its counts, and the latencies of a server that stalls."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import islice

import numpy as np
import orjson
import pytest
from aiohttp import web

from benchmarks.load import Load, Samples, arrivals, begin_together, measure, result_of, run, shares
from benchmarks.server import free_port
from benchmarks.workload import MIXED, WORDS, filling, request_maker, seed_of, texts

Handler = Callable[[web.Request], Awaitable[web.Response]]


@asynccontextmanager
async def serving(handler: Handler, *, cancels: bool = False) -> AsyncIterator[str]:
    """A server with one handler on a free port. `cancels`: the handler is cancelled when its client disconnects."""
    app = web.Application()
    app.router.add_post("/{path:.*}", handler)
    runner = web.AppRunner(app, handler_cancellation=cancels)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield site.name
    finally:
        await runner.cleanup()


def test_arrivals_are_seeded_ascending_and_within_the_window() -> None:
    moments = arrivals(200.0, 5.0, seed=3)
    assert np.array_equal(moments, arrivals(200.0, 5.0, seed=3))
    assert not np.array_equal(moments[:100], arrivals(200.0, 5.0, seed=4)[:100])
    assert np.all(np.diff(moments) > 0)
    assert moments[0] > 0 and moments[-1] < 5.0


def test_arrivals_are_poisson() -> None:
    counts = np.array([len(arrivals(50.0, 2.0, seed)) for seed in range(400)])
    # Mean and variance are both 100. The tolerance is five standard errors of each.
    assert abs(counts.mean() - 100) < 5 * 10 / 20
    assert abs(counts.var() - 100) < 5 * 100 * (2 / 400) ** 0.5
    gaps = np.diff(arrivals(1000.0, 20.0, seed=1))
    assert abs(np.mean(gaps > 0.001) - np.exp(-1)) < 0.02


async def test_a_closed_loop_counts_the_answers_in_the_window() -> None:
    async def answer(_: web.Request) -> web.Response:
        await asyncio.sleep(0.02)
        return web.Response(text="{}")

    async with serving(answer) as url:
        load = Load(url, clients=4, size=3, warm_s=0.1, measure_s=0.5)
        result = result_of(load, await run(load))
    assert result.errors == {}
    assert result.p50_ms >= 20
    assert 20 <= result.requests <= 100  # 4 clients, 20 ms each: 100 at most
    assert result.requests_per_s == result.requests / 0.5
    assert result.texts_per_s == 3 * result.requests_per_s
    assert result.offered_per_s is None


async def test_errors_are_counted_by_status_and_not_as_throughput() -> None:
    async def refuse(_: web.Request) -> web.Response:
        await asyncio.sleep(0.01)
        return web.Response(status=429)

    async with serving(refuse) as url:
        closed = await run(Load(url, clients=2, warm_s=0.0, measure_s=0.2))
        opened = await run(Load(url, rate=100.0, warm_s=0.0, measure_s=0.3))
    assert (closed.requests, closed.latencies_s, list(closed.errors)) == (0, [], ["429"])
    assert (opened.requests, opened.latencies_s) == (0, [])
    due = len(arrivals(100.0, 0.3, seed=1))
    assert opened.errors == {"429": due}
    assert len(opened.refused_s) == due and min(opened.refused_s) >= 0.01
    refused = result_of(Load(rate=100.0), opened).refused
    assert refused is not None and refused["p50_ms"] >= 10
    assert result_of(Load(rate=100.0), Samples()).refused is None


async def test_a_stall_counts_for_every_request_that_was_due_in_it() -> None:
    """If a server stops for half a second, a closed loop of one client has one slow request, an open loop many."""
    stalled_until = 0.0

    async def stall(_: web.Request) -> web.Response:
        nonlocal stalled_until
        now = asyncio.get_running_loop().time()
        if not stalled_until:
            stalled_until = now + 0.5
        await asyncio.sleep(max(0.0, stalled_until - now))
        return web.Response(text="{}")

    async with serving(stall) as url:
        opened = await run(Load(url, rate=100.0, warm_s=0.0, measure_s=1.0, seed=2))
        stalled_until = 0.0
        closed = await run(Load(url, clients=1, warm_s=0.0, measure_s=1.0))
    moments = arrivals(100.0, 1.0, seed=2)
    due_in_the_stall = np.sum(moments < moments[0] + 0.35)
    assert 1 <= sum(latency > 0.1 for latency in closed.latencies_s) <= 5  # one, and a few more on a busy machine
    assert sum(latency > 0.1 for latency in opened.latencies_s) >= due_in_the_stall > 20
    assert len(opened.latencies_s) == len(moments)


async def test_latency_counts_from_the_due_moment_even_if_the_generator_is_late() -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="{}")

    async with serving(answer) as url:
        load = asyncio.create_task(run(Load(url, rate=50.0, warm_s=0.0, measure_s=0.6, seed=5)))
        await asyncio.sleep(0.2)
        started = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < started + 0.2:  # blocks the event loop of server and sender
            pass
        seen = await load
    assert max(seen.late_s) > 0.1
    assert max(seen.latencies_s) >= max(seen.late_s)


async def test_an_unanswered_request_counts_with_the_time_it_waited() -> None:
    measured = asyncio.Event()

    async def hang(_: web.Request) -> web.Response:
        await measured.wait()
        return web.Response()

    async with serving(hang) as url:
        load = Load(url, rate=40.0, warm_s=0.0, measure_s=0.3, drain_s=0.2, seed=7)
        seen = await run(load)
        measured.set()
    due = len(arrivals(40.0, 0.3, seed=7))
    assert seen.errors == {"unanswered": due}
    assert len(seen.latencies_s) == due
    assert min(seen.latencies_s) > 0.15
    assert (seen.requests, result_of(load, seen).requests_per_s) == (0, 0.0)


async def test_arrivals_of_the_warm_up_do_not_count() -> None:
    paths = []

    async def answer(request: web.Request) -> web.Response:
        paths.append(request.path)
        return web.Response(text="{}")

    async with serving(answer) as url:
        seen = await run(Load(url, rate=100.0, warm_s=0.3, measure_s=0.3, seed=9))
    moments = arrivals(100.0, 0.6, seed=9)
    assert len(paths) == len(moments)
    assert len(seen.latencies_s) == np.sum(moments >= 0.3)


async def test_every_answer_in_the_window_counts_as_throughput_whenever_it_was_due() -> None:
    async def answer(_: web.Request) -> web.Response:
        await asyncio.sleep(0.3)
        return web.Response(text="{}")

    async with serving(answer) as url:
        seen = await run(Load(url, rate=200.0, warm_s=0.4, measure_s=0.6, seed=3))
    moments = arrivals(200.0, 1.0, seed=3)
    assert len(seen.latencies_s) == np.sum(moments >= 0.4)
    answered = moments + 0.3  # or a little later
    assert abs(seen.requests - np.sum((answered >= 0.4) & (answered < 1.0))) < 40  # about 120 are in it


def test_processes_begin_when_all_are_ready() -> None:
    barrier = threading.Barrier(2)
    seen: list[str] = []

    def one() -> None:
        begin_together(barrier)
        seen.append("begun")

    thread = threading.Thread(target=one)
    thread.start()
    seen.append("ready")
    begin_together(barrier)
    thread.join()
    assert seen == ["ready", "begun"]
    nobody = f"http://127.0.0.1:{free_port()}"
    result = measure(Load(nobody, clients=2, warm_s=0.0, measure_s=0.2, processes=2))
    assert (result.requests, list(result.errors)) == (0, ["ConnectionRefusedError"])


def test_shares_divide_the_load_and_have_different_seeds() -> None:
    parts = shares(Load(clients=10, rate=90.0, processes=3))
    assert [part.clients for part in parts] == [4, 3, 3]
    assert [part.rate for part in parts] == [30.0, 30.0, 30.0]
    assert len({part.seed for part in parts}) == 3
    assert shares(Load(clients=4))[0].rate is None


def test_samples_of_several_processes_add_up() -> None:
    whole = Samples([0.1], [], [], 1, 2)
    whole.errors["429"] = 1
    other = Samples([0.3], [0.2], [0.01], 1, 2)
    other.errors["429"] = 2
    whole.add(other)
    assert whole == Samples([0.1, 0.3], [0.2], [0.01], 2, 4, whole.errors)
    assert whole.errors == {"429": 3}


@pytest.mark.parametrize(("length", "fewest", "most"), [("short", 4, 12), ("medium", 24, 40), ("mixed", 4, 200)])
def test_a_named_length_has_its_range_of_words(length: str, fewest: int, most: int) -> None:
    made = list(islice(texts(length, random.Random(1)), 2000))
    counts = [len(text.split()) for text in made]
    assert (min(counts), max(counts)) == (fewest, most)
    assert len(set(made)) == len(made)


def test_a_length_may_be_a_number_and_mixed_texts_have_a_median_of_30() -> None:
    assert {len(text.split()) for text in islice(texts("7", random.Random(1)), 50)} == {7}
    counts = [len(text.split()) for text in islice(texts("mixed", random.Random(1)), 4000)]
    assert 28 <= np.median(counts) <= 32


def test_texts_repeat_only_if_distinct_is_given() -> None:
    assert len(set(islice(texts("short", random.Random(1), distinct=10), 500))) == 10
    assert set(" ".join(islice(texts("short", random.Random(1)), 50)).split()) - set(WORDS)  # each text has a number


def test_the_same_seed_makes_the_same_requests() -> None:
    def made(seed: int) -> list[tuple[str, bytes, int]]:
        make = request_maker("mixed", 1, "short", random.Random(seed))
        return [make() for _ in range(300)]

    assert made(1) == made(1) != made(2)
    paths = [path.rsplit("/", 1)[-1] for path, _, _ in made(1)]
    for route, job in (("search", "search"), ("memories", "add"), ("embeddings", "embed")):
        assert abs(paths.count(route) / 300 - MIXED[job]) < 0.1


def test_requests_carry_their_texts() -> None:
    path, body, count = request_maker("add", 32, "short", random.Random(1), users=1)()
    assert (path, count, len(orjson.loads(body)["memories"])) == ("/v1/users/user-0/memories", 32, 32)
    path, body, count = request_maker("embed", 2, "short", random.Random(1))()
    assert (path, count, len(orjson.loads(body)["input"])) == ("/v1/embeddings", 2, 2)
    path, body, count = request_maker("search", 32, "short", random.Random(1), users=1)()
    assert (path, count, list(orjson.loads(body))) == ("/v1/users/user-0/memories/search", 1, ["query"])


def test_filling_gives_each_user_the_same_number_of_memories() -> None:
    users: list[str] = []
    for path, body, count in filling(3, random.Random(1), users=50, batch=40):
        memories = orjson.loads(body)["memories"]
        assert (path, len(memories)) == ("/v1/memories", count)
        users += [memory["user_id"] for memory in memories]
    assert {user: users.count(user) for user in users} == {f"user-{n}": 3 for n in range(50)}


def test_each_measurement_has_a_different_seed() -> None:
    assert seed_of(1, 2, "add") == seed_of(1, 2, "add")
    assert len({seed_of(1, turn, job) for turn in range(50) for job in ("add", "embed")}) == 100
