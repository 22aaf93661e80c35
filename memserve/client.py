"""The clients: how a call is executed, blocking or with await. The calls are in memserve/calls.py.

Guarantees:
- A request that is refused because the server is busy (429), not ready (503) or away is sent again, within `timeout`.
  A write is made once, however often it is sent.
- The answers of a list that is sent in pieces are in the order of the list. Up to `IN_FLIGHT` pieces are sent at a
  time.
- A client may be shared: `Client` by threads, `AsyncClient` by the tasks of one event loop.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from memserve.calls import Awaiting, Blocking, Calls, Steps
from memserve.errors import MemserveError
from memserve.http import AsyncHttpTransport, HttpTransport
from memserve.requests import Batch, Download, Pages, Piece, Request, progress_bar
from memserve.retries import Retries

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 60.0
IN_FLIGHT = 4


class Transport(Protocol):
    """Carries requests, each once. `name` is of what it reaches, for people."""

    name: str

    def send(self, request: Request, timeout_s: float | None) -> Any: ...
    def download(self, request: Request, timeout_s: float | None) -> Iterator[bytes]: ...
    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """The same with await."""

    name: str

    async def send(self, request: Request, timeout_s: float | None) -> Any: ...
    def download(self, request: Request, timeout_s: float | None) -> AsyncIterator[bytes]: ...
    async def close(self) -> None: ...


def _url(given: str | None) -> str:
    return given or os.environ.get("MEMSERVE_URL") or DEFAULT_URL


def _api_key(given: str | None) -> str | None:
    return given or os.environ.get("MEMSERVE_API_KEY") or None


@contextmanager
def needs_server() -> Iterator[None]:
    """A context for an import of the server. If it is not installed, the error says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        message = f'{error.name} is not installed; this needs the server: pip install "memserve[server]"'
        raise ModuleNotFoundError(message, name=error.name) from error


class Client(Blocking, Calls):
    """A client that blocks.

    Args:
        url: of the server. By default MEMSERVE_URL, or http://127.0.0.1:8000.
        api_key: by default MEMSERVE_API_KEY.
        timeout: seconds for one request, with all attempts to send it; None for no limit. A list that is sent in pieces
            has this time for each piece, an import or an export for each part of its stream.
        show_progress: whether long work shows a progress bar on standard error. By default if that is a terminal.
        http_client: your own, with proxies or certificates.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        *,
        show_progress: bool | None = None,
        http_client: httpx.Client | None = None,
    ) -> None:
        self._transport: Transport = HttpTransport(_url(url), _api_key(api_key), http_client)
        self._timeout_s = timeout
        self._show_progress = show_progress

    @classmethod
    def over(
        cls, transport: Transport, timeout: float | None = DEFAULT_TIMEOUT_S, *, show_progress: bool | None = None
    ) -> Self:
        """A client over another transport than HTTP."""
        self = cls.__new__(cls)
        self._transport, self._timeout_s, self._show_progress = transport, timeout, show_progress
        return self

    @classmethod
    def local(
        cls,
        path: str | os.PathLike[str] = "./memories",
        *,
        model: str | None = None,
        settings: Mapping[str, Any] | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        show_progress: bool | None = None,
    ) -> Self:
        """memserve in this process: the model and the store, without a server. Needs `memserve[server]`.

        Args:
            path: a folder, which has the log as `memserve.db`, as a server has it; `memory://`, which is lost at the
                end; or the URL of a log.
            model: a folder, or the name of a model. By default the server's: all-MiniLM-L6-v2.
            settings: other settings, as in docs/settings.md: `{"model": {"device": "cpu"}}`.

        Raises:
            ValueError: a setting is invalid.
            ServerError: the model or the log cannot be opened.
            Conflict: the log was filled by another model.
        """
        with needs_server():
            from memserve.in_process import LocalTransport

        transport = LocalTransport(path, model, settings or {})
        return cls.over(transport, timeout, show_progress=show_progress)

    @classmethod
    def in_cluster(
        cls,
        app: str = "memserve",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        *,
        tenant: str = "default",
        show_progress: bool | None = None,
    ) -> Self:
        """A client over a Ray handle, for programs on a machine of the cluster. Needs `memserve[server]`.

        Connects to the cluster unless the process has done so.
        """
        with needs_server():
            from memserve.cluster import HandleTransport, handle_of

        return cls.over(HandleTransport(handle_of(app), tenant), timeout, show_progress=show_progress)

    def _run(self, steps: Steps[T]) -> T:
        """Execute a call."""
        with closing(steps):
            try:
                step = next(steps)
                while True:
                    try:
                        answer = self._send(step) if isinstance(step, Request) else self._send_batch(step)
                    except MemserveError as error:
                        step = steps.throw(error)
                    else:
                        step = steps.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result

    def _send(self, request: Request) -> Any:
        retries = Retries(self._timeout_s)
        while True:
            try:
                return self._transport.send(request, retries.remaining_s)
            except MemserveError as error:
                if not request.may_be_sent_again:
                    raise
                time.sleep(retries.delay_s(error))

    def _send_batch(self, batch: Batch) -> list[Any]:
        """The answers of all pieces. After an error no further piece is sent."""
        failed: list[MemserveError] = []

        def send(piece: Piece) -> Any:
            if failed:
                return None
            try:
                with piece.located():
                    answer = self._send(piece.request)
            except MemserveError as error:
                failed.append(error)
                return None
            bar.update(piece.items)
            return answer

        with (
            progress_bar(
                batch.title, batch.unit, batch.items, self._show_progress if len(batch.pieces) > 1 else False
            ) as bar,
            ThreadPoolExecutor(1 if batch.in_order else IN_FLIGHT) as pool,
        ):
            answers = [*pool.map(send, batch.pieces)]
        if failed:
            raise failed[0]
        return answers

    def _pages(self, pages: Pages[T]) -> Iterator[T]:
        request: Request | None = pages.request
        while request is not None:
            answer = self._send(request)
            yield from pages.found(answer)
            request = pages.after(answer)

    def _download(self, download: Download[T]) -> Iterator[T]:
        retries = Retries(self._timeout_s)
        with download.bar() as bar:
            while True:
                begun = False
                try:
                    for line in self._transport.download(download.request, self._timeout_s):
                        begun = True
                        bar.update()
                        yield download.make(line)
                    return
                except MemserveError as error:
                    if begun:
                        raise
                    time.sleep(retries.delay_s(error))

    def close(self) -> None:
        """Close the connections; in process, close the store too."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._transport.name!r})"


class AsyncClient(Awaiting, Calls):
    """A client to await. Belongs to one event loop. Its arguments are those of `Client`."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        *,
        show_progress: bool | None = None,
        http_client: httpx.AsyncClient | None = None,
    ) -> None:
        self._transport: AsyncTransport = AsyncHttpTransport(_url(url), _api_key(api_key), http_client)
        self._timeout_s = timeout
        self._show_progress = show_progress

    @classmethod
    def over(
        cls, transport: AsyncTransport, timeout: float | None = DEFAULT_TIMEOUT_S, *, show_progress: bool | None = None
    ) -> Self:
        """A client over another transport than HTTP."""
        self = cls.__new__(cls)
        self._transport, self._timeout_s, self._show_progress = transport, timeout, show_progress
        return self

    @classmethod
    def local(
        cls,
        path: str | os.PathLike[str] = "./memories",
        *,
        model: str | None = None,
        settings: Mapping[str, Any] | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        show_progress: bool | None = None,
    ) -> Self:
        """memserve in this process. See `Client.local`; the first call waits until the model is loaded."""
        with needs_server():
            from memserve.in_process import AsyncLocalTransport

        transport = AsyncLocalTransport(path, model, settings or {})
        return cls.over(transport, timeout, show_progress=show_progress)

    @classmethod
    def in_cluster(
        cls,
        app: str = "memserve",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        *,
        tenant: str = "default",
        show_progress: bool | None = None,
    ) -> Self:
        """A client over a Ray handle, for code on the cluster, deployments too. See `Client.in_cluster`."""
        with needs_server():
            from memserve.cluster import AsyncHandleTransport, handle_of

        return cls.over(AsyncHandleTransport(handle_of(app), tenant), timeout, show_progress=show_progress)

    async def _run(self, steps: Steps[T]) -> T:
        with closing(steps):
            try:
                step = next(steps)
                while True:
                    try:
                        answer = await (self._send(step) if isinstance(step, Request) else self._send_batch(step))
                    except MemserveError as error:
                        step = steps.throw(error)
                    else:
                        step = steps.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result

    async def _send(self, request: Request) -> Any:
        retries = Retries(self._timeout_s)
        while True:
            try:
                return await self._transport.send(request, retries.remaining_s)
            except MemserveError as error:
                if not request.may_be_sent_again:
                    raise
                await asyncio.sleep(retries.delay_s(error))

    async def _send_batch(self, batch: Batch) -> list[Any]:
        """The answers of all pieces. After an error no further piece is sent."""
        answers: list[Any] = [None] * len(batch.pieces)
        failed: list[MemserveError] = []
        following = iter(enumerate(batch.pieces))  # each piece is sent once: the senders share one iterator

        async def send() -> None:
            for number, piece in following:
                try:
                    with piece.located():
                        answers[number] = await self._send(piece.request)
                except MemserveError as error:
                    failed.append(error)
                if failed:
                    return
                bar.update(piece.items)

        with progress_bar(
            batch.title, batch.unit, batch.items, self._show_progress if len(batch.pieces) > 1 else False
        ) as bar:
            await asyncio.gather(*(send() for _ in range(1 if batch.in_order else IN_FLIGHT)))
        if failed:
            raise failed[0]
        return answers

    async def _pages(self, pages: Pages[T]) -> AsyncIterator[T]:
        request: Request | None = pages.request
        while request is not None:
            answer = await self._send(request)
            for item in pages.found(answer):
                yield item
            request = pages.after(answer)

    async def _download(self, download: Download[T]) -> AsyncIterator[T]:
        retries = Retries(self._timeout_s)
        with download.bar() as bar:
            while True:
                begun = False
                try:
                    async for line in self._transport.download(download.request, self._timeout_s):
                        begun = True
                        bar.update()
                        yield download.make(line)
                    return
                except MemserveError as error:
                    if begun:
                        raise
                    await asyncio.sleep(retries.delay_s(error))

    async def close(self) -> None:
        """Close the connections; in process, close the store too."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._transport.name!r})"


local = Client.local
