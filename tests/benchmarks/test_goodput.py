"""Clients that give up, and the table of an overloaded server."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from benchmarks.goodput import RECOVERY_S, figures, table
from benchmarks.impatient import Answer, Clients, Fates, Phase, moments_of, of_seconds, parse_phases, run, summary
from tests.benchmarks.test_load import serving

Handler = Callable[[web.Request], Awaitable[web.Response]]


def test_phases_are_parsed() -> None:
    assert parse_phases("100:5,2000:0.5") == [Phase(100.0, 5.0), Phase(2000.0, 0.5)]
    for wrong in ("", "100", "100:", "a:b", "1:2:3"):
        with pytest.raises(ValueError, match=r"\S"):
            parse_phases(wrong)


def test_each_phase_has_its_own_rate_and_moments() -> None:
    moments, numbers = moments_of([Phase(100.0, 2.0), Phase(1000.0, 3.0)], seed=1)
    assert np.array_equal(moments, moments_of([Phase(100.0, 2.0), Phase(1000.0, 3.0)], seed=1)[0])
    assert np.all(np.diff(moments) > 0)
    second = moments[np.array(numbers) == 1]
    assert second[0] >= 2.0 and second[-1] < 5.0
    # Five standard errors of a Poisson count.
    assert abs(numbers.count(0) - 200) < 5 * 200**0.5
    assert abs(numbers.count(1) - 3000) < 5 * 3000**0.5


def test_an_answer_is_complete_when_its_body_is() -> None:
    whole = b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbody"
    for cut in range(1, len(whole)):
        answer = Answer()
        assert not answer.feed(whole[:cut])
        assert answer.feed(whole[cut:])
        assert (answer.status, answer.keeps_alive) == ("429", False)
    with pytest.raises(ValueError, match="subsection not found"):
        Answer().feed(b"HTTP/1.1 200 OK\r\n\r\n")


def test_a_client_has_one_fate() -> None:
    fates = Fates()
    for outcome, latency_s in (("200", 0.2), ("201", 0.3), ("200", 1.2), ("429", 0.001), ("503", 0.1), ("gave up", 1)):
        fates.add(outcome, latency_s, patience_s=1.0)
    assert fates == Fates(offered=6, gave_up=2, good_s=[0.2, 0.3], refused_s=[0.001], errors={"503": 1})
    assert summary(fates, 2.0) == {
        "offered_per_s": 3.0,
        "good_per_s": 1.0,
        "refused": 1,
        "gave_up": 2,
        "errors": {"503": 1},
        "latency": {"p50_ms": 250.0, "p90_ms": 290.0, "p99_ms": 299.0},
        "refused_latency": {"p50_ms": 1.0, "p90_ms": 1.0, "p99_ms": 1.0},
    }
    assert summary(Fates(), 1.0)["latency"] is None


def test_requests_count_in_the_second_in_which_they_were_due() -> None:
    outcomes = [("200", 0.1), ("gave up", 1.0), ("429", 0.01)]
    seconds = of_seconds(np.array([0.9, 1.0, 2.4]), outcomes, 2.5, patience_s=1.0)
    assert [(one["good_per_s"], one["gave_up"], one["refused"]) for one in seconds] == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]


async def ran(handler: Handler, phases: list[Phase], **options: Any) -> dict[str, Any]:
    async with serving(handler) as url:
        defaults: dict[str, Any] = {"job": "embed", "length": "short", "patience_s": 60.0, "seed": 1}
        return await asyncio.to_thread(run, url, phases, **(defaults | options))


async def test_answers_and_refusals_are_counted_by_phase() -> None:
    async def answer(request: web.Request) -> web.Response:
        text = (await request.json())["input"]
        return web.Response(text="{}", status=429 if int(text.split()[-1]) % 2 else 200)

    found = await ran(answer, [Phase(50.0, 0.4), Phase(200.0, 0.4)])
    moments, numbers = moments_of([Phase(50.0, 0.4), Phase(200.0, 0.4)], seed=1)
    for number, phase in enumerate(found["phases"]):
        assert round(phase["offered_per_s"] * 0.4) == numbers.count(number)
        assert round(phase["good_per_s"] * 0.4) + phase["refused"] == numbers.count(number)
        assert phase["refused"] > 0 and phase["errors"] == {} and phase["gave_up"] == 0
    assert len(found["seconds"]) == 1
    assert len(moments) == len(numbers)


async def test_a_client_that_gives_up_closes_its_connection() -> None:
    left = asyncio.Semaphore(0)

    async def never(_: web.Request) -> web.Response:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            left.release()
            raise
        raise AssertionError

    async with serving(never, cancels=True) as url:
        found = await asyncio.to_thread(
            run, url, [Phase(100.0, 0.1)], job="embed", length="short", patience_s=1.0, seed=1
        )
        (phase,) = found["phases"]
        assert phase["gave_up"] == round(phase["offered_per_s"] * 0.1) > 0
        assert (phase["good_per_s"], phase["errors"]) == (0, {})
        async with asyncio.timeout(10):
            for _ in range(phase["gave_up"]):
                await left.acquire()


async def test_a_lost_connection_is_an_error() -> None:
    async def drop(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    found = await ran(drop, [Phase(100.0, 0.1)])
    (phase,) = found["phases"]
    assert phase["errors"] == {"lost": round(phase["offered_per_s"] * 0.1)}


async def test_connections_are_used_again() -> None:
    peers = set()

    async def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        peers.add(request.transport.get_extra_info("peername"))
        return web.Response(text="{}")

    async with serving(answer) as url:
        clients = Clients(url, patience_s=60.0)
        head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}"
        await asyncio.to_thread(clients.run, np.array([0.0, 0.2, 0.4]), [head] * 3)
        clients.close()
    assert [outcome for outcome, _ in clients.outcomes] == ["200"] * 3
    assert len(peers) == 1


def a_phase(good: float, **more: Any) -> dict[str, Any]:
    latency = {"p50_ms": 4.0, "p90_ms": 5.0, "p99_ms": 400.0}
    counts = {"offered_per_s": 1000.0, "refused": 0, "gave_up": 0, "errors": {}, "refused_latency": None}
    return {"good_per_s": good, "latency": latency, **counts, **more}


def a_row() -> dict[str, Any]:
    refused = {"p50_ms": 1.0, "p90_ms": 2.0, "p99_ms": 12.0}
    during = a_phase(95.0, refused=9000, gave_up=40, errors={"503": 2, "lost": 1}, refused_latency=refused)
    slow = a_phase(20.0, latency={"p50_ms": 90.0, "p90_ms": 95.0, "p99_ms": 99.0})
    return {
        "shape": "search",
        "peak_per_s": 100.0,
        "phases": [a_phase(20.0), during, a_phase(20.0)],
        "seconds": [a_phase(20.0)] * 12 + [slow] * RECOVERY_S + [a_phase(20.0, latency=None)] + [a_phase(20.0)] * 3,
        "overload_from_s": 10.0,
        "overload_to_s": 12.0,
        "cpu_share": 0.314,
    }


def test_latency_is_compared_from_five_seconds_after_the_overload() -> None:
    found = figures(a_row())
    assert (found["share"], found["before_p50_ms"], found["after_p50_ms"]) == (0.95, 4.0, 4.0)
    nothing = figures({**a_row(), "seconds": []})
    assert math.isnan(nothing["after_p50_ms"])


def test_a_row_of_the_table() -> None:
    _, _, row = table([a_row()]).splitlines()
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "search",
        "100",
        "1,000",
        "95.0",
        "**95%**",
        "400",
        "9,000",
        "12.0",
        "40",
        "3",
        "4.00",
        "4.00",
        "31% of a core",
    ]
