"""Servers that are all started, of which one at a time runs.

All processes of the other servers are paused (SIGSTOP), so that they take no CPU time from the one that is measured: an
idle Ray takes a few percent of a core, and an idle LitServe without a timeout takes a whole core. `running()` resumes a
server, waits until it answers, and pauses it again.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from benchmarks.machine import ROOT
from benchmarks.server import end, family

START_WITHIN_S = 300.0
ANSWER_WITHIN_S = 60.0
END_WITHIN_S = 25.0
REPLICA = "ray::ServeReplica"  # the beginning of the process title of a replica
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONPATH": str(ROOT)}


class DidNotStart(Exception):
    """A server ended, or did not answer in time. The message is the last line of its log or its last answer."""


class Server:
    """One server with its processes, from start to stop."""

    def __init__(
        self,
        command: list[str],
        *,
        url: str,
        probe: tuple[str, dict[str, object]],
        variables: dict[str, str],
        log: Path,
    ) -> None:
        """Start the server. `probe`: path and body of a POST that succeeds once the server is ready."""
        self.url = url
        self._probe = probe
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **OFFLINE, **variables},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def wait_until_ready(self, within_s: float = START_WITHIN_S) -> None:
        """Wait until the probe succeeds. Raises DidNotStart."""
        path, body = self._probe
        deadline = time.monotonic() + within_s
        said = "nothing"
        with httpx.Client(base_url=self.url, timeout=within_s, trust_env=False) as client:
            while time.monotonic() < deadline:
                try:
                    answer = client.post(path, json=body)
                    if answer.is_success:
                        return
                    said = f"{answer.status_code} {answer.text[:200]}"
                except httpx.TransportError:
                    if self._process.poll() is not None:
                        raise DidNotStart(last_line(self._log.read_text(errors="replace"))) from None
                time.sleep(0.1)
        raise DidNotStart(f"not ready within {within_s:g} s; its last answer: {said}")

    def pause(self) -> None:
        self._signal_all(signal.SIGSTOP)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Resume the server, wait until it answers, and pause it again at the end."""
        self._signal_all(signal.SIGCONT)
        try:
            self.wait_until_ready(ANSWER_WITHIN_S)
            yield
        finally:
            self.pause()

    def replicas(self) -> set[int]:
        """Process ids of the server's Ray Serve replicas; none if it does not use Ray Serve."""
        found = set()
        for process in family(self._process.pid):
            with suppress(psutil.Error):
                if "".join(process.cmdline()[:1]).startswith(REPLICA):
                    found.add(process.pid)
        return found

    def wait_until_whole(self, replicas: int, within_s: float = ANSWER_WITHIN_S) -> None:
        """Wait until the server has so many replicas again, and answers. Raises DidNotStart."""
        deadline = time.monotonic() + within_s
        while len(self.replicas()) < replicas:
            if time.monotonic() > deadline:
                raise DidNotStart(f"fewer than {replicas} replicas for {within_s:g} s")
            time.sleep(0.1)
        self.wait_until_ready(within_s)

    def end(self) -> None:
        """Terminate the server, wait, and kill the processes that it left."""
        self._signal_all(signal.SIGCONT)
        end(self._process, END_WITHIN_S)

    def _signal_all(self, number: int) -> None:
        for process in family(self._process.pid):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def last_line(text: str) -> str:
    """The last line that is not empty, which as a rule names the error."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "its log is empty")
