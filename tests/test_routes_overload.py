"""Overload is answered, not queued: past the limit 429 with Retry-After, whatever is asked, until it is gone."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.local_app import LocalApp


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[LocalApp]:
    app = await LocalApp.start(tmp_path, gateway={"max_queued_tokens": 100}, cache={"max_bytes": 0})
    yield app
    await app.stop()


async def turns(count: int = 200) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_past_the_limit_one_text_and_many_are_refused_and_what_waits_is_answered(small: LocalApp) -> None:
    api = small.http
    small.model.gate.clear()
    first = asyncio.create_task(api.post("/v1/embeddings", json={"input": "on its way"}))
    await turns()
    waiting = [asyncio.create_task(api.post("/v1/embeddings", json={"input": f"text {n}"})) for n in range(33)]
    await turns()
    assert small.gateway.vectors.queued_tokens == 99
    for path, body in (
        ("/v1/embeddings", {"input": "one more"}),
        ("/v1/embeddings", {"input": [f"text {n}" for n in range(2000)]}),
        ("/v1/users/ann/memories", {"text": "a memory"}),
        ("/v1/users/ann/memories/search", {"query": "a query"}),
    ):
        refused = await api.post(path, json=body)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
    small.model.gate.set()
    answers = await asyncio.gather(first, *waiting)
    assert {answer.status_code for answer in answers} == {200}
    assert (await api.post("/v1/embeddings", json={"input": "one more"})).status_code == 200
    # Nothing of what was refused was written.
    assert (await api.get("/v1/users/ann/memories")).json()["memories"] == []
