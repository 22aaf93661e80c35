"""Ten thousand operations of many clients on a few users, while replicas are added, removed and killed.

The gateway sends a user to one store replica. The clients of the store in this test choose replicas at random, so that
any replica may answer any operation; other clients use HTTP. tests/histories judges all answers.
"""

import asyncio
import contextlib
import multiprocessing
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from deployments.serving import ray_internals
from tests.cluster.server import Server
from tests.histories.check import check
from tests.histories.clients import OverHandle, OverHttp
from tests.histories.records import Answer, Event, Operation
from tests.workload import DIM, Workload

OPERATIONS = 10_000
USERS = 4
STORE_CLIENTS = 24
HTTP_CLIENTS = 8
CLIENTS_TOGETHER = 8  # clients whose calls are combined, as those of one gateway are
MOVES = [(3, 2), (1, 1), (4, 2), (2, 1), (3, 2)]  # (stores, gateways), one after the other
KILL_AT = (4, 2)  # after this move some replicas are killed
KILLED = {"Store": 2, "Gateway": 1}
MOVE_WITHIN_S = 40.0

ARGS = {
    "model": {"provider": "fake", "name": "fake", "dim": DIM},
    "embedder": {"min_replicas": 1, "max_replicas": 1, "num_cpus": 0.1},
    # Users grow beyond this, so that exact indexes, HNSW indexes and the change between them are used.
    "store": {"min_replicas": 2, "max_replicas": 2, "num_cpus": 0.05, "exact_below": 15},
    "gateway": {"min_replicas": 1, "max_replicas": 1, "num_cpus": 0.05},
}


# The driver: a process of its own, since Serve's router threads outlive `ray.shutdown`.


def _connect(address: str) -> None:
    ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="ERROR")


def with_replicas(config: dict[str, Any], stores: int, gateways: int) -> dict[str, Any]:
    """The config with fixed numbers of replicas, which autoscaling cannot change.

    Serve restarts no replica for it, because only the listed deployments change; other `args:` would be a new version.
    """
    application = dict(config["applications"][0])
    application["deployments"] = [
        {"name": name, "autoscaling_config": {"min_replicas": replicas, "max_replicas": replicas}}
        for name, replicas in (("Store", stores), ("Gateway", gateways))
    ]
    return {**config, "applications": [application]}


def _scale(config: dict[str, Any], stores: int, gateways: int) -> None:
    config = with_replicas(config, stores, gateways)
    ray_internals.deploy(ServeDeploySchema.model_validate(config))


def _replicas(name: str) -> tuple[int, int]:
    """(running replicas, replicas in any other state)"""
    states = serve.status().applications["memserve"].deployments[name].replica_states
    running = states.get("RUNNING", 0)
    return running, sum(states.values()) - running


async def _move(config: dict[str, Any], stores: int, gateways: int) -> None:
    await asyncio.to_thread(_scale, config, stores, gateways)
    deadline = time.monotonic() + MOVE_WITHIN_S
    while time.monotonic() < deadline:
        now = [await asyncio.to_thread(_replicas, name) for name in ("Store", "Gateway")]
        if now == [(stores, 0), (gateways, 0)]:
            return
        await asyncio.sleep(0.2)
    raise AssertionError(f"not {stores} stores and {gateways} gateways within {MOVE_WITHIN_S} s: {now}")


def _kill(server: int) -> None:
    """kill -9 some replicas while they work."""
    titles: dict[psutil.Process, str] = {}
    for child in psutil.Process(server).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            titles[child] = "".join(child.cmdline()[:1])
    for deployment, count in KILLED.items():
        title = f"ray::ServeReplica:memserve:{deployment}"
        replicas = [child for child, started_as in titles.items() if started_as.startswith(title)]
        for replica in replicas[:count]:
            replica.kill()


async def _record(config: dict[str, Any], url: str, server: int, seed: int) -> list[Event]:
    rng = random.Random(seed)
    workloads = [Workload(f"user-{n}", rng) for n in range(USERS)]
    history: list[Event] = []
    moving = asyncio.create_task(_moves(config, server))
    handle = serve.get_deployment_handle("Store", "memserve")

    async def client(name: str, perform: Callable[[str, Operation], Awaitable[Answer | None]]) -> None:
        while len(history) < OPERATIONS or not moving.done():
            work = rng.choice(workloads)
            operation = work.next()
            began = time.monotonic()
            answer = await perform(work.user, operation)
            ended = time.monotonic() if answer is not None else float("inf")
            work.learn(operation, answer)
            history.append(Event(work.user, operation, answer, began, ended, name))

    async with httpx.AsyncClient(base_url=url, timeout=60.0, trust_env=False) as http:
        stores = [OverHandle(handle) for _ in range(STORE_CLIENTS // CLIENTS_TOGETHER)]
        await asyncio.gather(
            *(client(f"store client {n}", stores[n % len(stores)].perform) for n in range(STORE_CLIENTS)),
            *(client(f"http client {n}", OverHttp(http).perform) for n in range(HTTP_CLIENTS)),
        )
    await moving
    return history


async def _moves(config: dict[str, Any], server: int) -> None:
    for replicas in MOVES:
        await _move(config, *replicas)
        if replicas == KILL_AT:
            await asyncio.to_thread(_kill, server)
        await asyncio.sleep(1.0)


def _run(config: dict[str, Any], url: str, server: int, seed: int) -> list[Event]:
    return asyncio.run(_record(config, url, server, seed))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, ARGS)
    config = with_replicas(yaml.safe_load(server.config.read_text()), 2, 1)
    server.config.write_text(yaml.safe_dump(config))
    server.start()
    yield server
    server.stop()


def test_any_replica_is_right_at_any_moment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "RAY_SERVE_THROUGHPUT_OPTIMIZED", "1"
    )  # the driver reads it at import; its handle must be like a gateway's
    config = yaml.safe_load(server.config.read_text())
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=_connect, initargs=(server.ray_address(),)
    ) as driver:
        started = time.monotonic()
        assert server.process is not None
        running = driver.submit(_run, config, server.url, server.process.pid, 1)
        history = running.result(timeout=240)
        took_s = time.monotonic() - started
    checked = time.monotonic()
    violations = check(history)
    print(f"{len(history)} operations in {took_s:.0f} s, checked in {time.monotonic() - checked:.1f} s")
    assert not violations, "\n".join(map(str, violations))
    assert len(history) >= OPERATIONS
    # The operations of the killed replicas took effect once, and were answered.
    assert [str(event) for event in history if event.answer is None] == []
