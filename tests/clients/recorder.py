"""A server between a client and memserve that passes requests on unchanged and keeps them."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

_OF_A_CONNECTION = frozenset(
    {"connection", "content-length", "date", "host", "keep-alive", "server", "transfer-encoding"}
)


@dataclass(frozen=True)
class Request:
    """A request as it was sent; the body is None if it is empty."""

    method: str
    path: str
    body: Any


class Recorder:
    """Runs until `stop`.

    Attributes:
        url: its address.
        requests: in the order of their arrival.
    """

    def __init__(self, upstream: str) -> None:
        self.requests: list[Request] = []
        self._client = httpx.Client(base_url=upstream, timeout=60.0, trust_env=False)
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def _pass_on(self) -> None:
                content = self.rfile.read(int(self.headers.get("content-length", 0)))
                recorder.requests.append(Request(self.command, self.path, json.loads(content) if content else None))
                headers = {name: value for name, value in self.headers.items() if name.lower() not in _OF_A_CONNECTION}
                headers["accept-encoding"] = "identity"
                answer = recorder._client.request(self.command, self.path, content=content, headers=headers)
                self.send_response(answer.status_code)
                for name, value in answer.headers.items():
                    if name.lower() not in _OF_A_CONNECTION:
                        self.send_header(name, value)
                self.send_header("content-length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            do_GET = do_POST = _pass_on

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Close the server."""
        self._server.shutdown()
        self._server.server_close()
        self._client.close()
