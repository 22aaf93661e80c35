"""The transports over HTTP. Connections are kept open and used again, by several threads or tasks at once.

A request carries the time that the client waits (`x-request-timeout-ms`), so that the server drops work for which
nobody waits any more.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from memserve import __version__
from memserve.errors import MemserveError, NotReached, TimedOut, of_status
from memserve.requests import Request, Upload
from memserve.routes import ROUTES, HttpForm, http_form

CONNECT_TIMEOUT_S = 5.0
_LIMITS = httpx.Limits(max_connections=64, max_keepalive_connections=16, keepalive_expiry=30.0)


def _headers(api_key: str | None) -> dict[str, str]:
    headers = {"user-agent": f"memserve-python/{__version__}"}
    return headers if api_key is None else {**headers, "authorization": f"Bearer {api_key}"}


def _timeout(timeout_s: float | None) -> httpx.Timeout:
    connect = CONNECT_TIMEOUT_S if timeout_s is None else min(CONNECT_TIMEOUT_S, timeout_s)
    return httpx.Timeout(timeout_s, connect=connect)


def _arguments(form: HttpForm, timeout_s: float | None) -> dict[str, Any]:
    """Arguments of httpx. The body of an upload is not among them."""
    headers = form.headers
    if timeout_s is not None and not isinstance(form.body, Upload):
        headers = {**headers, "x-request-timeout-ms": str(max(1, int(timeout_s * 1e3)))}
    return {
        "method": form.method,
        "url": form.path,
        "params": form.query or None,
        "headers": headers,
        "timeout": _timeout(timeout_s),
    }


@contextmanager
def _reported() -> Iterator[None]:
    """A context for the work of httpx: its errors become the client's."""
    try:
        yield
    except httpx.ConnectTimeout as error:
        raise NotReached(f"The server does not accept the connection within {CONNECT_TIMEOUT_S:g} s.") from error
    except httpx.TimeoutException as error:
        raise TimedOut("The server did not answer in time.") from error
    except httpx.TransportError as error:
        raise NotReached(f"The server cannot be reached: {error or type(error).__name__}.") from error


def _error(response: httpx.Response) -> MemserveError:
    """The error of an answer that has been read."""
    try:
        body = response.json()
    except ValueError:
        body = None
    return of_status(response.status_code, body, _seconds(response.headers.get("retry-after")))


def _seconds(retry_after: str | None) -> float | None:
    """The seconds of a Retry-After header; None if there is none, or if it is a date."""
    try:
        return None if retry_after is None else max(0.0, float(retry_after))
    except ValueError:
        return None


def _answer(request: Request, response: httpx.Response) -> Any:
    """The answer that a handle would give. Raises the error of an answer that is one."""
    if not response.is_success:
        raise _error(response)
    content = json.loads(response.content) if response.content else None
    return ROUTES[request.name].result(content, request.options)


class _Lines:
    """Cuts chunks of bytes into lines that keep their newlines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that end in this chunk."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line + b"\n" for line in lines]

    def end(self) -> list[bytes]:
        """A last line without a newline."""
        return [self._rest + b"\n"] if self._rest else []


class HttpTransport:
    """Blocking. See `Transport` in memserve/client.py."""

    def __init__(self, url: str, api_key: str | None, http_client: httpx.Client | None) -> None:
        self.name = url
        self._http = http_client or httpx.Client(limits=_LIMITS)
        self._http.base_url = httpx.URL(url)
        self._http.headers.update(_headers(api_key))

    def send(self, request: Request, timeout_s: float | None) -> Any:
        """The answer to a request."""
        form = http_form(request)
        content = iter(form.body) if isinstance(form.body, Upload) else form.body
        with _reported():
            return _answer(request, self._http.request(content=content, **_arguments(form, timeout_s)))

    def download(self, request: Request, timeout_s: float | None) -> Iterator[bytes]:
        """The lines of an answer that is streamed."""
        with _reported(), self._http.stream(**_arguments(http_form(request), timeout_s)) as response:
            if not response.is_success:
                response.read()
                raise _error(response)
            lines = _Lines()
            for chunk in response.iter_bytes():
                yield from lines.feed(chunk)
            yield from lines.end()

    def text(self, path: str, timeout_s: float | None) -> str:
        """An answer that is not JSON."""
        with _reported():
            response = self._http.get(path, timeout=_timeout(timeout_s))
        if not response.is_success:
            raise _error(response)
        return response.text

    def close(self) -> None:
        """Close all connections."""
        self._http.close()


class AsyncHttpTransport:
    """To await. See `AsyncTransport` in memserve/client.py."""

    def __init__(self, url: str, api_key: str | None, http_client: httpx.AsyncClient | None) -> None:
        self.name = url
        self._http = http_client or httpx.AsyncClient(limits=_LIMITS)
        self._http.base_url = httpx.URL(url)
        self._http.headers.update(_headers(api_key))

    async def send(self, request: Request, timeout_s: float | None) -> Any:
        """The answer to a request."""
        form = http_form(request)
        content = aiter(form.body) if isinstance(form.body, Upload) else form.body
        with _reported():
            return _answer(request, await self._http.request(content=content, **_arguments(form, timeout_s)))

    async def download(self, request: Request, timeout_s: float | None) -> AsyncIterator[bytes]:
        """The lines of an answer that is streamed."""
        with _reported():
            async with self._http.stream(**_arguments(http_form(request), timeout_s)) as response:
                if not response.is_success:
                    await response.aread()
                    raise _error(response)
                lines = _Lines()
                async for chunk in response.aiter_bytes():
                    for line in lines.feed(chunk):
                        yield line
                for line in lines.end():
                    yield line

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()
