"""memserve's bare engine in two processes of one thread each: an upper bound for a server with HTTP and Ray around it.

    echo '["short", 4.0, 1]' | python -m benchmarks.peers.engine

The command runs one process. It reads lines of length, seconds and seed, and prints texts/s for each.
"""

import asyncio
import json
import random
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import IO

from benchmarks.machine import ROOT
from benchmarks.workload import texts
from deployments.embedding.engine import EmbedRequest, Engine
from deployments.embedding.load import load_model

PROCESSES = 2


class Engines:
    """The processes. They load the model once, and are idle between measurements."""

    def __init__(self, log: Path) -> None:
        with log.open("wb") as out:
            self._processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.peers.engine"],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=out,
                    text=True,
                )
                for _ in range(PROCESSES)
            ]

    def texts_per_s(self, length: str, measure_s: float, seed: int) -> float:
        """The sum of the rates of all processes."""
        for n, process in enumerate(self._processes):
            print(json.dumps([length, measure_s, seed + n]), file=_open(process.stdin), flush=True)
        return sum(float(_open(process.stdout).readline()) for process in self._processes)

    def end(self) -> None:
        for process in self._processes:
            process.communicate()  # ends at the end of its input


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


async def measured(engine: Engine, length: str, measure_s: float, seed: int) -> float:
    """texts/s with two callers, each of which sends 32 texts at a time."""
    source = texts(length, random.Random(seed))
    done, begun = 0, time.perf_counter()

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < begun + measure_s:
            await engine.embed([EmbedRequest(list(islice(source, 32)))])
            done += 32

    await asyncio.gather(caller(), caller())
    return done / (time.perf_counter() - begun)


async def main() -> None:
    engine = Engine(load_model(device="cpu", num_threads=1))
    await engine.warm_up()
    for line in sys.stdin:
        print(await measured(engine, *json.loads(line)), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
