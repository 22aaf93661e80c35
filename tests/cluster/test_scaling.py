"""Replicas are added and removed with the load: no request fails, and searches find every acknowledged memory."""

import asyncio
import multiprocessing
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from tests.cluster.server import Server

WITHIN_S = 60.0  # for scaling up, and again for scaling down
SAMPLE_S = 0.3
CLIENTS = 24
USERS = 20

# Short delays, so that the test is short; two embedders of one thread, which fit on two cores.
ARGS = {
    "embedder": {
        "max_replicas": 2,
        "num_cpus": 0.3,
        "target_drain_s": 0.1,
        "target_busy": 0.6,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 4.0,
    },
    "store": {
        "max_replicas": 3,
        "num_cpus": 0.05,
        "target_busy": 0.2,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 4.0,
    },
    "gateway": {
        "max_replicas": 2,
        "num_cpus": 0.05,
        "target_ongoing_requests": 6.0,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 4.0,
    },
}
Step = Callable[[str], Awaitable[None]]
ONE_OF_EACH = {"Embedder": 1, "Store": 1, "Gateway": 1}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, ARGS)
    server.start()
    yield server
    server.stop()


def _connect(address: str) -> None:
    ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="ERROR")


def _replicas() -> dict[str, int]:
    """The number of running replicas, by deployment."""
    found = serve.status().applications["memserve"].deployments
    return {name: found[name].replica_states.get("RUNNING", 0) for name in found}


class Load:
    """Clients that embed, add and search; counts their answers and collects memories that they did not find."""

    def __init__(self, http: httpx.AsyncClient, seed: int) -> None:
        self._http = http
        self._rng = random.Random(seed)
        self._acknowledged: defaultdict[str, set[str]] = defaultdict(set)
        self.busy = asyncio.Event()
        self.ended = False
        self.answers: Counter[str] = Counter()
        self.missing: list[str] = []

    async def trickle(self) -> None:
        """Send a request of each kind every 0.2 s until the end."""
        while not self.ended:
            for step in (self._add, self._search, self._embed):
                await self._take(step)
                await asyncio.sleep(0.2)

    async def press(self, *steps: Step) -> None:
        """Send requests without a pause whenever `busy` is set."""
        while not self.ended:
            await self.busy.wait()
            await self._take(self._rng.choice(steps))

    def clients(self) -> list[Coroutine[Any, Any, None]]:
        """Clients for the embedders, and others for the stores, so that neither wait for the other's replies."""
        embedding = [self.press(self._embed, self._add) for _ in range(CLIENTS // 2)]
        return [self.trickle(), *embedding, *(self.press(self._search) for _ in range(CLIENTS // 2))]

    async def _take(self, step: Step) -> None:
        try:
            await step(f"user-{self._rng.randrange(USERS)}")
        except httpx.TransportError as error:
            self.answers[repr(error)] += 1

    async def _post(self, path: str, body: dict[str, object]) -> dict[str, list[dict[str, str]]] | None:
        answer = await self._http.post(path, json=body)
        self.answers[str(answer.status_code) if answer.is_success else answer.text] += 1
        return answer.json() if answer.is_success else None

    async def _embed(self, _: str) -> None:
        await self._post("/v1/embeddings", {"input": [self._text() for _ in range(8)], "encoding_format": "base64"})

    async def _add(self, user: str) -> None:
        body = await self._post(f"/v1/users/{user}/memories", {"text": self._text()})
        if body is not None:
            self._acknowledged[user].add(body["memories"][0]["id"])

    async def _search(self, user: str) -> None:
        expected = set(self._acknowledged[user])  # acknowledged before this search was sent
        vector = [self._rng.gauss(0.0, 1.0) for _ in range(384)]
        body = await self._post(f"/v1/users/{user}/memories/search", {"vector": vector, "top_k": 1000})
        if body is not None:
            found = [memory["id"] for memory in body["results"]]
            assert len(found) == len(set(found)), f"{user} has a memory twice"
            self.missing += [f"{user} {id}" for id in expected.difference(found)]

    def _text(self) -> str:
        return " ".join(str(self._rng.randrange(1000)) for _ in range(24))

    async def check_all(self) -> int:
        """Compare each user's list with the acknowledged memories. Returns the number of those."""
        for user, expected in self._acknowledged.items():
            answer = await self._http.get(f"/v1/users/{user}/memories", params={"limit": 1000})
            self.missing += [f"{user} {id}" for id in expected ^ {one["id"] for one in answer.json()["memories"]}]
        return sum(map(len, self._acknowledged.values()))


async def _until(look: Callable[[], Awaitable[dict[str, int]]], wanted: Callable[[dict[str, int]], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not wanted(replicas := await look()):
        assert time.monotonic() < deadline, f"still {replicas}"
        await asyncio.sleep(SAMPLE_S)


async def _up_and_down(url: str, driver: ProcessPoolExecutor) -> Load:
    async def look() -> dict[str, int]:
        return await asyncio.wrap_future(driver.submit(_replicas))

    async with httpx.AsyncClient(base_url=url, timeout=60.0, trust_env=False) as http:
        load = Load(http, seed=1)
        clients = [asyncio.create_task(client) for client in load.clients()]
        await _until(look, lambda now: now == ONE_OF_EACH)
        load.busy.set()
        await _until(look, lambda now: now["Embedder"] == 2 and now["Store"] >= 2 and now["Gateway"] == 2)
        load.busy.clear()
        await _until(look, lambda now: now == ONE_OF_EACH)
        load.busy.set()  # so that clients that wait for it end
        load.ended = True
        await asyncio.gather(*clients)
        assert await load.check_all() > 0
        return load


def test_replicas_follow_the_load_and_no_request_fails(server: Server) -> None:
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=_connect, initargs=(server.ray_address(),)
    ) as driver:
        load = asyncio.run(_up_and_down(server.url, driver))
    assert set(load.answers) == {"200", "201"}, load.answers
    assert load.missing == []
