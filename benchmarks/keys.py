"""What a key costs a request.

    python -m benchmarks.keys [--seconds 6] [--rounds 5] [--only door|served]

`door`: the CPU time that a gateway takes to admit a request with a key that it knows, less that of a server that asks
for no key, in this process. `served`: short texts, one a request, from 64 clients, to a server that asks for keys and
to one that does not. Both run at once, and take turns. Prints the figures and writes benchmarks/results/keys.json.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from itertools import count
from typing import Any

from benchmarks import machine, report
from benchmarks.figures import Spread, spread
from benchmarks.server import Server, load, memserve, profile
from deployments.api.authentication import Authentication
from deployments.calls.keys import KnownKeys
from store import Credential, Key

CLIENTS = 64
SECRET = f"ms_0123456789abcdef_{32 * 'a1'}"
KEY = Key("0123456789abcdef", "acme", None, ("read", "write"), "benchmark", datetime(2026, 1, 1, tzinfo=UTC))
HEADERS = [
    (b"host", b"memserve.example.com"),
    (b"user-agent", b"OpenAI/Python 1.99.0"),
    (b"accept", b"application/json"),
    (b"accept-encoding", b"gzip, deflate, br"),
    (b"connection", b"keep-alive"),
    (b"content-type", b"application/json"),
    (b"content-length", b"64"),
    (b"x-memserve-request", b"1795373580195616-e0b1a45e-476e-454b-a591-d78aaa490faa"),
    (b"x-stainless-lang", b"python"),
    (b"authorization", f"Bearer {SECRET}".encode()),
]
REQUESTS = 5_000  # in one sample


async def _app(*_: Any) -> None:
    """Stands for the routes."""


def door(asks_for_keys: bool) -> Authentication:
    """What a request passes before its route. The log is asked once, for the only key."""

    async def find(_: Credential, __: bool) -> Key:
        return KEY

    find_key = KnownKeys(find).find if asks_for_keys else None
    return Authentication(
        _app,
        find_key=find_key,
        open_paths=(),
        error_bodies={},
        on_error=lambda _: None,
        count_refusal=lambda *_: None,
    )


async def passing_us(one: Authentication, requests: int = REQUESTS) -> float:
    """The CPU time that a request takes to pass, in microseconds."""
    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": HEADERS, "state": {}}
    receive: Any = None
    await one(scope, receive, receive)
    began = time.thread_time()
    for _ in range(requests):
        await one(scope, receive, receive)
    return (time.thread_time() - began) / requests * 1e6


async def measure_door(rounds: int) -> dict[str, Spread]:
    """CPU microseconds of a request, with and without a key; the two take turns."""
    doors = {"with": door(True), "without": door(False)}
    found: dict[str, list[float]] = {name: [] for name in doors}
    for _ in range(rounds):
        for name, one in doors.items():
            found[name].append(await passing_us(one))
    return {name: spread(values) for name, values in found.items()}


def make_key(server: Server) -> str:
    """A key of a server, made on its log."""
    log = f"sqlite:///{server.folder}/memserve.db"
    command = [sys.executable, "-m", "memserve", "keys", "create", "--log", log, "--tenant", "acme"]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=machine.ROOT).stdout.strip()


def measure_served(seconds: float, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The runs of each server."""
    with memserve(profile(), {"auth": {"mode": "keys"}}) as keyed, memserve(profile()) as other:
        targets = {"with": (keyed.url, "--key", make_key(keyed)), "without": (other.url,)}
        seeds = count(1)  # a repeated text would be answered from the cache
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in targets}
        for warm_s in (3, *[1] * rounds):
            for name, (url, *key) in targets.items():
                shape = ("--clients", CLIENTS, "--warm-s", warm_s, "--measure-s", seconds, "--seed", next(seeds))
                found[name].append(load(url, *shape, *key))
        return {name: runs[1:] for name, runs in found.items()}  # the first is for warming up


def table(served: dict[str, list[dict[str, Any]]]) -> str:
    """The runs of both servers as a Markdown table, with the share of the throughput that remains with keys."""
    head = ("key", "requests/s", "p50 ms", "p99 ms", "errors", "share")
    rates = {name: spread([run["requests_per_s"] for run in runs]) for name, runs in served.items()}
    rows = [
        (
            name,
            *(report.ranged(spread([run[key] for run in runs])) for key in ("requests_per_s", "p50_ms", "p99_ms")),
            sum(sum(run["errors"].values()) for run in runs),
            f"{rates[name].median / rates['without'].median:.3f}",
        )
        for name, runs in served.items()
    ]
    return report.table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("door", "served"))
    options = parser.parse_args()
    found: dict[str, Any] = machine.provenance()
    if options.only != "served":
        found["door_us"] = asyncio.run(measure_door(20))
        cost = found["door_us"]["with"].median - found["door_us"]["without"].median
        print(f"A key that is known costs {cost:.1f} us of CPU time a request.")
    if options.only != "door":
        found["served"] = measure_served(options.seconds, options.rounds)
        print(table(found["served"]))
    path = machine.RESULTS / "keys.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
