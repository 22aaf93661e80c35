"""haproxy.cfg as Ray renders it for memserve, and HAProxy running with it. Without Ray and without gateways."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from ray.serve._private import haproxy
from ray.serve.config import HTTPOptions

from deployments.serving.ray_internals import ENVIRONMENT, local_variables

HEALTH_CHECK = b"GET /-/healthz "


def options() -> dict[str, Any]:
    """The options that Ray takes from our variables."""
    return {
        "retry_on": ENVIRONMENT["RAY_SERVE_HAPROXY_RETRY_ON"],
        "retries": int(ENVIRONMENT["RAY_SERVE_HAPROXY_RETRIES"]),
        "bufsize": int(ENVIRONMENT["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]),
        "balance_algorithm": ENVIRONMENT["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"],
        "health_check_inter": ENVIRONMENT["RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER"],
        "timeout_client_s": int(ENVIRONMENT["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"]),
        "metrics_enabled": ENVIRONMENT["RAY_SERVE_HAPROXY_METRICS_ENABLED"] == "1",
    }


def render(folder: Path, gateways: Sequence[int] = (30_000,), **more: Any) -> Path:
    """Write haproxy.cfg with Ray's own template, for gateways on these ports. Returns its path."""
    state = {"server_state_base": str(folder), "server_state_file": str(folder / "server-state")}
    config = haproxy.HAProxyConfig(socket_path=str(folder / "admin.sock"), **state, **options(), **more)
    servers = [haproxy.ServerConfig(name=f"gateway-{port}", host="127.0.0.1", port=port) for port in gateways]
    backend = haproxy.BackendConfig(name="memserve", path_prefix="/", app_name="memserve", servers=servers)
    path = folder / "haproxy.cfg"
    haproxy.HAProxyApi(config, {"memserve": backend}, config_file_path=str(path))._generate_config_file_internal()
    return path


def check(path: Path) -> "subprocess.CompletedProcess[str]":
    """What HAProxy says of a file."""
    return subprocess.run([haproxy.get_haproxy_binary(), "-c", "-f", path], check=False, capture_output=True, text=True)


class Gateways:
    """Servers that hold each request until `let_go`, and then answer it with `answer`, whatever that is.

    Health checks are held only if `holds_health`.
    """

    def __init__(self) -> None:
        self.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
        self.ports: list[int] = []
        self.paths: list[str] = []
        self.holds_health = False
        self._let_go = asyncio.Event()
        self._let_go.set()
        self._arrived = asyncio.Condition()

    def hold(self) -> None:
        self._let_go.clear()

    def let_go(self) -> None:
        self._let_go.set()

    async def arrived(self, count: int) -> None:
        """Wait until this many requests have arrived, at all of them together."""
        async with asyncio.timeout(20), self._arrived:
            await self._arrived.wait_for(lambda: len(self.paths) >= count)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(HEALTH_CHECK):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            else:
                async with self._arrived:
                    self.paths.append(head.split(b" ")[1].decode())
                    self._arrived.notify_all()
                if self.holds_health or (b" /health" not in head and b" /ping" not in head):
                    await self._let_go.wait()
                writer.write(self.answer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # HAProxy has gone
        finally:
            writer.close()

    @contextlib.asynccontextmanager
    async def listening(self, count: int) -> AsyncIterator["Gateways"]:
        """Listen on `count` ports."""
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(count):
                server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 18, backlog=1024)
                stack.callback(server.close)
                self.ports.append(server.sockets[0].getsockname()[1])
            yield self
            self.let_go()


class Proxy:
    """HAProxy on `port`: the process `process`."""

    def __init__(self, port: int, process: psutil.Process) -> None:
        self.port = port
        self.process = process
        self._tasks: set[asyncio.Task[tuple[int, dict[str, str], bytes]]] = set()

    async def send(self, raw: bytes, address: str = "127.0.0.1") -> "asyncio.Task[tuple[int, dict[str, str], bytes]]":
        """Open a connection from an address and send bytes. Returns a task of the answer: status, headers, body."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(address, 0))
        writer.write(raw)
        await writer.drain()
        task = asyncio.create_task(_read(reader, writer))
        self._tasks.add(task)  # the event loop alone would not keep it
        return task

    async def ask(self, raw: bytes, address: str = "127.0.0.1") -> tuple[int, dict[str, str], bytes]:
        """Send bytes and wait for the answer: status, headers, body."""
        return await asyncio.wait_for(await self.send(raw, address), 20)


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, dict[str, str], bytes]:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers["content-length"]))
        return int(head[0].split(" ")[1]), headers, body
    finally:
        writer.close()


def _free_ports(count: int) -> list[int]:
    """Free ports outside the range of outgoing connections, which could take one before HAProxy binds it."""
    probes: list[socket.socket] = []
    ports = iter(random.sample(range(20_000, 30_000), 1000))
    while len(probes) < count:
        with contextlib.suppress(OSError):  # in use
            probes.append(socket.create_server(("", next(ports))))
    found = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return found


@contextlib.contextmanager
def running(
    folder: Path, gateways: Sequence[int], changes: Mapping[str, str] | None = None, bind: str | None = None
) -> Iterator["Proxy"]:
    """HAProxy in front of gateways on these ports. `changes` are made in the text of haproxy.cfg.

    Args:
        bind: the address on which other machines reach the server; HAProxy then runs as `memserve serve` runs it.
    """
    pid_file = folder / "pid"
    for attempt in range(3):
        port, metrics, stats = _free_ports(3)
        http = HTTPOptions(host="127.0.0.1", port=port)
        path = render(folder, gateways, http_options=http, metrics_port=metrics, stats_port=stats)
        text = path.read_text()
        for old, new in (changes or {}).items():
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
        binary, environment = haproxy.get_haproxy_binary(), dict(os.environ)
        if bind is not None:
            environment |= local_variables(bind, port, binary)
            binary = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
        command = [binary, "-D", "-f", str(path), "-p", str(pid_file)]
        # The command ends when the daemon that it starts listens. Another process may have taken a port meanwhile.
        if subprocess.run(command, check=attempt == 2, env=environment).returncode == 0:
            break
    process = psutil.Process(int(pid_file.read_text()))
    try:
        yield Proxy(port, process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(20)
