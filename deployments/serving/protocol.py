"""The HTTP protocol of a gateway's server: where it differs from uvicorn's, and why.

An answer leaves in one write. uvicorn writes the headers and the body one after the other, and a gateway that is
killed in between has answered half: HAProxy then can neither send the request to another gateway nor answer it. What is
written at once arrives, or nothing does, and then the request is sent again (deployments/serving/environment.py).

An import is not read ahead. Serve reads a body into memory, without a bound, so as to see at once that its client has
gone away. An import may be larger than the memory, and is made a piece at a time: Serve is told not to look for its
client's leaving. The import reads for itself, and learns of it there.

A header that is not UTF-8 is Latin-1: Serve decodes some headers, and answered 500 where it could not.
"""

import asyncio
import re
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_IMPORT = re.compile(rb"/v1/users/[^/?]+/import(\?|$)")
_NOT_READ_AHEAD = (b"x-request-disconnect-disabled", b"?1")  # of Serve; the last one counts


class CorkedTransport:
    """A transport that holds what is written to it, until `flush` or the end of the event loop's iteration."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Hold `data`, behind what is held already."""
        if not self._held:
            # What is streamed is not complete for a while, and leaves meanwhile.
            asyncio.get_running_loop().call_soon(self.flush)
        self._held.append(data)

    def flush(self) -> None:
        """Write what is held, at once."""
        held, self._held = self._held, []
        if held and not self._transport.is_closing():
            self._transport.write(b"".join(held))

    def close(self) -> None:
        """Write what is held and close."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class GatewayProtocol(HttpToolsProtocol):
    """One connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Begin on a connection."""
        super().connection_made(CorkedTransport(transport))  # type: ignore[arg-type]  # a transport to all who use it

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take what is not UTF-8 for Latin-1."""
        try:
            value.decode()
        except UnicodeDecodeError:
            value = value.decode("latin-1").encode()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Leave the body of an import where it is until it is asked for."""
        if _IMPORT.match(self.url):
            self.headers.append(_NOT_READ_AHEAD)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Send an answer as soon as it is whole."""
        self.transport.flush()  # type: ignore[attr-defined]  # ours, from connection_made
        super().on_response_complete()


def install() -> None:
    """Have every uvicorn server that this process starts from now on, Serve's too, speak it."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{GatewayProtocol.__name__}"
