"""A memserve for tests: `memserve serve` on a free port, in a folder of its own."""

import contextlib
import copy
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
BASE_CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
READY_WITHIN_S = 120.0
EXIT_WITHIN_S = 60.0


def free_port() -> int:
    """A free port below the kernel's ephemeral range: Ray takes dozens of that range before HAProxy listens."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def config_with(args: dict[str, Any], port: int) -> dict[str, Any]:
    """serve_config.yaml with these args and this port."""
    config = copy.deepcopy(BASE_CONFIG)
    config["http_options"]["port"] = port
    config["applications"][0]["args"] = args
    return config


class Server:
    """One `memserve serve`, as `make serve` runs it."""

    def __init__(self, folder: Path, args: dict[str, Any], port: int | None = None) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.config = folder / "serve_config.yaml"
        self.config.write_text(yaml.safe_dump(config_with(args, self.port)))
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.seen: list[str] = []

    def launch(self) -> None:
        """Start the process; a thread reads its output line by line."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "memserve", "serve", str(self.config)],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.put(line.rstrip())
        self.lines.put(None)

    def start(self) -> str:
        """Start the process and wait until it is ready. Returns the ready line."""
        self.launch()
        return self.wait_until_ready()

    def wait_until_ready(self) -> str:
        """Wait until a launched server is ready. Returns the ready line."""
        while (line := self.lines.get(timeout=READY_WITHIN_S)) is not None:
            self.seen.append(line)
            if line.startswith("memserve is ready"):
                return line
        raise AssertionError("the server ended before it was ready:\n" + "\n".join(self.seen))

    def all_lines(self) -> list[str]:
        """All lines of output. Waits until the process has ended."""
        while (line := self.lines.get(timeout=EXIT_WITHIN_S)) is not None:
            self.seen.append(line)
        return self.seen

    def descendants(self) -> list[psutil.Process]:
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def programs(self) -> list[tuple[str, list[str]]]:
        """(name, command line) of each descendant that still runs when it is asked."""
        found = []
        for process in self.descendants():
            with contextlib.suppress(psutil.Error):
                found.append((process.name(), process.cmdline()))
        return found

    def replicas(self, deployment: str) -> set[int]:
        """Process ids of a deployment's replicas, including those that are starting or ending."""
        found = set()
        for process in self.descendants():
            try:
                title = process.cmdline()[:1]
            except psutil.Error:
                continue
            if title and title[0].startswith(f"ray::ServeReplica:memserve:{deployment}"):
                found.add(process.pid)
        return found

    def leftovers(self) -> list[psutil.Process]:
        """Processes whose working directory is this server's folder, as it is of all that the server starts."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd() == str(self.folder):
                    found.append(process)
        return found

    def ray_address(self) -> str:
        """The address to which a driver connects."""
        return self._flag_of_raylet("gcs-address")

    def log_of(self, deployment: str) -> str:
        """The log files that Serve keeps for the replicas of a deployment, of all that there have been."""
        folder = Path(self._flag_of_raylet("session_dir")) / "logs" / "serve"
        return "".join(path.read_text() for path in sorted(folder.glob(f"replica_memserve_{deployment}_*.log")))

    def log_files(self) -> dict[str, bytes]:
        """The contents of all files that Ray and Serve log to, by name."""
        folder = Path(self._flag_of_raylet("session_dir")) / "logs"
        return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def _flag_of_raylet(self, flag: str) -> str:
        """A flag on the command line of this server's own raylet."""
        for name, command in self.programs():
            flags = dict(part.lstrip("-").split("=", 1) for part in command if "=" in part)
            if name == "raylet" and flag in flags:
                return flags[flag]
        raise AssertionError(f"no raylet below the server with the flag {flag}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the server with a signal, and check that its descendants have ended. Returns its exit status."""
        assert self.process is not None
        started = self.descendants()
        self.process.send_signal(number)
        status = self.process.wait(timeout=EXIT_WITHIN_S)
        _, alive = psutil.wait_procs(started, timeout=EXIT_WITHIN_S)
        assert not alive, f"left behind: {alive}"
        assert self.leftovers() == []
        return status

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60.0, trust_env=False)
