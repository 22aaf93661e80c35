"""The bodies that a gateway holds take a bounded number of bytes. Each key gets a share; the largest are refused."""

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
from starlette.types import Scope

from deployments.api import http
from deployments.api.held_bodies import SMALL_BYTES, HeldBodies
from deployments.errors import Overloaded
from deployments.fair_queue import work_of
from tests.local_app import LocalApp

KB = 1000


def test_a_body_may_have_half_of_the_bytes_that_are_left() -> None:
    held = HeldBodies(1000 * KB)
    scopes = [{} for _ in range(5)]
    for scope, size, left in zip(scopes, (400, 300, 150, 75), (600, 300, 150, 75), strict=False):
        held.hold(scope, size * KB)
        with pytest.raises(Overloaded):
            held.hold({}, left * KB // 2 + SMALL_BYTES)
        assert held.bytes == (1000 - left) * KB
    held.hold({}, SMALL_BYTES)  # small bodies do not count
    for scope in scopes:
        held.release(scope)
        held.release(scope)
    assert held.bytes == 0


def hold(held: HeldBodies, caller: str, sizes: list[int]) -> list[Scope]:
    """Hold bodies of one caller. Returns the scopes of those that were admitted."""
    admitted = []
    with work_of(caller):
        for size in sizes:
            scope: Scope = {}
            with contextlib.suppress(Overloaded):
                held.hold(scope, size)
                admitted.append(scope)
    return admitted


@pytest.mark.parametrize("sizes", [[16 << 20] * 15, [(16 << 20) >> n for n in range(8)] * 15])
def test_the_bodies_of_one_caller_leave_half_of_the_bytes_to_others(sizes: list[int]) -> None:
    held = HeldBodies(256 << 20)
    first = hold(held, "key:first", sizes)
    assert held.bytes == 128 << 20
    second = hold(held, "key:second", [9_000_000] * 100)
    assert len(second) == 7
    assert hold(held, "key:first", [SMALL_BYTES + 1]) == []
    for scope in first:
        held.release(scope)
    assert len(second + hold(held, "key:second", [9_000_000] * 100)) == 14
    for scope in second:
        held.release(scope)
    assert held.bytes == 7 * 9_000_000


def test_a_caller_is_counted_until_its_last_body_is_released() -> None:
    held = HeldBodies(1000 * KB)
    one, two = hold(held, "key:a", [200 * KB, 200 * KB])
    with pytest.raises(Overloaded), work_of("key:a"):
        held.hold(one, 301 * KB)
    with work_of("key:a"):
        held.hold(one, 300 * KB)
    held.release(two)
    assert held.bytes == 300 * KB
    held.release(one)
    assert held.bytes == 0
    assert len(hold(held, "key:a", [5000 * KB])) == 1


def test_a_body_that_is_the_only_one_is_never_refused() -> None:
    held, scope = HeldBodies(100 * KB), {}
    held.hold(scope, 5000 * KB)
    held.hold(scope, 6000 * KB)
    assert held.bytes == 6000 * KB
    with pytest.raises(Overloaded):
        held.hold({}, 70 * KB)
    held.release(scope)
    held.hold({}, 70 * KB)


def test_a_body_counts_what_has_arrived_or_was_announced_whichever_is_more() -> None:
    held, scope = HeldBodies(1000 * KB), {}
    for size, counted in ((1, 0), (300, 300), (200, 300), (301, 301)):
        held.hold(scope, size * KB)
        assert held.bytes == counted * KB


def body_of(size: int) -> bytes:
    return orjson.dumps({"input": "a " * (size // 2)})


async def turns() -> None:
    await asyncio.sleep(0)


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 10_000):
        yield body[start : start + 10_000]


@pytest.mark.parametrize("sent", ["whole", "in chunks", "gzip"])
async def test_bodies_of_requests_in_progress_are_bounded(tmp_path: Path, sent: str) -> None:
    app = await LocalApp.start(tmp_path, gateway={"max_body_bytes_in_flight": 200 * KB})
    held = app.api.state.held_bodies
    app.model.gate.clear()
    first = asyncio.create_task(app.http.post("/v1/embeddings", content=body_of(160 * KB)))
    while not app.model.texts:
        await turns()
    large = {
        "whole": body_of(70 * KB),
        "in chunks": in_chunks(body_of(70 * KB)),
        "gzip": gzip.compress(body_of(70 * KB)),
    }
    headers = {"content-encoding": "gzip"} if sent == "gzip" else {}
    refused = await app.http.post("/v1/embeddings", content=large[sent], headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert refused.headers["retry-after"] == "1"
    assert 160 * KB < held.bytes < 161 * KB
    lines = b"".join(orjson.dumps({"id": str(n), "text": "x" * 1000, "vector": [1.0] * 32}) + b"\n" for n in range(300))
    assert (await app.http.post("/v1/users/ann/import", content=lines)).json() == {"imported": 300, "unchanged": 0}
    small = asyncio.create_task(app.http.post("/v1/embeddings", content=body_of(1 * KB)))
    app.model.gate.set()
    assert [(await one).status_code for one in (first, small)] == [200, 200]
    assert held.bytes == 0
    assert (await app.http.post("/v1/embeddings", content=body_of(180 * KB))).status_code == 200
    await app.stop()


async def test_a_key_that_fills_its_share_does_not_refuse_the_bodies_of_another(tmp_path: Path) -> None:
    limits = {"max_body_bytes_in_flight": 400 * KB}
    app = await LocalApp.start(tmp_path, auth={"mode": "keys"}, gateway=limits)
    greedy, other = [{"authorization": f"Bearer {await app.make_key(tenant)}"} for tenant in ("a", "b")]
    app.model.gate.clear()
    first = asyncio.create_task(app.http.post("/v1/embeddings", content=body_of(150 * KB), headers=greedy))
    while not app.model.texts:
        await turns()
    refused = await app.http.post("/v1/embeddings", content=body_of(70 * KB), headers=greedy)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    second = asyncio.create_task(app.http.post("/v1/embeddings", content=body_of(110 * KB), headers=other))
    held = app.api.state.held_bodies
    while held.bytes < 260 * KB and not second.done():
        await turns()
    app.model.gate.set()
    assert [(await one).status_code for one in (first, second)] == [200, 200]
    assert held.bytes == 0
    await app.stop()


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embed"])
@pytest.mark.parametrize("sent", [b"", b"x" * 70 * KB])
@pytest.mark.parametrize("announced", [True, False])
async def test_a_large_body_that_does_not_arrive_is_408(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, sent: bytes, announced: bool
) -> None:
    monkeypatch.setattr(http, "SLOW_START_S", 0.0)
    monkeypatch.setattr(http, "SLOWEST_BYTES_PER_S", 1e9)
    app = await LocalApp.start(tmp_path)

    async def stalls() -> AsyncIterator[bytes]:
        yield sent or b"x" * (0 if announced else SMALL_BYTES + 1)
        await asyncio.Event().wait()

    headers = {"content-length": str(1000 * KB)} if announced else {}
    refused = await asyncio.wait_for(app.http.post(path, content=stalls(), headers=headers), 20)
    assert (refused.status_code, refused.json()["error"]) == (
        408,
        {
            "message": "The request did not arrive in time.",
            "type": "timeout_error",
            "param": None,
            "code": "request_timeout",
        },
    )
    assert app.api.state.held_bodies.bytes == 0
    await app.stop()


async def test_a_large_body_that_arrives_fast_enough_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "SLOW_START_S", 0.0)
    monkeypatch.setattr(http, "SLOWEST_BYTES_PER_S", 1.0)
    app = await LocalApp.start(tmp_path)
    app.http.event_hooks = {}  # they read the body again
    answer = await app.http.post("/v1/embeddings", content=in_chunks(body_of(200 * KB)))
    assert answer.status_code == 200
    await app.stop()
