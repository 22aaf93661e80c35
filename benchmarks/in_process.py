"""The jobs of benchmarks.load on AgentMem's interface in this process: `memory://`, no server, no HTTP.

The clients are tasks of one event loop, each with one call at a time.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from itertools import islice
from typing import Any, Self

import memserve
from benchmarks.load import Load, Samples, result_of
from benchmarks.workload import texts
from memserve.agentmem import AsyncMemoryStore

QUEUE = (32, 10)  # texts and milliseconds: those of AgentMem's own comparison


class Stores:
    """Two stores, with the queue and without, each with a model of its own.

    Args:
        model: a folder or a name.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._runner = asyncio.Runner()
        self._open = AsyncExitStack()
        self._stores: dict[bool, AsyncMemoryStore] = {}

    def __enter__(self) -> Self:
        for queued in (True, False):
            self._stores[queued] = self._runner.run(self._built(queued))
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._open.aclose())
        self._runner.close()

    async def _built(self, queued: bool) -> AsyncMemoryStore:
        builder = memserve.Memory.builder().with_storage("memory://")
        builder.with_embedder("sentence-transformers", self._model)
        builder = builder.enable_embedding_queue(*QUEUE) if queued else builder.disable_embedding_queue()
        return await self._open.enter_async_context(await builder.build_async())

    def measure(self, load: Load, *, queued: bool) -> dict[str, Any]:
        """The figures of one run, as `benchmarks.load` has them."""
        seen = self._runner.run(closed_loop(caller(self._stores[queued], load), load))
        return asdict(result_of(load, seen))


def caller(store: AsyncMemoryStore, load: Load) -> Callable[[], Awaitable[object]]:
    """Makes the next call of a load: `add` or `embed`."""
    rng = random.Random(load.seed)
    source = texts(load.length, rng, load.distinct)

    def call() -> Awaitable[object]:
        given = list(islice(source, load.size))
        if load.job == "embed":
            return store.client.embed(given)
        user = f"user-{rng.randrange(load.users)}"
        if load.size == 1:
            return store.add_for_user(given[0], user)
        return store.add_batch_optimized(given, user_id=user)

    return call


async def closed_loop(call: Callable[[], Awaitable[object]], load: Load) -> Samples:
    """`clients` tasks. Calls that are answered in the window count."""
    seen = Samples()
    begin = time.perf_counter() + load.warm_s
    end = begin + load.measure_s

    async def client() -> None:
        while (sent := time.perf_counter()) < end:
            await call()
            done = time.perf_counter()
            if begin <= done < end:
                seen.latencies_s.append(done - sent)
                seen.requests += 1
                seen.texts += load.size

    await asyncio.gather(*(client() for _ in range(load.clients)))
    return seen
