"""Start a memserve to be measured, on a free port and with its log in a temporary folder, and end all its processes."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from benchmarks.machine import ROOT, cores, gpus

START_WITHIN_S = 300.0
END_WITHIN_S = 60.0

Args = dict[str, Any]


class Failed(SystemExit):
    """A server or a load generator failed. Ends the program with its message unless it is caught."""


@dataclass(frozen=True)
class Server:
    """A running memserve: its URL, its answer to /health/ready (model, device, dtype) and its folder."""

    url: str
    ready: dict[str, str]
    folder: Path


def replicas(count: int, **options: Any) -> Args:
    """Settings for a fixed number of replicas, which must not change during a measurement."""
    return {"min_replicas": count, "max_replicas": count, **options}


def profile(cores: int = cores(), gpus: int = len(gpus())) -> Args:
    """Numbers of replicas that use a whole machine, of which the client needs a part. CPUs are memserve's defaults.

    On a CPU there is one embedder of one thread for each core, and from four cores on one core in eight is left for the
    rest. On GPUs there are two embedders per card, so that one tokenizes and copies while the other computes, and one
    gateway for every two cores, because JSON and not the card is the limit. There is one store: SQLite has one writer.
    """
    if gpus:
        return {"embedder": replicas(2 * gpus), "gateway": replicas(max(1, cores // 2)), "store": replicas(1)}
    embedders = max(1, cores if cores < 4 else cores - max(1, cores // 8))
    return {"embedder": replicas(embedders), "gateway": replicas(max(1, cores // 8)), "store": replicas(1)}


def merged(*parts: Mapping[str, Any]) -> Args:
    """Settings merged section by section; later ones override earlier ones."""
    whole: Args = {}
    for part in parts:
        for section, options in part.items():
            whole.setdefault(section, {}).update(copy.deepcopy(dict(options)))
    return whole


def parse_args(text: str) -> Args:
    """Settings from a command line, in JSON such as `{"gateway": {"min_replicas": 4}}`."""
    given = json.loads(text)
    if not isinstance(given, dict) or not all(isinstance(options, dict) for options in given.values()):
        raise ValueError("must be an object of sections")
    return given


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def memserve(*args: Mapping[str, Any], root: Path = ROOT) -> Iterator[Server]:
    """Serve with these settings. Writes are durable: SQLite on disk with `synchronous` FULL.

    Args:
        root: the checkout of memserve that is served.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # SIGTERM must also end the servers
    with tempfile.TemporaryDirectory(prefix="memserve-bench-") as name:
        folder = Path(name)
        durable = {"store": {"url": f"sqlite:///{folder}/memserve.db", "synchronous": "FULL"}}
        config = yaml.safe_load((root / "serve_config.yaml").read_text())
        config["applications"][0]["args"] = merged(durable, *args)
        port = config["http_options"]["port"] = free_port()
        (folder / "serve_config.yaml").write_text(yaml.safe_dump(config))
        path = os.pathsep.join(part for part in (str(root), os.environ.get("PYTHONPATH")) if part)
        environment = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-m", "deployments", "serve_config.yaml"]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield Server(f"http://127.0.0.1:{port}", _wait(process, port, folder / "log"), folder)
        finally:
            end(process, END_WITHIN_S)


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end(process: "subprocess.Popen[bytes]", within_s: float) -> None:
    """Terminate a process, wait, and kill its remaining processes: a server that hangs must not lose the result."""
    everyone = family(process.pid)
    process.terminate()
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    left = [one for one in everyone if one.is_running()]
    for one in left:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(left, timeout=within_s)


def _wait(process: "subprocess.Popen[bytes]", port: int, log: Path) -> dict[str, str]:
    deadline = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        if "memserve is ready" in log.read_text():
            ready: dict[str, str] = httpx.get(f"http://127.0.0.1:{port}/health/ready", trust_env=False).json()
            return ready
        time.sleep(0.2)
    raise Failed(f"memserve did not start:\n{log.read_text()[-2000:]}")


def load(url: str, *arguments: object) -> dict[str, Any]:
    """Run the load generator in a separate process. Returns its result."""
    command = [sys.executable, "-m", "benchmarks.load", "--url", url, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise Failed(f"the load generator failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
