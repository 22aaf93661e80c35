"""The transports over a Ray handle, for programs on the cluster. Needs `memserve[server]`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from deployments.serving import handles
from memserve import direct
from memserve.errors import NotReached, TimedOut
from memserve.requests import Request, Upload
from store import DEFAULT_TENANT


@contextmanager
def _reported() -> Iterator[None]:
    """A context for a call: errors become the client's."""
    try:
        with direct.reported(), handles.raised_plainly():
            yield
    except TimeoutError as error:
        raise TimedOut("The server did not answer in time.") from error


def handle_of(app: str) -> Any:
    """The handle of an application on this cluster.

    Raises:
        NotReached: there is no cluster.
        Unavailable: the application does not run on it.
    """
    try:
        with direct.reported():
            return handles.handle_of(app)
    except ConnectionError as error:
        raise NotReached(str(error)) from error


async def _read(upload: Upload) -> list[bytes]:
    return [line async for line in upload]


class _Over:
    """A handle, and the tenant for which its methods are called."""

    def __init__(self, handle: Any, tenant: str = DEFAULT_TENANT) -> None:
        self.name = "a Ray handle"
        self._handle = handle
        self._tenant = tenant

    def _options(self, request: Request, timeout_s: float | None) -> dict[str, Any]:
        return direct.options_of(request, timeout_s, self._tenant)

    def _stream(self, request: Request) -> Any:
        handle = self._handle.options(stream=True)
        return getattr(handle, request.name).remote(*request.arguments, **self._options(request, None))


class HandleTransport(_Over):
    """Blocking. See `Transport` in memserve/client.py."""

    def send(self, request: Request, timeout_s: float | None) -> Any:
        """The answer to a request."""
        arguments = [[*given] if isinstance(given, Upload) else given for given in request.arguments]
        with _reported():
            method = getattr(self._handle, request.name)
            return method.remote(*arguments, **self._options(request, timeout_s)).result(
                timeout_s=None if request.streams else timeout_s
            )

    def download(self, request: Request, timeout_s: float | None) -> Iterator[bytes]:
        """The lines of an answer that is streamed."""
        with _reported():
            for piece in self._stream(request):
                yield from piece.splitlines(keepends=True)

    def close(self) -> None:
        """Nothing: the connection to the cluster belongs to the process."""


class AsyncHandleTransport(_Over):
    """To await. See `AsyncTransport` in memserve/client.py."""

    async def send(self, request: Request, timeout_s: float | None) -> Any:
        """The answer to a request."""
        arguments = [await _read(given) if isinstance(given, Upload) else given for given in request.arguments]
        with _reported():
            async with asyncio.timeout(None if request.streams else timeout_s):
                return await getattr(self._handle, request.name).remote(*arguments, **self._options(request, timeout_s))

    async def download(self, request: Request, timeout_s: float | None) -> AsyncIterator[bytes]:
        """The lines of an answer that is streamed."""
        with _reported():
            async for piece in self._stream(request):
                for line in piece.splitlines(keepends=True):
                    yield line

    async def close(self) -> None:
        """Nothing: the connection to the cluster belongs to the process."""
