"""Ten thousand operations of many clients on a few users, by any replica, while replicas come and go.

The clients of the store route at random, where the gateway keeps a user on one replica: each may meet any of them at
any time. The others come over HTTP. What all were answered is judged by tests/histories.py.
"""

import asyncio
import multiprocessing
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import orjson
import pytest
import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeDeploySchema

from deployments.calls import StoreCalls
from deployments.errors import MemserveError
from store import Append as StoreAppend
from store import NewMemory, StoreError
from store import Search as StoreSearch
from store import Store as Memories
from tests import workload
from tests.cluster.server import Server
from tests.histories import (
    Answer,
    Append,
    Appended,
    Delete,
    DeleteWhere,
    Erase,
    Event,
    Found,
    Get,
    List,
    One,
    Operation,
    Refused,
    Removed,
    Search,
    Update,
    Vector,
    Where,
    check,
)
from tests.workload import DIM, Workload

TENANT = "default"
OPERATIONS = 10_000
USERS = 4
STORE_CLIENTS = 24
HTTP_CLIENTS = 8
CLIENTS_TOGETHER = 8  # whose calls are coalesced, as those of one gateway
MOVES = [(3, 2), (1, 1), (4, 2), (2, 1), (3, 2)]  # (stores, gateways), one after the other
MOVE_WITHIN_S = 40.0

ARGS = {
    "model": {"provider": "fake", "name": "fake", "dim": DIM},
    "embedder": {"min_replicas": 1, "max_replicas": 1, "num_cpus": 0.1},
    # Users grow beyond the switch, so that exact and HNSW indexes, and what lies between, are met.
    "store": {"min_replicas": 2, "max_replicas": 2, "num_cpus": 0.05, "exact_below": 15},
    "gateway": {"min_replicas": 1, "max_replicas": 1, "num_cpus": 0.05},
}


class RandomlyRouted(StoreCalls):
    """Calls that go to any replica, each to another."""

    def _partition(self, tenant: str, user_id: str) -> int:
        return random.randrange(len(self._by_partition))


class OverHandle:
    """Clients of the Store deployment, as those of a gateway are."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._calls = RandomlyRouted(handle, partitions=64, append_in_flight=2, append_memories=64)

    async def perform(self, user: str, operation: Operation) -> Answer | None:
        """The answer; None where it is not known what became of the operation."""
        try:
            return await self._perform(user, operation)
        except StoreError as error:
            return workload.refused(error)
        except MemserveError:
            return None

    async def _perform(self, user: str, operation: Operation) -> Answer:
        calls, issued_at = self._calls, datetime.now(UTC)
        match operation:
            case Append(memories, upsert):
                rows = tuple(
                    NewMemory(new.id or str(uuid.uuid4()), new.text, array(new.vector), new.metadata)
                    for new in memories
                )
                request = StoreAppend(TENANT, user, rows, upsert=upsert, issued_at=issued_at)
                return workload.appended((await calls.append([request]))[0])
            case Update(id, text, vector, metadata, if_version):
                changes: dict[str, Any] = {} if metadata is None else {"metadata": metadata}
                if text is not None and vector is not None:
                    changes |= {"text": text, "vector": array(vector)}
                changed = await calls.update(TENANT, user, id, if_version=if_version, issued_at=issued_at, **changes)
                return One(workload.seen(changed))
            case Delete(id):
                await calls.delete(TENANT, user, id)
                return Removed(1)
            case DeleteWhere((key, value)):
                return Removed(await calls.run(Memories.delete_where, TENANT, user, {key: value}))
            case Erase():
                return Removed(*await calls.run(Memories.erase_user, TENANT, user))
            case Get(id):
                return One(workload.seen(await calls.run_warm(Memories.get, TENANT, user, id)))
            case List(where):
                page = await calls.run_warm(
                    Memories.list, TENANT, user, limit=workload.ALL, filter=as_filter(where), order="updated_at"
                )
                return Found(tuple(map(workload.seen, page.memories)))
            case Search(vector, top_k, where):
                search = StoreSearch(TENANT, user, array(vector), top_k, as_filter(where))
                return workload.found(await calls.search(search))


class OverHttp:
    """A client of the routes."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def perform(self, user: str, operation: Operation) -> Answer | None:
        """As `OverHandle.perform`."""
        method, path, body = _request(operation)
        url = f"/v1/users/{quote(user, safe='')}{path}"
        try:
            answer = await self._http.request(method, url, content=None if body is None else orjson.dumps(body))
        except httpx.TransportError:
            return None
        if answer.status_code in (404, 409):
            return Refused(answer.json()["error"]["code"] or "not_found")
        return _answer(operation, orjson.loads(answer.content or b"{}")) if answer.is_success else None


def _request(operation: Operation) -> tuple[str, str, dict[str, Any] | None]:
    match operation:
        case Append(memories, upsert):
            rows = [
                {"text": new.text, "vector": new.vector, "metadata": new.metadata, **({"id": new.id} if new.id else {})}
                for new in memories
            ]
            return "POST", "/memories", {"memories": rows, "upsert": upsert}
        case Update(id, text, _, metadata, if_version):
            changes = {"text": text, "metadata": metadata, "if_version": if_version}
            return "PATCH", f"/memories/{id}", {name: value for name, value in changes.items() if value is not None}
        case Delete(id):
            return "DELETE", f"/memories/{id}", None
        case DeleteWhere(where):
            return "DELETE", "/memories", {"filter": as_filter(where)}
        case Erase():
            return "DELETE", "", None
        case Get(id):
            return "GET", f"/memories/{id}", None
        case List(where):
            query = f"?limit={workload.ALL}&order=updated_at"
            return (
                "GET",
                f"/memories{query}{'' if where is None else f'&filter={quote(orjson.dumps(as_filter(where)))}'}",
                None,
            )
        case Search(vector, top_k, where):
            given = {} if where is None else {"filter": as_filter(where)}
            return "POST", "/memories/search", {"vector": vector, "top_k": top_k, **given}


def _answer(operation: Operation, body: dict[str, Any]) -> Answer:
    match operation:
        case Append():
            entries = tuple((entry["id"], entry["status"], entry["version"]) for entry in body["memories"])
            return Appended(entries, body["version"])
        case Update() | Get():
            return One(workload.seen_over_http(body))
        case Delete():
            return Removed(1)
        case DeleteWhere() | Erase():
            return Removed(body["deleted"], body.get("version"))
        case List():
            return Found(tuple(map(workload.seen_over_http, body["memories"])))
        case Search():
            return Found(tuple(map(workload.seen_over_http, body["results"])), body["version"], body["index"])


def array(vector: Vector) -> Any:
    return np.array(vector, np.float32)


def as_filter(where: Where | None) -> dict[str, Any] | None:
    return None if where is None else dict([where])


# The driver: a process of its own, since Serve's router threads outlive `ray.shutdown`.


def _connect(address: str) -> None:
    ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="ERROR")


def with_replicas(config: dict[str, Any], stores: int, gateways: int) -> dict[str, Any]:
    """A config by which there are so many, whatever autoscaling would say.

    Serve restarts nothing for another number, if the deployments were listed already: `args:` would be a new version.
    """
    application = dict(config["applications"][0])
    application["deployments"] = [
        {"name": name, "autoscaling_config": {"min_replicas": replicas, "max_replicas": replicas}}
        for name, replicas in (("Store", stores), ("Gateway", gateways))
    ]
    return {**config, "applications": [application]}


def _scale(config: dict[str, Any], stores: int, gateways: int) -> None:
    config = with_replicas(config, stores, gateways)
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))


def _replicas(name: str) -> tuple[int, int]:
    """(that run, that are in any other state)"""
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


async def _record(config: dict[str, Any], url: str, seed: int) -> list[Event]:
    rng = random.Random(seed)
    workloads = [Workload(f"user-{n}", rng) for n in range(USERS)]
    history: list[Event] = []
    moving = asyncio.create_task(_moves(config))
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


async def _moves(config: dict[str, Any]) -> None:
    for stores, gateways in MOVES:
        await _move(config, stores, gateways)
        await asyncio.sleep(1.0)


def _run(config: dict[str, Any], url: str, seed: int) -> list[Event]:
    return asyncio.run(_record(config, url, seed))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, ARGS)
    config = with_replicas(yaml.safe_load(server.config.read_text()), 2, 1)
    server.config.write_text(yaml.safe_dump(config))
    server.start()
    yield server
    server.stop()


def test_any_replica_is_right_at_any_moment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")  # as the gateway's handle: the driver reads it at import
    config = yaml.safe_load(server.config.read_text())
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=_connect, initargs=(server.ray_address(),)
    ) as driver:
        started = time.monotonic()
        history = driver.submit(_run, config, server.url, 1).result(timeout=240)
        took_s = time.monotonic() - started
    checked = time.monotonic()
    violations = check(history)
    print(f"{len(history)} operations in {took_s:.0f} s, checked in {time.monotonic() - checked:.1f} s")
    assert not violations, "\n".join(map(str, violations))
    assert len(history) >= OPERATIONS
    assert [str(event) for event in history if event.answer is None] == []  # no call was lost on the way
