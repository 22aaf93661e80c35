"""The answers to readiness probes, which must not start an embedder, in this process."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from deployments.api.build import build_api
from deployments.calls.readiness import KEPT_S
from deployments.calls.store import PROBES
from deployments.fair_queue import SentTurn, work_of
from deployments.requests import deadlines
from deployments.requests.origin import HEADER
from tests.local_app import LocalApp

FAKE = {"status": "ready", "model": "fake", "device": "cpu", "dtype": "float32"}


async def test_ready_describes_the_model(app: LocalApp) -> None:
    app.embedder.calls.clear()
    for seconds in (KEPT_S, 2 * KEPT_S):
        app.gateway._readiness._clock = partial(float, seconds)
        for path in ("/health/ready", "/health", "/ping"):
            answer = await app.http.get(path)
            assert (answer.status_code, answer.json()) == (200, FAKE)
    assert app.embedder.calls == [("info", None)] * 2  # one probe in a second asks; a request after it does not
    await app.http.post("/v1/embeddings", json={"input": "tea"})
    assert app.embedder.calls[2:] == [("embed", None)]


async def test_probes_at_the_same_time_share_one_check(app: LocalApp) -> None:
    app.embedder.calls.clear()
    app.store.calls.clear()
    answers = await asyncio.gather(*(app.http.get("/health/ready") for _ in range(100)))
    assert {answer.status_code for answer in answers} == {200}
    assert app.embedder.calls == [("info", None)]
    assert [name for name, _ in app.store.calls] == ["ping"]


async def test_readiness_is_checked_for_one_caller(app: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a client that waits has its turn after one check, however many probes there are."""
    run, turns = app.store.deployment.run, []

    async def remember(name: str, turn: SentTurn, *args: Any) -> Any:
        turns.append(turn[:3])
        return await run(name, turn, *args)

    monkeypatch.setattr(app.store.deployment, "run", remember)
    for caller in ("first", "second"):
        with work_of(caller), deadlines.within(5.0):
            await app.gateway._store.ping()
    assert turns == [(PROBES, False, None)] * 2


async def test_a_probe_starts_no_embedder_if_there_may_be_none(tmp_path: Path) -> None:
    app = await LocalApp.start(tmp_path, embedder={"min_replicas": 0})
    app.embedder.calls.clear()
    answer = await app.http.get("/health/ready")
    assert (answer.status_code, answer.json()) == (
        200,
        {"status": "ready", "model": "all-MiniLM-L6-v2", "device": "none yet", "dtype": "none yet"},
    )
    assert app.embedder.calls == []
    await app.http.post("/v1/embeddings", json={"input": "tea"})
    asked = list(app.embedder.calls)
    assert (await app.http.get("/health/ready")).json() == FAKE
    assert app.embedder.calls == asked
    await app.stop()


async def test_behind_haproxy_readiness_needs_its_request_id(app: LocalApp) -> None:
    """Without it, a write that HAProxy resends would be stored twice, without any error."""
    api = build_api(app.gateway, on_error=app.errors.append, behind_haproxy=True)

    async def gateway(scope: Scope, receive: Receive, send: Send) -> None:
        await api({**scope, "server": ("10.0.0.7", 30_000)}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://memserve.example") as http:
        for path in ("/health/ready", "/health"):
            answer = await http.get(path, headers={HEADER: "1795373580195616-e0b1a45e"})
            assert (answer.status_code, answer.json()) == (200, FAKE)
            answer = await http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
            assert f"haproxy: it adds no {HEADER} to requests" in answer.json()["error"]["message"]
        assert (await http.get("/health/live")).status_code == 200
        direct = await http.get("/health/ready", headers={"host": "10.0.0.7:30000"})
        assert (direct.status_code, direct.json()) == (200, FAKE)


async def test_metrics_are_answered_in_prometheus_format(app: LocalApp) -> None:
    answer = await app.http.get("/metrics")
    assert (answer.status_code, answer.text) == (200, "ray_memserve_queued_tokens 0.0\n")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert (await app.http.get("/metrics?a=b")).json()["error"]["param"] == "a"


async def test_a_server_that_exports_no_metrics_says_so(app: LocalApp) -> None:
    api = build_api(app.gateway, on_error=app.errors.append)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://memserve.example") as http:
        answer = await http.get("/metrics")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_metrics")


async def test_metrics_need_the_scope_admin_if_keys_are_asked_for(tmp_path: Path) -> None:
    app = await LocalApp.start(tmp_path, auth={"mode": "keys"})
    for scopes, status in ((["read", "write"], 403), (["admin"], 200)):
        key = await app.make_key("t", user_id=None, scopes=scopes, label=None, expires_at=None)
        assert (await app.http.get("/metrics", headers={"x-api-key": key})).status_code == status
    assert (await app.http.get("/metrics")).status_code == 401
    await app.stop()
