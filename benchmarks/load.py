"""An HTTP load generator, seeded, with a closed or an open loop. Prints one line of JSON.

    python -m benchmarks.load --job add --clients 64     # closed loop: each client waits for its answers
    python -m benchmarks.load --job add --rate 300       # open loop: Poisson arrivals, 300 requests a second

A closed loop slows down with its server, so its latencies are those of a queue that never grows (coordinated omission).
In an open loop the latency of a request counts from the moment it was due, whether or not it could be sent then. A
request that is still unanswered at the end counts with the time it has waited. Only requests that are answered with 2xx
count as throughput.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from threading import Barrier

import numpy as np
import uvloop

from benchmarks.connections import Connections
from benchmarks.figures import percentiles_ms
from benchmarks.workload import JOBS, USERS, Request, request_maker, seed_of

START_WITHIN_S = 60.0


@dataclass(frozen=True)
class Load:
    """One run. If `rate` (requests a second) is given, it is an open loop, else a closed loop of `clients`."""

    url: str = "http://127.0.0.1:8000"
    job: str = "embed"
    clients: int = 64
    rate: float | None = None
    size: int = 1
    length: str = "short"
    warm_s: float = 2.0
    measure_s: float = 8.0
    drain_s: float = 20.0
    seed: int = 1
    users: int = USERS
    distinct: int | None = None
    processes: int = 1
    key: str | None = None


@dataclass
class Samples:
    """The samples of one process within the measured window."""

    latencies_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    requests: int = 0
    texts: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Samples") -> None:
        self.latencies_s += other.latencies_s
        self.refused_s += other.refused_s
        self.late_s += other.late_s
        self.requests += other.requests
        self.texts += other.texts
        self.errors += other.errors


@dataclass(frozen=True)
class Result:
    """The figures of one run: answered requests and texts a second, latencies in milliseconds, errors by status.

    `refused` holds the latency percentiles of the requests that were answered with 429 in an open loop.
    `late_p99_ms` is the delay of the generator itself in an open loop. If it is not small compared with p50, the
    generator is the limit, and the latencies are too high, never too low.
    """

    requests_per_s: float
    texts_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    requests: int
    errors: dict[str, int]
    offered_per_s: float | None = None
    refused: dict[str, float] | None = None
    late_p99_ms: float | None = None


def arrivals(rate: float, duration_s: float, seed: int) -> np.ndarray:
    """Moments of a Poisson process of `rate` a second, in seconds: float64, ascending, in [0, duration_s)."""
    rng = np.random.default_rng(seed)
    count = int(rate * duration_s + 10 * (rate * duration_s) ** 0.5 + 10)  # ten sigma: never too few
    moments = np.cumsum(rng.exponential(1 / rate, count))
    return moments[moments < duration_s]


async def send(server: Connections, request: Request) -> str | None:
    """Send one request. Returns None if it was answered with 2xx, else the status or the name of the error."""
    try:
        status = await server.post(request.path, request.body)
    except OSError as error:  # also TimeoutError, which is a subclass
        return type(error).__name__
    return None if 200 <= status < 300 else str(status)


async def closed_loop(server: Connections, make: Callable[[], Request], load: Load) -> Samples:
    """`clients` connections, each with one request at a time. Requests that are answered in the window count."""
    seen = Samples()
    begin = time.perf_counter() + load.warm_s
    end = begin + load.measure_s

    async def client() -> None:
        while (sent := time.perf_counter()) < end:
            request = make()
            error = await send(server, request)
            done = time.perf_counter()
            if not begin <= done < end:
                continue
            if error is not None:
                seen.errors[error] += 1
            else:
                seen.latencies_s.append(done - sent)
                seen.requests += 1
                seen.texts += request.texts

    await asyncio.gather(*(client() for _ in range(load.clients)))
    return seen


async def open_loop(server: Connections, make: Callable[[], Request], load: Load) -> Samples:
    """Requests at moments that are drawn beforehand.

    Latencies are those of the requests that were due in the window, counted from that moment. The throughput counts the
    requests that were answered in the window.
    """
    assert load.rate is not None
    seen = Samples()
    moments = arrivals(load.rate, load.warm_s + load.measure_s, load.seed)
    requests = [make() for _ in moments]  # made beforehand, because making one would delay the sender
    started = time.perf_counter()
    begin, end = started + load.warm_s, started + load.warm_s + load.measure_s

    async def one(request: Request, due: float) -> None:
        late = time.perf_counter() - due
        error = "unanswered"
        answered = False
        try:
            error = await send(server, request) or ""
            answered = not error
        finally:  # also if this was cancelled at the end of the drain
            done = time.perf_counter()
            if answered and begin <= done < end:
                seen.requests += 1
                seen.texts += request.texts
            if due >= begin:
                seen.late_s.append(late)
                if answered:
                    seen.latencies_s.append(done - due)
                else:
                    seen.errors[error] += 1
                    if error == "unanswered":
                        seen.latencies_s.append(done - due)
                    elif error == "429":
                        seen.refused_s.append(done - due)

    tasks: list[asyncio.Task[None]] = []
    for moment, request in zip(moments, requests, strict=True):
        due = started + float(moment)
        if (wait_s := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.create_task(one(request, due)))
    if tasks:
        _, pending = await asyncio.wait(tasks, timeout=load.drain_s)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    return seen


async def run(load: Load) -> Samples:
    """Run the share of one process."""
    make = request_maker(
        load.job, load.size, load.length, random.Random(load.seed), users=load.users, distinct=load.distinct
    )
    async with Connections(load.url, load.key) as server:
        return await (closed_loop if load.rate is None else open_loop)(server, make, load)


def shares(load: Load) -> list[Load]:
    """The load of each of `processes`: clients or rate are divided, and the seeds differ."""
    parts = []
    for n in range(load.processes):
        clients = load.clients // load.processes + (n < load.clients % load.processes)
        rate = load.rate / load.processes if load.rate is not None else None
        parts.append(replace(load, clients=clients, rate=rate, seed=seed_of(load.seed, n)))
    return parts


def run_alone(load: Load) -> Samples:
    return uvloop.run(run(load))


def begin_together(barrier: Barrier) -> None:
    """Wait until every process is ready, so that all have the same window."""
    barrier.wait(START_WITHIN_S)


def result_of(load: Load, seen: Samples) -> Result:
    """Compute the figures of a run."""
    return Result(
        requests_per_s=seen.requests / load.measure_s,
        texts_per_s=seen.texts / load.measure_s,
        **percentiles_ms(seen.latencies_s),
        requests=seen.requests,
        errors=dict(seen.errors),
        offered_per_s=load.rate,
        refused=percentiles_ms(seen.refused_s) if seen.refused_s else None,
        late_p99_ms=percentiles_ms(seen.late_s)["p99_ms"] if load.rate is not None else None,
    )


def measure(load: Load) -> Result:
    """Run a load in `load.processes` processes."""
    if load.processes == 1:
        return result_of(load, run_alone(load))
    seen = Samples()
    context = multiprocessing.get_context("spawn")
    ready = (context.Barrier(load.processes),)
    with ProcessPoolExecutor(load.processes, context, begin_together, ready) as pool:
        for part in pool.map(run_alone, shares(load)):
            seen.add(part)
    return result_of(load, seen)


def parser_of_loads() -> argparse.ArgumentParser:
    """The parser of the command line. Its names are those of `Load`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plain = Load()
    parser.add_argument("--url", default=plain.url)
    parser.add_argument("--job", choices=JOBS, default=plain.job)
    parser.add_argument("--clients", type=int, default=plain.clients, help="closed loop: concurrent requests")
    parser.add_argument("--rate", type=float, help="open loop: requests a second; --clients is ignored")
    parser.add_argument("--size", type=int, default=plain.size, help="texts per request")
    parser.add_argument("--length", default=plain.length, help="short, medium, mixed, or a number of words")
    parser.add_argument("--users", type=int, default=plain.users)
    parser.add_argument("--distinct", type=int, help="draw repeatedly from so many texts")
    parser.add_argument("--processes", type=int, default=plain.processes, help="processes that share the load")
    parser.add_argument("--key", help="a key of memserve, for a server that asks for one")
    parser.add_argument("--warm-s", type=float, default=plain.warm_s)
    parser.add_argument("--measure-s", type=float, default=plain.measure_s)
    parser.add_argument("--drain-s", type=float, default=plain.drain_s, help="open loop: time to wait for answers")
    parser.add_argument("--seed", type=int, default=plain.seed)
    return parser


def main() -> None:
    print(json.dumps(asdict(measure(Load(**vars(parser_of_loads().parse_args()))))))


if __name__ == "__main__":
    main()
