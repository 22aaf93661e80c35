"""The routes behind a real HTTP server in this process: a fake model and a real store, without Ray and HAProxy."""

import asyncio
import contextlib
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from deployments.serving.protocol import GatewayProtocol
from tests.local_app import LocalApp

WITHIN_S = 60.0


class FuzzedServer:
    """A server that runs in a thread.

    Attributes:
        url: where it answers.
        key: a key with all scopes.
        failed: errors of requests that are faults of the server.
    """

    url: str
    key: str
    failed: list[Exception]

    def __init__(self, folder: Path, auth: str) -> None:
        self._folder = folder
        self._auth = auth
        self._ready = threading.Event()
        self._server: uvicorn.Server | None = None

    def run(self) -> None:
        """Serve until `stop`."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        app = await LocalApp.start(self._folder, auth={"mode": self._auth})
        self.key = await app.make_key("fuzz", scopes=["read", "write", "admin"])
        self.failed = app.errors
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            config = uvicorn.Config(app.api, http=GatewayProtocol, log_config=None, lifespan="off")
            self._server = uvicorn.Server(config)
            self._ready.set()  # whoever connects from now on waits until the server accepts
            await self._server.serve(sockets=[listener])
        await app.stop()

    def wait(self) -> None:
        """Wait until the server listens."""
        assert self._ready.wait(WITHIN_S)

    def stop(self) -> None:
        """Tell the server to end."""
        assert self._server is not None
        self._server.should_exit = True


@contextlib.contextmanager
def serving(auth: str) -> Iterator[FuzzedServer]:
    """A server on a log of its own; `auth` is its `auth.mode`."""
    with tempfile.TemporaryDirectory() as folder:
        server = FuzzedServer(Path(folder), auth)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        server.wait()
        try:
            yield server
        finally:
            server.stop()
            thread.join(WITHIN_S)
