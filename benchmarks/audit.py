"""What the audit, quotas and limits of keys cost.

    python -m benchmarks.audit [--rounds 9]

CPU time in this process, on a SQLite log in memory. `write_us`: one transaction of the store that adds one memory of
each of 1 or 32 users, without a key, with the event of a key, and with that and a quota. `limit_us`: what a gateway
does for a request whose key has limits, the headers of the answer included. Prints the figures and writes
benchmarks/results/audit.json.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, report
from benchmarks.figures import Spread, spread
from deployments.rate_limits import Ask, Lease, RateLimits, SharedBuckets
from store import Append, NewMemory, Quotas, Store, Vector

DIM = 384
KEY = "0123456789abcdef"
TRANSACTIONS = 100  # in one sample
REQUESTS = 20_000  # in one sample
KINDS: dict[str, tuple[str | None, Quotas]] = {
    "without a key": (None, Quotas()),
    "with an event": (KEY, Quotas()),
    "with an event and a quota": (KEY, Quotas(memories=10**9, bytes=10**12)),
}


def _sample(run: Callable[[int], object], count: int) -> float:
    """Microseconds of CPU time for each of `count` runs."""
    began = time.process_time()
    for number in range(count):
        run(number)
    return (time.process_time() - began) / count * 1e6


def _add(store: Store, vector: Vector, turn: str, number: int, *, users: int, by: str | None) -> None:
    memory = NewMemory(f"{turn} {users} {number}", "a text of a few words", vector)
    store.append([Append("acme", f"user {n}", (memory,), by=by) for n in range(users)])


def measure_writes(rounds: int) -> dict[str, dict[int, Spread]]:
    """The stores take turns, so that a slow moment of the machine is not one kind's alone."""
    vector = np.random.default_rng(0).normal(size=DIM).astype(np.float32)
    samples: dict[str, dict[int, list[float]]] = {name: {1: [], 32: []} for name in KINDS}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        stores = {
            name: Store.open(
                f"sqlite:///{folder}/{number}.db", dim=DIM, model="none", synchronous="NORMAL", quotas=quotas
            )
            for number, (name, (_, quotas)) in enumerate(KINDS.items())
        }
        for turn in range(rounds):
            for name, store in stores.items():
                by = KINDS[name][0]
                for users, found in samples[name].items():
                    found.append(
                        _sample(partial(_add, store, vector, f"turn {turn}", users=users, by=by), TRANSACTIONS)
                    )
        for store in stores.values():
            store.close()
    return {name: {users: spread(found[1:]) for users, found in of.items()} for name, of in samples.items()}


async def measure_limits(rounds: int) -> Spread:
    """A key with a limit of requests, far from it."""
    buckets = SharedBuckets()

    async def ask(asked: Ask) -> Lease:
        return buckets.lease(asked)

    limits = RateLimits(ask, gateway="one", requests_per_minute=10**8, tokens_per_minute=10**9)
    samples = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(REQUESTS):
            found = limits.of_key(KEY, None, None)
            assert found is not None and found.requests is not None and found.tokens is not None
            await found.requests.take(1)
            await found.tokens.take(12)
            found.headers()
        samples.append((time.process_time() - began) / REQUESTS * 1e6)
    return spread(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    found: dict[str, Any] = machine.provenance()
    found["write_us"] = measure_writes(options.rounds)
    found["limit_us"] = asyncio.run(measure_limits(options.rounds))
    rows = [[name, *map(report.ranged, of.values())] for name, of in found["write_us"].items()]
    print(report.table(["CPU time, us", "1 user", "32 users"], rows))
    print(f"The limits of a key cost {found['limit_us'].median:.1f} us of CPU time a request.")
    path = Path(machine.RESULTS / "audit.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
