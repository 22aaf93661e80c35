"""How a gateway's answers leave it: the headers and the body of one in a single write.

uvicorn writes them one after the other, and a gateway that is killed in between has answered half: HAProxy then can
neither send the request to another gateway nor answer it. What is written at once arrives, or nothing does, and then
the request is sent again (deployments/environment.py). It also wakes HAProxy once an answer, not twice.
"""

import asyncio
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


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


class CorkedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, on a corked transport."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Begin on a connection."""
        super().connection_made(CorkedTransport(transport))  # type: ignore[arg-type]  # a transport to all who use it

    def on_response_complete(self) -> None:
        """Send an answer as soon as it is whole."""
        self.transport.flush()  # type: ignore[attr-defined]  # ours, from connection_made
        super().on_response_complete()


def install() -> None:
    """Have every uvicorn server that this process starts from now on, Serve's too, cork its answers."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{CorkedProtocol.__name__}"
