"""The client: sends requests when they are due, and checks every answer against the acknowledged memories."""

import asyncio
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import orjson
import uvloop

from benchmarks.load import arrivals
from benchmarks.workload import seed_of, texts

HEADERS = {"content-type": "application/json"}
USERS = 200
DIM = 384
KINDS = ("embed", "add", "search")  # the requests with texts, in equal parts
EMBED_TEXTS = 4
ADD_TEXTS = 2
CAPACITY_CLIENTS = 16  # in the closed loop that measures the capacity of one embedder
CAPACITY_S = 4.0


class Phase(NamedTuple):
    """A constant load. `share`: of the capacity of one embedder; `by_vector`: searches a second without a text."""

    name: str
    seconds: float
    share: float
    by_vector: float


@dataclass
class Seen:
    """One request. Times are of the monotonic clock, which all processes of a machine share."""

    kind: str
    due: float
    done: float
    error: str = ""


@dataclass
class Outcome:
    """The client's results. `missing`: acknowledged memories that a search or a final list lacked or had twice."""

    requests: list[Seen] = field(default_factory=list)
    acknowledged: int = 0
    missing: list[str] = field(default_factory=list)


class Client:
    """Sends requests, and checks every answer against the memories that were acknowledged before."""

    def __init__(self, session: aiohttp.ClientSession, name: str, seed: int) -> None:
        self._session = session
        self._name = name
        self._rng = random.Random(seed)
        self._texts = texts("medium", self._rng)
        self._vectors = np.random.default_rng(seed).normal(size=(64, DIM)).astype(np.float32).tolist()
        self._acknowledged: defaultdict[str, set[str]] = defaultdict(set)
        self._in_doubt: set[str] = set()
        self.outcome = Outcome()

    async def send(self, kind: str, due: float) -> None:
        """Send one request, which was due at a moment of the monotonic clock."""
        user = f"{self._name}-{self._rng.randrange(USERS)}"
        seen = Seen(kind, due, math.inf)
        self.outcome.requests.append(seen)
        try:
            seen.error = await getattr(self, f"_{kind}")(user)
        except (aiohttp.ClientError, TimeoutError) as error:
            seen.error = type(error).__name__
        seen.done = time.monotonic()

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        async with self._session.post(path, data=orjson.dumps(body), headers=HEADERS) as answer:
            return answer.status, await answer.read()

    async def _embed(self, _: str) -> str:
        given = list(islice(self._texts, EMBED_TEXTS))
        status, _body = await self._post("/v1/embeddings", {"input": given, "encoding_format": "base64"})
        return "" if status == 200 else str(status)

    async def _add(self, user: str) -> str:
        ids = {f"memory-{len(self.outcome.requests)}-{n}" for n in range(ADD_TEXTS)}
        self._in_doubt |= ids
        memories = [{"id": id, "text": next(self._texts)} for id in ids]
        status, _ = await self._post(f"/v1/users/{user}/memories", {"memories": memories})
        if status != 201:
            return str(status)
        self._in_doubt -= ids
        self._acknowledged[user] |= ids
        self.outcome.acknowledged += len(ids)
        return ""

    async def _search(self, user: str) -> str:
        return await self._find(user, {"query": next(self._texts)})

    async def _by_vector(self, user: str) -> str:
        return await self._find(user, {"vector": self._rng.choice(self._vectors)})

    async def _find(self, user: str, query: dict[str, Any]) -> str:
        expected = set(self._acknowledged[user])  # acknowledged before this search is sent
        status, body = await self._post(f"/v1/users/{user}/memories/search", {**query, "top_k": 1000})
        if status != 200:
            return str(status)
        self._compare(user, expected, [memory["id"] for memory in orjson.loads(body)["results"]])
        return ""

    def _compare(self, user: str, expected: set[str], found: Sequence[str]) -> None:
        twice = [id for id, times in Counter(found).items() if times > 1]
        self.outcome.missing += [f"{user} {id}" for id in [*expected.difference(found), *twice]]

    async def list_all(self) -> None:
        """List the memories of each user and check them against the acknowledged ones."""
        for user, expected in self._acknowledged.items():
            async with self._session.get(f"/v1/users/{user}/memories?limit=1000") as answer:
                found = [memory["id"] for memory in orjson.loads(await answer.read())["memories"]]
            self._compare(user, expected, found)
            self.outcome.missing += [f"{user} {id} unasked" for id in set(found) - expected - self._in_doubt]


async def offer(url: str, phases: Sequence[Phase], per_s: float, started: float, seed: int) -> Outcome:
    """Send the requests of all phases when they are due. `per_s`: the capacity of one embedder in requests a second."""
    due: list[tuple[float, str]] = []
    begin = 0.0
    for number, phase in enumerate(phases):
        rates = dict.fromkeys(KINDS, phase.share * per_s / len(KINDS)) | {"by_vector": phase.by_vector}
        for kind, rate in rates.items():
            moments = arrivals(rate, phase.seconds, seed_of(seed, number, kind))
            due += [(begin + float(moment), kind) for moment in moments]
        begin += phase.seconds
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        client = Client(session, "user", seed)
        tasks = []
        for moment, kind in sorted(due):
            if (wait_s := started + moment - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(client.send(kind, started + moment)))
        await asyncio.gather(*tasks)
        await client.list_all()
    return client.outcome


async def capacity(url: str, seed: int) -> float:
    """The rate of answered requests with texts, per second, in a closed loop of a few clients."""
    async with aiohttp.ClientSession(url) as session:
        client = Client(session, "calibration", seed_of(seed, "calibration"))
        end = time.monotonic() + CAPACITY_S

        async def loop() -> None:
            kinds = random.Random(seed)
            while time.monotonic() < end:
                await client.send(kinds.choice(KINDS), time.monotonic())

        await asyncio.gather(*(loop() for _ in range(CAPACITY_CLIENTS)))
    return sum(not seen.error for seen in client.outcome.requests if seen.done <= end) / CAPACITY_S


def run_capacity(url: str, seed: int) -> float:
    return uvloop.run(capacity(url, seed))


def run_client(url: str, phases: Sequence[Phase], per_s: float, started: float, seed: int) -> Outcome:
    return uvloop.run(offer(url, phases, per_s, started, seed))
