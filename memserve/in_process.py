"""The transports in process: engine and store in this process, without Ray and without HTTP. Needs `memserve[server]`.

They have an event loop in a thread of their own, so that neither the caller's threads nor its event loop wait for the
model or the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import weakref
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from deployments.in_process import InProcess
from deployments.settings import Settings, first_problem, load
from memserve import direct
from memserve.errors import MemserveError, ServerError, TimedOut, Unavailable
from memserve.requests import Request, Upload

T = TypeVar("T")

_LINES = 200  # of an import that are read at a time


def settings_of(path: str | PathLike[str], model: str | None, given: Mapping[str, Any]) -> Settings:
    """The settings of a memserve in process.

    Args:
        path: a folder, which has the log as `memserve.db`; or the URL of a log.
        model: see `model.name` in docs/settings.md.
        given: other settings.

    Raises:
        ValueError: a setting is invalid, in one line.
    """
    where = fspath(path)
    url = where if "://" in where else f"sqlite:///{Path(where).absolute() / 'memserve.db'}"
    args = {section: dict(values) if isinstance(values, Mapping) else values for section, values in given.items()}
    args.setdefault("store", {})["url"] = url
    if model is not None:
        args.setdefault("model", {})["name"] = model
    try:
        return load(args)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error


class _Local:
    """memserve on an event loop of its own, in a thread of its own. Loading begins at once.

    Args:
        path, model, given: see `settings_of`.
        max_batch_texts: the most texts in one run of the model; None for no limit.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        model: str | None,
        given: Mapping[str, Any],
        max_batch_texts: int | None = None,
    ) -> None:
        settings = settings_of(path, model, given)
        self.name = settings.store.url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="memserve", daemon=True)
        self._thread.start()
        self._opening = self._begin(InProcess.open(settings, max_batch_texts=max_batch_texts))
        _running.add(self)

    def _begin(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop.is_closed():
            coroutine.close()
            raise MemserveError("This client is closed.")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _opened(self) -> InProcess:
        try:
            with direct.reported():
                # Shielded: a caller that gives up while the model is loaded must not end the loading.
                return await asyncio.shield(asyncio.wrap_future(self._opening))
        except Unavailable as error:  # it would not help to try again
            raise ServerError(error.message, error.status, error.param, error.code) from error

    async def _call(self, request: Request, timeout_s: float | None) -> Any:
        memserve = await self._opened()
        with direct.reported():
            if request.name == "import_lines":
                user, upload = request.arguments
                return await memserve.import_stream(user, _chunks(upload), direct.origin_of(request))
            method = getattr(memserve, request.name)
            return await method(*request.arguments, **direct.options_of(request, timeout_s))

    async def _pieces(self, request: Request) -> AsyncIterator[bytes]:
        return (await self._opened()).export(*request.arguments)

    async def _close(self) -> None:
        self._opening.cancel()
        with contextlib.suppress(Exception, asyncio.CancelledError):  # what could not be opened need not be closed
            memserve = await self._opened()
            await memserve.close()

    def _stop(self) -> None:
        _running.discard(self)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def stop_now(self) -> None:
        """Close the log and the model, and end the thread. Closing a second time does nothing."""
        if self._thread.is_alive():
            self._begin(self._close()).result()
            self._stop()


_running: weakref.WeakSet[_Local] = weakref.WeakSet()


def _close_all() -> None:
    for one in [*_running]:
        one.stop_now()


# Not atexit, which is later than the end of all executors: the store's thread is one.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]


async def _chunks(upload: Upload) -> AsyncIterator[bytes]:
    """The lines of an upload, read in a thread, as reading may block."""
    lines = iter(upload)
    while chunk := await asyncio.to_thread(lambda: b"".join(itertools.islice(lines, _LINES))):
        yield chunk


async def _following(pieces: AsyncIterator[bytes]) -> bytes:
    """The next piece of an export; empty after the last one."""
    with direct.reported():
        return await anext(pieces, b"")


class LocalTransport(_Local):
    """Blocking. See `Transport` in memserve/client.py. The constructor waits until the model is loaded."""

    def __init__(
        self,
        path: str | PathLike[str],
        model: str | None,
        given: Mapping[str, Any],
        max_batch_texts: int | None = None,
    ) -> None:
        super().__init__(path, model, given, max_batch_texts)
        try:
            self._begin(self._opened()).result()
        except BaseException:
            self.close()
            raise

    def send(self, request: Request, timeout_s: float | None) -> Any:
        """The answer to a request."""
        answer = self._begin(self._call(request, timeout_s))
        try:
            return answer.result(None if request.streams else timeout_s)
        except TimeoutError as error:
            answer.cancel()
            raise TimedOut("No answer in time.") from error

    def download(self, request: Request, timeout_s: float | None) -> Iterator[bytes]:
        """The lines of an answer that is streamed."""
        pieces = self._begin(self._pieces(request)).result()
        while piece := self._begin(_following(pieces)).result():
            yield from piece.splitlines(keepends=True)

    def close(self) -> None:
        """Close the log and the model, and end the thread. Closing a second time does nothing."""
        self.stop_now()


class AsyncLocalTransport(_Local):
    """To await. See `AsyncTransport` in memserve/client.py. The first call waits until the model is loaded."""

    async def send(self, request: Request, timeout_s: float | None) -> Any:
        """The answer to a request."""
        for given in request.arguments:
            if isinstance(given, Upload) and given.is_async:  # it belongs to the caller's event loop
                request = request.about(*request.arguments[:-1], Upload([line async for line in given]))
        try:
            async with asyncio.timeout(None if request.streams else timeout_s):
                return await asyncio.wrap_future(self._begin(self._call(request, timeout_s)))
        except TimeoutError as error:
            raise TimedOut("No answer in time.") from error

    async def download(self, request: Request, timeout_s: float | None) -> AsyncIterator[bytes]:
        """The lines of an answer that is streamed."""
        pieces = await asyncio.wrap_future(self._begin(self._pieces(request)))
        while piece := await asyncio.wrap_future(self._begin(_following(pieces))):
            for line in piece.splitlines(keepends=True):
                yield line

    async def close(self) -> None:
        """Close the log and the model, and end the thread. Closing a second time does nothing."""
        await asyncio.to_thread(self.stop_now)
