"""A server in this process, and the clients that reach it, for one suite of tests that is run against all of them.

Clients to await are wrapped, so that the suite is written once.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from deployments.api.build import build_api
from deployments.embedding.engine import EmbedRequest, Engine
from deployments.embedding.fake import FakeModel
from memserve.client import AsyncClient, Client
from memserve.cluster import AsyncHandleTransport, HandleTransport
from tests.local_app import LocalApp

TIMEOUT_S = 30.0


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The result of a coroutine that is run there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(TIMEOUT_S)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Server:
    """A gateway with a fake model and a real store, which answers on a loopback port."""

    def __init__(self, folder: Path) -> None:
        self.loop = Loop()
        self.app: LocalApp = self.loop.run(LocalApp.start(folder))
        api = build_api(self.app.gateway, on_error=lambda _: None)
        config = uvicorn.Config(api, host="127.0.0.1", port=0, log_level="error", lifespan="off")
        self._uvicorn = uvicorn.Server(config)
        self._serving = asyncio.run_coroutine_threadsafe(self._uvicorn.serve(), self.loop.loop)
        while not self._uvicorn.started:
            self.loop.run(asyncio.sleep(0.001))
        port = self._uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._serving.result(TIMEOUT_S)
        self.loop.run(self.app.stop())
        self.loop.stop()


class Handle:
    """A Serve handle to an object on another event loop, as far as clients use one."""

    def __init__(self, deployment: Any, loop: Loop, *, stream: bool = False) -> None:
        self._deployment = deployment
        self._loop = loop
        self._stream = stream

    def options(self, *, stream: bool) -> Handle:
        return Handle(self._deployment, self._loop, stream=stream)

    def __getattr__(self, name: str) -> Any:
        return _Method(getattr(self._deployment, name), self._loop, self._stream)


class _Method:
    def __init__(self, method: Callable[..., Any], loop: Loop, stream: bool) -> None:
        self._method = method
        self._loop = loop
        self._stream = stream

    def remote(self, *args: Any, **options: Any) -> Any:
        answer = self._method(*args, **options)
        return _Streamed(answer, self._loop) if self._stream else _Response(answer, self._loop)


class _Response:
    def __init__(self, answer: Coroutine[Any, Any, Any], loop: Loop) -> None:
        self._future = asyncio.run_coroutine_threadsafe(answer, loop.loop)

    def result(self, timeout_s: float | None) -> Any:
        return self._future.result(timeout_s)

    def __await__(self) -> Any:
        return asyncio.wrap_future(self._future).__await__()


class _Streamed:
    def __init__(self, pieces: AsyncIterator[bytes], loop: Loop) -> None:
        self._pieces = pieces
        self._loop = loop

    def __iter__(self) -> Iterator[bytes]:
        async def following() -> bytes | None:
            return await anext(self._pieces, None)

        while (piece := self._loop.run(following())) is not None:
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


class Blocking:
    """An `AsyncClient` whose methods block, and whose iterators are lists."""

    def __init__(self, make: Callable[[], AsyncClient]) -> None:
        self._loop = Loop()

        async def made() -> AsyncClient:
            return make()

        self.client: AsyncClient = self._loop.run(made())

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def run(*args: Any, **options: Any) -> Any:
            return self._loop.run(finish(method, args, options))

        return run

    def close(self) -> None:
        self._loop.run(self.client.close())
        self._loop.stop()


async def finish(method: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    answer = method(*args, **options)
    return [item async for item in answer] if hasattr(answer, "__aiter__") else await answer


FAKE = {"model": {"provider": "fake", "name": "fake"}}

DIM = int(os.environ.get("TEST_LIVE_DIM", "32"))
LIVE = os.environ.get("TEST_LIVE_URL")
"""The URL of a server on a cluster that this process can connect to (tests/cluster/test_client.py)."""

CLIENTS: dict[str, Callable[[Server], Any]] = {
    "http": lambda server: Client(server.url),
    "http, async": lambda server: Blocking(lambda: AsyncClient(server.url)),
    "in process": lambda server: Client.local("memory://", settings=FAKE),
    "in process, async": lambda server: Blocking(lambda: AsyncClient.local("memory://", settings=FAKE)),
    "handle": lambda server: Client.over(HandleTransport(Handle(server.app.gateway, server.loop))),
    "handle, async": lambda server: Blocking(
        lambda: AsyncClient.over(AsyncHandleTransport(Handle(server.app.gateway, server.loop)))
    ),
}

if LIVE:
    CLIENTS = {
        "http": lambda _: Client(LIVE),
        "http, async": lambda _: Blocking(lambda: AsyncClient(LIVE)),
        "cluster": lambda _: Client.in_cluster(),
        "cluster, async": lambda _: Blocking(AsyncClient.in_cluster),
    }


def vectors_of(texts: list[str]) -> np.ndarray:
    """(n, DIM) float32: what the fake model makes of the texts."""

    async def embed() -> np.ndarray:
        engine = Engine(FakeModel(DIM))
        result = await engine.embed_one(EmbedRequest(texts))
        await engine.close()
        return result.vectors

    return asyncio.run(embed())
