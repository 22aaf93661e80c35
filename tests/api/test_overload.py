"""Work beyond a limit is refused with 429 and Retry-After, on every route, until there is room again."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.calls import resilient, searches
from tests.local_app import LocalApp


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[LocalApp]:
    app = await LocalApp.start(tmp_path, gateway={"max_queued_tokens": 100}, cache={"max_bytes": 0})
    yield app
    await app.stop()


async def turns(count: int = 200) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_texts_past_the_limit_are_refused_and_queued_ones_are_answered(small: LocalApp) -> None:
    api = small.http
    small.model.gate.clear()
    first = asyncio.create_task(api.post("/v1/embeddings", json={"input": "on its way"}))
    await turns()
    waiting = [asyncio.create_task(api.post("/v1/embeddings", json={"input": f"text {n}"})) for n in range(66)]
    await turns()
    assert small.gateway._vectors.queued_tokens == 198  # each request is a caller, up to twice the limit

    async def is_refused(path: str, body: Any) -> None:
        refused = await api.post(path, json=body)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1

    await is_refused("/v1/embeddings", {"input": "one more"})
    await is_refused("/v1/users/ann/memories", {"text": "a memory"})
    await is_refused("/v1/users/ann/memories/search", {"query": "a query"})
    bulk = {"input": [f"text {n}" for n in range(2000)]}
    for _ in range(2):  # two pieces run, two wait
        waiting.append(asyncio.create_task(api.post("/v1/embeddings", json=bulk)))
        await turns()
    await is_refused("/v1/embeddings", bulk)
    small.model.gate.set()
    answers = await asyncio.gather(first, *waiting)
    assert {answer.status_code for answer in answers} == {200}
    assert (await api.post("/v1/embeddings", json={"input": "one more"})).status_code == 200
    # Nothing was written of the requests that were refused.
    assert (await api.get("/v1/users/ann/memories")).json()["memories"] == []


def lock(app: LocalApp, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """The store answers no call until the returned event is set."""
    store, unlocked = app.store.deployment, asyncio.Event()

    def locked(call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def wait(*args: Any, **options: Any) -> Any:
            await unlocked.wait()
            return await call(*args, **options)

        return wait

    monkeypatch.setattr(store, "run", locked(store.run))
    monkeypatch.setattr(store, "search", locked(store.search))
    return unlocked


@pytest.mark.parametrize("what", ["add", "search"])
async def test_calls_past_the_limit_of_a_store_are_refused_and_queued_ones_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(searches, "SEARCHES", 1)
    monkeypatch.setattr(searches, "IN_FLIGHT", 1)
    app = await LocalApp.start(tmp_path, gateway={"append_calls_in_flight": 1, "append_call_memories": 1})
    unlocked = lock(app, monkeypatch)

    def ask() -> Awaitable[httpx.Response]:
        if what == "add":
            return app.http.post("/v1/users/ann/memories", json={"text": "tea"})
        return app.http.post("/v1/users/ann/memories/search", json={"query": "tea"})

    waiting = [asyncio.ensure_future(ask())]
    await turns(2000)
    waiting += [asyncio.ensure_future(ask()) for _ in range(64)]
    await turns(2000)
    refused = await asyncio.wait_for(ask(), 10.0)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    unlocked.set()
    assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {201 if what == "add" else 200}
    if what == "add":
        assert (await app.http.get("/v1/users/ann")).json()["memories"] == 65
        await app.gateway.reconfigure({"gateway": {"append_call_memories": 2}})
        assert app.gateway._store._appends.max_queued == 128
    await app.stop()


async def test_unbatched_calls_past_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resilient, "MAX_UNBATCHED_CALLS", 4)
    app = await LocalApp.start(tmp_path)
    memories, ann = "/v1/users/ann/memories", "/v1/users/ann"
    await app.http.post(memories, json={"id": "1", "text": "tea"})
    for _ in range(5):  # a call that failed makes room
        assert (await app.http.get(f"{memories}/none")).status_code == 404
    unlocked = lock(app, monkeypatch)
    # Four urgent calls and four bulk ones, which have limits of their own.
    waiting = [asyncio.ensure_future(app.http.get(path)) for path in (f"{memories}/1", f"{ann}/export") * 4]
    await turns(2000)
    for method, path, body in (
        ("GET", f"{memories}/1", None),
        ("GET", memories, None),
        ("PATCH", f"{memories}/1", {"text": "milk"}),
        ("PATCH", f"{memories}/1", {"metadata": {}}),
        ("POST", f"{ann}/import", None),
        ("DELETE", f"{memories}/1", None),
        ("DELETE", ann, None),
    ):
        content = b'{"id": "2", "text": "rain"}' if path.endswith("import") else None
        refused = await asyncio.wait_for(app.http.request(method, path, json=body, content=content), 10.0)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
    others = [
        asyncio.ensure_future(
            app.http.post(memories, json={"id": "2", "text": "milk"})
        ),  # adds have a queue of their own
        asyncio.ensure_future(app.gateway._store.ping()),  # as /health/ready asks
    ]
    # Other callers, who have nothing waiting.
    strangers = [asyncio.ensure_future(app.http.get(path)) for path in ("/v1/users", "/v1/users/bob")]
    await turns(2000)
    assert not any(other.done() for other in [*others, *strangers])
    unlocked.set()
    assert {answer.status_code for answer in await asyncio.gather(*waiting, *strangers)} == {200}
    await asyncio.gather(*others)
    listed = (await app.http.get(memories)).json()["memories"]
    assert [(memory["id"], memory["text"]) for memory in listed] == [("2", "milk"), ("1", "tea")]
    await app.stop()
