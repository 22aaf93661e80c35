"""POST requests over kept HTTP/1.1 connections, with as little work in Python as possible.

The load generator shares its cores with the server that it measures. aiohttp's client takes 0.2 ms of CPU time for a
request; this one takes a third of that.
"""

import asyncio
from types import TracebackType
from typing import cast
from urllib.parse import urlsplit

import httptools

TIMEOUT_S = 300.0  # until an answer is complete


class Lost(ConnectionError):
    """The connection ended, or the server sent something other than HTTP, before the answer was complete."""


class _Connection(asyncio.Protocol):
    """One connection, which carries one request at a time."""

    def __init__(self) -> None:
        self.kept = False
        self._answer: asyncio.Future[int] | None = None
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.kept = True

    async def ask(self, request: bytes) -> int:
        """Send a request and read the whole answer, whose body is dropped. Returns the status."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        self.kept = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def on_message_complete(self) -> None:
        if self._answer is None or self._answer.done():  # an answer without a request
            self.close()
            return
        self.kept = self._parser.should_keep_alive()
        self._answer.set_result(self._parser.get_status_code())

    def connection_lost(self, _: Exception | None) -> None:
        self.kept = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Lost())


class Connections:
    """As many connections to one server as there are concurrent requests. A context manager, which closes them.

    Args:
        url: `http://host:port`.
        key: is sent with every request, if it is given.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        there = urlsplit(url)
        credentials = "" if key is None else f"authorization: Bearer {key}\r\n"
        self._host, self._port = there.hostname or "", there.port or 80
        self._head = (
            f" HTTP/1.1\r\nhost: {there.netloc}\r\n{credentials}content-type: application/json\r\ncontent-length: "
        )
        self._idle: list[_Connection] = []

    async def post(self, path: str, body: bytes) -> int:
        """Send a JSON body. Returns the status when the answer is complete.

        Raises:
            OSError: there is no connection; its subclass `Lost`: the connection ended early.
            TimeoutError: there is no complete answer within `TIMEOUT_S`.
        """
        async with asyncio.timeout(TIMEOUT_S):
            connection = self._take() or await self._connect()
            try:
                status = await connection.ask(f"POST {path}{self._head}{len(body)}\r\n\r\n".encode() + body)
            except BaseException:  # the answer may still come, and must not be read as that of the next request
                connection.close()
                raise
        if connection.kept:
            self._idle.append(connection)
        else:
            connection.close()
        return status

    def _take(self) -> _Connection | None:
        while self._idle:
            if (connection := self._idle.pop()).kept:
                return connection
        return None

    async def _connect(self) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        return connection

    async def __aenter__(self) -> "Connections":
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        while self._idle:
            self._idle.pop().close()
