"""A closed-loop HTTP load generator: each client sends its next request when the last one is answered.

Runs in a process of its own (`python -m benchmarks.load --help`), seeded, and prints one line of JSON.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import numpy as np
import orjson
import uvloop

_WORDS = (Path(__file__).resolve().parent.parent / "tests" / "embedding" / "words.txt").read_text().split()


@dataclass(frozen=True)
class Result:
    """One run: requests and texts a second, latencies in milliseconds, errors by status."""

    requests_per_s: float
    texts_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    requests: int
    errors: dict[str, int]


def texts(length: str, rng: random.Random) -> Iterator[str]:
    """Endless texts, no two alike. `short`: 4 to 12 words; `mixed`: log-normal, 4 to 200 words, median 30."""
    while True:
        words = rng.randint(4, 12) if length == "short" else round(min(200, max(4, rng.lognormvariate(3.4, 0.9))))
        yield " ".join(rng.choices(_WORDS, k=words - 1)) + f" {rng.randrange(10**6)}"


def request_maker(job: str, size: int, length: str, rng: random.Random) -> Callable[[], tuple[str, bytes]]:
    """Path and body of the next request."""
    source = texts(length, rng)

    def embed() -> tuple[str, bytes]:
        given = [next(source) for _ in range(size)] if size > 1 else next(source)
        return "/v1/embeddings", orjson.dumps({"input": given, "encoding_format": "base64"})

    def add() -> tuple[str, bytes]:
        path = f"/v1/users/user-{rng.randrange(1000)}/memories"
        if size == 1:
            return path, orjson.dumps({"text": next(source)})
        return path, orjson.dumps({"memories": [{"text": next(source)} for _ in range(size)]})

    def search() -> tuple[str, bytes]:
        return f"/v1/users/user-{rng.randrange(1000)}/memories/search", orjson.dumps({"query": next(source)})

    return {"embed": embed, "add": add, "search": search}[job]


async def closed_loop(
    url: str, make: Callable[[], tuple[str, bytes]], *, clients: int, size: int, warm_s: float, measure_s: float
) -> Result:
    """Drive `url` with `clients` connections; what is answered before `warm_s` does not count."""
    latencies: list[float] = []
    errors: dict[str, int] = {}
    started = time.perf_counter()
    begin, end = started + warm_s, started + warm_s + measure_s

    async def client(session: aiohttp.ClientSession) -> None:
        while (sent := time.perf_counter()) < end:
            path, body = make()
            async with session.post(path, data=body, headers={"content-type": "application/json"}) as answer:
                await answer.read()
            done = time.perf_counter()
            if begin <= done < end:
                if answer.status < 300:
                    latencies.append(done - sent)
                else:
                    errors[str(answer.status)] = errors.get(str(answer.status), 0) + 1

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    milliseconds = np.array(latencies or [float("nan")]) * 1e3
    p50, p90, p99 = (float(np.percentile(milliseconds, q)) for q in (50, 90, 99))
    rate = len(latencies) / measure_s
    return Result(rate, rate * size, p50, p90, p99, len(latencies), errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--job", choices=["embed", "add", "search"], default="embed")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--size", type=int, default=1, help="texts of a request")
    parser.add_argument("--length", choices=["short", "mixed"], default="short")
    parser.add_argument("--warm-s", type=float, default=2.0)
    parser.add_argument("--measure-s", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    make = request_maker(options.job, options.size, options.length, random.Random(options.seed))
    result = uvloop.run(
        closed_loop(
            options.url,
            make,
            clients=options.clients,
            size=options.size,
            warm_s=options.warm_s,
            measure_s=options.measure_s,
        )
    )
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
