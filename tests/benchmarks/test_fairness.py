"""Small requests beside bulk work: what is sent, what is counted, and the report."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web

from benchmarks import fairness
from benchmarks.connections import Connections
from benchmarks.fairness import (
    BULKS,
    CALLERS,
    CHARACTERS,
    Latencies,
    Measured,
    Throughput,
    Tree,
    allowed_ms,
    beside,
    draw,
    run_bulk,
    single_client,
    table,
)
from benchmarks.workload import Request
from deployments.requests import bodies

Handler = Callable[[web.Request], Awaitable[web.Response]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Connections]:
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with Connections(f"http://127.0.0.1:{port}") as server:
            yield server
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("bulk", BULKS, ids=lambda bulk: bulk.key)
def test_bulk_work_is_seeded_and_valid_and_has_the_texts_that_it_counts(bulk: fairness.Bulk) -> None:
    requests = bulk.make(random.Random(1), 16, 4)
    assert requests == bulk.make(random.Random(1), 16, 4)
    assert requests != bulk.make(random.Random(2), 16, 4)
    assert sum(request.texts for request in requests) == 16
    assert len(requests) == (CALLERS if bulk.key == "callers" else 1)
    sent: list[str] = []
    for path, body, _ in requests:
        if path == "/v1/embeddings":
            inputs = bodies.check(bodies.EmbeddingsBody, orjson.loads(body)).input
            assert [len(text) for text in inputs] == [CHARACTERS] * len(inputs)
            sent += inputs
        elif path.endswith("/memories"):
            sent += [item.text for item in bodies.check(bodies.AddBody, orjson.loads(body)).items()]
        else:
            lines = [orjson.loads(line) for line in body.split(b"\n")]
            assert {len(line.get("vector", [])) for line in lines} == {4 if bulk.key == "vectors" else 0}
            sent += [line["text"] for line in lines]
    assert len(set(sent)) == 16


async def test_a_lone_client_counts_answers_refusals_and_errors_apart() -> None:
    statuses = iter([200, 429, 503, 200, 200])
    paths: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        paths.append(request.path)
        return web.Response(status=next(statuses))

    async with serving(answer) as server:
        found = await single_client(server, "search", lambda: len(paths) == 5, 1)
    assert paths == ["/v1/users/user-0/memories/search"] * 5
    assert (len(found.answered_s), found.refused, dict(found.errors), found.sent) == (3, 1, {"503": 1}, 5)


async def test_a_lone_client_sends_at_least_one_request() -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response()

    async with serving(answer) as server:
        assert (await single_client(server, "embed", lambda: True, 1)).sent == 1


async def test_a_refused_bulk_request_is_sent_again_until_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "RETRY_S", 0.0)
    statuses = iter([429, 429, 200, 200])
    bodies_of: list[bytes] = []

    async def answer(request: web.Request) -> web.Response:
        bodies_of.append(await request.read())
        return web.Response(status=next(statuses))

    async with serving(answer) as server:
        found = await run_bulk(server, [Request("/a", b"1", 10), Request("/a", b"2", 10)])
    assert found.refused == 2
    assert found.texts_per_s > 0
    assert len(bodies_of) == 4
    assert set(bodies_of) == {b"1", b"2"}


async def test_bulk_work_that_fails_is_an_error() -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=500)

    async with serving(answer) as server:
        with pytest.raises(RuntimeError, match="500"):
            await run_bulk(server, [Request("/a", b"1", 10)])


async def test_the_lone_clients_run_until_the_bulk_work_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "BEGIN_S", 0.0)
    single = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal single
        if request.path == "/bulk":
            while single < 20:
                await fairness.asyncio.sleep(0)
        else:
            single += 1
        return web.Response()

    async with serving(answer) as server:
        throughput, found = await beside(server, [Request("/bulk", b"1", 10)], 1)
    assert throughput.refused == 0
    assert set(found) == {"search", "embed"}
    assert sum(latencies.sent for latencies in found.values()) == single >= 20


def result(trees: int = 1) -> dict[str, Any]:
    """A result whose figures are simple: alone 10 ms, beside one bulk embedding 20 ms and half refused."""
    measured = []
    for number in range(trees):
        one = Measured(Tree(f"tree {number}", Path(), "0123456789abcdef"), [90.0, 100.0, 110.0])
        one.add_single("", {job: Latencies([0.01] * 3) for job in fairness.SINGLE})
        for _ in range(2):
            one.add_single("embed", {job: Latencies([0.02], refused=1) for job in fairness.SINGLE})
        one.bulk_alone["embed"] = [Throughput(100.0, 0), Throughput(100.0, 0)]
        one.bulk_beside["embed"] = [Throughput(80.0, 2), Throughput(100.0, 1)]
        measured.append(one.figures())
    return {"trees": measured}


def test_the_limit_is_three_times_p99_alone_and_one_forward() -> None:
    (one,) = result()["trees"]
    assert allowed_ms(one, "search") == pytest.approx(3 * 10.0 + 100.0)


def test_the_tables_have_every_lone_request_and_the_share_of_the_bulk_work() -> None:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table(result(2)).splitlines() if "|" in line
    ]
    head = ["request", "beside", "tree", "p50 ms", "p99 ms", "limit of p99", "answered", "429", "other errors"]
    assert lines[0] == head
    assert lines[2:4] == [
        ["search", "nothing", "tree 0", "10.0", "10.0", "130", "3", "0", "none"],
        ["search", "one bulk embedding", "tree 0", "20.0", "20.0", "130", "2", "2", "none"],
    ]
    assert [line[:3] for line in lines[4:10]] == [
        [job, title, name]
        for job, name in (("search", "tree 1"), ("embed", "tree 0"), ("embed", "tree 1"))
        for title in ("nothing", "one bulk embedding")
    ]
    assert lines[12:] == [["one bulk embedding", f"tree {n}", "100", "90.0", "90%", "3"] for n in (0, 1)]


@pytest.mark.parametrize("trees", [1, 2])
def test_the_plot_is_the_same_for_the_same_result(trees: int, tmp_path: Path) -> None:
    for name in ("one", "other"):
        draw(result(trees), tmp_path / f"{name}.svg")
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "other.svg").read_text()
    assert "one bulk embedding" in drawn and "50% refused" in drawn
    assert drawn.count("limit of p99") >= trees
