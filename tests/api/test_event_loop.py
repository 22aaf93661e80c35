"""No request up to the limit of a body makes the event loop stand still: not the gateway's, and not the embedder's.

What is measured is the CPU time that the loop's thread spends in one callback, since a busy machine adds to wall time.
The gateway and the embedder share a loop here, and a callback may contain steps of both.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deployments.embedding.load import DEFAULT_MODEL, resolve
from tests.local_app import LocalApp

if TYPE_CHECKING:
    from deployments.embedding.local.model import LocalModel

pytestmark = pytest.mark.slow  # a real model reads bodies of 16 MiB

BODY = (16 << 20) - 64
LONGEST_S = 0.1


@pytest.fixture(scope="module")
def minilm() -> "LocalModel":
    from deployments.embedding.local.model import LocalModel

    return LocalModel(resolve(DEFAULT_MODEL), device="cpu", dtype="float32")


@pytest.fixture
async def local(tmp_path: Path, minilm: "LocalModel") -> AsyncIterator[LocalApp]:
    app = await LocalApp.start(tmp_path, model={"token_ids": "any"})
    engine, fake = app.model.engine, app.model.engine.model
    engine.model = minilm
    app.http.event_hooks = {}  # which check an answer in the event loop
    yield app
    engine.model = fake  # the other is not closed with the engine
    await app.stop()


def _repeated(text: str, length: int = BODY) -> str:
    return text * (length // len(text.encode()))


BODIES: dict[str, tuple[str, int, Callable[[], Any]]] = {
    "a text": ("/v1/embeddings", 200, lambda: {"input": _repeated("word ")}),
    "a text without spaces": ("/v1/embeddings", 200, lambda: {"input": _repeated(".")}),
    "ideographs": ("/v1/embeddings", 200, lambda: {"input": _repeated("我")}),
    "many texts": ("/v1/embeddings", 200, lambda: {"input": [_repeated("word ", BODY // 256 - 8)] * 256}),
    "token ids": ("/v1/embeddings", 200, lambda: {"input": [7] * (BODY // 2 - 8)}),
    "lists of token ids": ("/v1/embeddings", 200, lambda: {"input": [[7] * (BODY // 512 - 8)] * 256}),
    "a text to embed": ("/embed", 400, lambda: {"inputs": _repeated("word ")}),
    "a text to cut": ("/embed", 200, lambda: {"inputs": _repeated("."), "truncate": True}),
    "the most to tokenize": ("/tokenize", 200, lambda: {"inputs": "." * 65_536}),
    "too much to tokenize": ("/tokenize", 413, lambda: {"inputs": _repeated(".")}),
    "the most to decode": ("/decode", 200, lambda: {"ids": [7] * 65_536}),
    "too much to decode": ("/decode", 413, lambda: {"ids": [7] * (BODY // 2 - 8)}),
}


@pytest.mark.parametrize("name", BODIES)
async def test_the_event_loop_does_not_stand_still(local: LocalApp, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path, status, make = BODIES[name]
    body = json.dumps(make(), ensure_ascii=False, separators=(",", ":")).encode()
    assert len(body) <= 16 << 20
    await local.http.post("/embed", json={"inputs": "a request that asks for the model's info"})
    longest_s = 0.0
    run = asyncio.Handle._run

    def timed(self: asyncio.Handle) -> None:
        nonlocal longest_s
        started = time.thread_time()
        run(self)
        longest_s = max(longest_s, time.thread_time() - started)

    monkeypatch.setattr(asyncio.Handle, "_run", timed)
    for _ in range(3):  # a busy machine may slow one of them down
        local.gateway._embedder.cache.resize(0)
        local.gateway._embedder.cache.resize(1 << 20)
        await asyncio.sleep(0)
        longest_s = 0.0
        # In a task, so that its steps are callbacks of their own.
        answer = await asyncio.create_task(local.http.post(path, content=body))
        await asyncio.sleep(0)
        assert answer.status_code == status
        if 0 < longest_s < LONGEST_S:
            break
    assert 0 < longest_s < LONGEST_S
