"""The server's side: a driver that asks Serve's controller for replicas, waiting tokens and ongoing requests."""

import math
import os
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.scaling.client import Outcome
from deployments.serving.autoscaling import WAITING_TOKENS
from deployments.serving.ray_internals import ON_LOOPBACK, newest_figure, requests_in_progress

APP = "memserve"
DEPLOYMENTS = ("Embedder", "Store", "Gateway")
CALM_WITHIN_S = 90.0
CALM_S = 5.0


def ray_address(folder: Path) -> str:
    """The address of the server's Ray, read from the command line of the raylet that runs in its folder."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "raylet" and process.cwd() == str(folder):
                flags = dict(part.lstrip("-").split("=", 1) for part in process.cmdline() if "=" in part)
                return str(flags["gcs-address"])
    raise SystemExit("no raylet runs in the server's folder")


@dataclass
class Sample:
    """The server at one moment: running replicas, and the means of the last seconds that the policies use."""

    at: float
    replicas: dict[str, int]
    waiting_tokens: float
    ongoing: dict[str, float]


class Observer:
    """A driver that asks Serve's controller."""

    def __init__(self, address: str) -> None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ |= ON_LOOPBACK
        import ray

        self._ray = ray
        ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="ERROR")

    def look(self) -> Sample:
        from ray import serve

        found = serve.status().applications[APP].deployments
        replicas = {name: int(found[name].replica_states.get("RUNNING", 0)) for name in DEPLOYMENTS}
        ongoing = {name: requests_in_progress(APP, name) for name in DEPLOYMENTS}
        waiting = sum(newest_figure(APP, name, WAITING_TOKENS) for name in ("Embedder", "Gateway"))
        return Sample(time.monotonic(), replicas, waiting, ongoing)

    def wait_until_calm(self) -> None:
        """Wait until each deployment has had one replica for some seconds."""
        deadline, calm_since = time.monotonic() + CALM_WITHIN_S, time.monotonic()
        while time.monotonic() < deadline:
            if set(self.look().replicas.values()) != {1}:
                calm_since = time.monotonic()
            elif time.monotonic() - calm_since > CALM_S:
                return
            time.sleep(0.5)
        raise SystemExit("the replicas did not come down to one of each")

    def close(self) -> None:
        self._ray.shutdown()


def watch(observer: Observer, client: "Future[Outcome]") -> list[Sample]:
    """Take a sample each second until the client is done, and then until each deployment has one replica."""
    samples: list[Sample] = []
    deadline = math.inf
    while time.monotonic() < deadline:
        began = time.monotonic()
        samples.append(observer.look())
        if client.done():
            deadline = min(deadline, began + CALM_WITHIN_S)
            if set(samples[-1].replicas.values()) == {1}:
                break
        time.sleep(max(0.0, 1.0 - (time.monotonic() - began)))
    return samples
