"""The HTTP protocol of a gateway: where it differs from uvicorn's, and why.

An answer is sent in one write. uvicorn writes the headers and the body one after the other. A gateway that is killed
between the two has sent half an answer, and HAProxy can then neither resend the request to another gateway nor answer
it. An answer of one write arrives completely or not at all, and in the second case the request is resent
(deployments/serving/ray_internals.py).

The body of a request is read when the application asks for it, and no sooner. Serve would read it ahead into memory,
without a bound, to notice at once that its client has disconnected. Serve is told of the disconnect alone, and the
application reads from the connection, of which at most 64 KiB and one read more wait in memory. The disconnect of a
client is noticed at once, unless more than this of its body is still unread.

Serve is told not to watch for the disconnect of an import, which reads its body piece by piece and notices it there.

A header that is not UTF-8 is taken for Latin-1. Serve decodes some headers, and would answer 500 if it could not.

Serve takes the id of a request from the header `x-request-id`, puts it into each line that is logged for the request,
and answers with it; if there is none, it makes one. A value that is not 1 to 128 printable ASCII characters without
spaces is left out, so that Serve makes one.

Headers by which a client would tell Serve how to treat a request are left out. Serve would end the request after a time
that the client chooses, with an answer in plain text, whether or not a write is being made; memserve has
`x-request-timeout-ms` for that.

A request that asks for an upgrade of the connection is answered as if it did not (RFC 9110, 7.8). uvicorn would lose
its body, or begin a WebSocket whose handshake never ends. Java's HttpClient asks for HTTP/2 in its first request.

A request that is not HTTP is refused in the shape of every error. uvicorn would answer with plain text.
"""

import asyncio
import re
from typing import Any

import httptools
import orjson
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deployments.errors import HttpError
from deployments.requests.receive import RECEIVE
from deployments.serving.ray_internals import DO_NOT_WATCH, HEADERS_FOR_SERVE, use_http_protocol

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_IMPORT = re.compile(rb"/v1/users/[^/?]+/import(\?|$)")


class CorkedTransport:
    """A transport that collects writes until `flush`, or until the end of the event loop's iteration."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Append `data` to the writes that are held."""
        if not self._held:
            # A streamed answer is not complete for a while; its parts must not wait for the end.
            asyncio.get_running_loop().call_soon(self.flush)
        self._held.append(data)

    def flush(self) -> None:
        """Send everything that is held, in one write."""
        held, self._held = self._held, []
        if held and not self._transport.is_closing():
            self._transport.write(b"".join(held))

    def close(self) -> None:
        """Send everything that is held, then close."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class GatewayProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._application = self.app
        self.app = self._answer
        self._lost = asyncio.Event()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request: Serve waits for the disconnect, and the application alone reads the body."""

        async def read() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message["more_body"]:
                # uvicorn stops reading while 64 KiB wait, and the disconnect would not be noticed.
                self.flow.resume_reading()
            return message

        await self._application({**scope, RECEIVE: read}, self._disconnected, send)

    async def _disconnected(self) -> Message:
        await self._lost.wait()
        return {"type": "http.disconnect"}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Put the collecting transport in front of the connection's own."""
        super().connection_made(CorkedTransport(transport))  # type: ignore[arg-type]  # used as a transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell Serve of the disconnect."""
        self._lost.set()
        super().connection_lost(exc)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Decode a value that is not UTF-8 as Latin-1. Leave out Serve's headers and a request id that is not valid."""
        name = name.lower()
        if name in HEADERS_FOR_SERVE:
            return
        try:
            value.decode()
        except UnicodeDecodeError:
            value = value.decode("latin-1").encode()
        if name != b"x-request-id" or _REQUEST_ID.fullmatch(value):
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Tell Serve not to watch for the disconnect of an import."""
        if _IMPORT.match(self.url):
            self.headers.append(DO_NOT_WATCH)
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived. A request that asks for an upgrade is parsed again, as if it did not."""
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserError:
                return self.send_400_response("")
            except httptools.HttpParserUpgrade as upgrade:
                if self.parser.get_method() == b"CONNECT":
                    return self.send_400_response("")
                (parsed,) = upgrade.args  # the parser stopped in front of the body
                data = self._head_without_upgrade() + data[parsed:]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn

    def _head_without_upgrade(self) -> bytes:
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/1.1"]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _should_upgrade(self) -> bool:
        return True  # that is, uvicorn does nothing about such a request before it is read again

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that is not HTTP, and close the connection."""
        error = HttpError(400, "invalid_request_error", "The request is not valid HTTP.", None, "invalid_http", None)
        content = orjson.dumps(error.body())
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + content)
        self.transport.close()

    def on_response_complete(self) -> None:
        """Send an answer as soon as it is complete."""
        self.transport.flush()  # type: ignore[attr-defined]  # ours, from connection_made
        super().on_response_complete()


def install() -> None:
    """Make every uvicorn server that this process starts from now on, Serve's too, use GatewayProtocol."""
    use_http_protocol(f"{__name__}:{GatewayProtocol.__name__}")
