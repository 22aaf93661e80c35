"""What words cost: searches by vectors, by words and by both, over HTTP and in the store.

    python -m benchmarks.search_modes [--sizes 1000 100000] [--searches 500] [--only http store] [--quick]

Over HTTP, one client asks one user's memories in each way in turns, with texts that the server has to embed. In the
store, without HTTP: the memory of vectors and of words, and the first search after a restart, with a snapshot and
without. An add does no work for words; `--baseline FOLDER` compares its latency with that of another checkout. Writes
benchmarks/results/search-modes.json and its report.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import psutil

from benchmarks import machine, report
from benchmarks.figures import percentiles_ms
from benchmarks.server import memserve, merged, profile
from benchmarks.workload import seed_of, texts
from store import Append, Mode, NewMemory, Search, Store

MODES: tuple[Mode, ...] = ("vector", "words", "hybrid")
DIM = 384
_AT_ONCE = 500  # memories in one request
_RESTARTS = 5
_IDLE_PERCENT = 20.0  # of all cores
_WITHIN_S = 300.0

Found = dict[str, Any]


def timed_ms(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def over_http(url: str, size: int, searches: int) -> Found:
    """p50 and p99 of a search of one user with so many memories, by mode; and of an add to it."""
    source, rng = texts("short", random.Random(seed_of("search modes", size))), np.random.default_rng(size)
    path = f"/v1/users/user-{size}/memories"
    with httpx.Client(base_url=url, timeout=600.0, trust_env=False) as http:

        def post(route: str, body: object) -> None:
            http.post(route, content=orjson.dumps(body)).raise_for_status()

        for start in range(0, size, _AT_ONCE):
            count = min(_AT_ONCE, size - start)
            vectors = rng.normal(size=(count, DIM)).tolist()
            post(path, {"memories": [{"text": next(source), "vector": vector} for vector in vectors]})
        for mode in MODES:  # the first search builds the index
            post(f"{path}/search", {"query": next(source), "mode": mode})
        _wait_until_idle()
        took: dict[str, list[float]] = {mode: [] for mode in MODES}
        for number in range(searches):
            for turn in range(len(MODES)):
                mode = MODES[(number + turn) % len(MODES)]
                body = {"query": next(source), "mode": mode}
                took[mode].append(timed_ms(partial(post, f"{path}/search", body)) / 1e3)
        row: Found = {mode: percentiles_ms(seconds) for mode, seconds in took.items()}
    return {"memories": size, **row}


def _wait_until_idle() -> None:
    """Wait until the graph of a large user has been built: until this machine has been idle for three seconds."""
    idle_s, deadline = 0, time.monotonic() + _WITHIN_S
    while idle_s < 3 and time.monotonic() < deadline:
        idle_s = idle_s + 1 if psutil.cpu_percent(interval=1.0) < _IDLE_PERCENT else 0


def adds_ms(url: str, count: int) -> list[float]:
    """The latency of adds of one short text, one after the other, in seconds."""
    source = texts("short", random.Random(seed_of("adds", time.time_ns())))
    with httpx.Client(base_url=url, timeout=60.0, trust_env=False) as http:
        bodies = [{"text": next(source)} for _ in range(count)]

        def add(body: Found) -> None:
            http.post("/v1/users/adds/memories", json=body).raise_for_status()

        return [timed_ms(partial(add, body)) / 1e3 for body in bodies]


def in_store(size: int) -> Found:
    """Bytes of vectors and words of one memory, and milliseconds of a first search, by mode and snapshot."""
    source, rng = texts("short", random.Random(seed_of("store", size))), np.random.default_rng(size)
    queries = [next(source) for _ in range(100)]
    with tempfile.TemporaryDirectory(prefix="memserve-modes-") as folder:

        def opened(snapshots: str | None) -> Store:
            return Store.open(
                f"sqlite:///{folder}/log.db",
                dim=DIM,
                model="made",
                synchronous="NORMAL",
                snapshot_dir=None if snapshots is None else f"{folder}/{snapshots}",
                index_budget_bytes=1 << 34,
            )

        def search(store: Store, mode: Mode) -> None:
            vector = rng.normal(size=DIM).astype(np.float32)
            store.search([Search("default", "ann", vector, query=queries[size % 100], mode=mode)])

        store = opened(None)
        for start in range(0, size, _AT_ONCE):
            vectors = rng.normal(size=(min(_AT_ONCE, size - start), DIM)).astype(np.float32)
            new = tuple(NewMemory(str(start + n), next(source), vector) for n, vector in enumerate(vectors))
            store.append([Append("default", "ann", new)])
        search(store, "hybrid")
        (index,) = store.resident
        assert index.words is not None
        words = index.words.bytes
        row: Found = {"memories": size, "words_bytes": words / size, "vectors_bytes": (index.bytes - words) / size}
        store.close()
        for mode in ("vector", "hybrid"):
            saved = opened(mode)
            search(saved, mode)
            while saved.background_step():
                pass
            saved.close()
        for name in ("log", "snapshot"):
            took: dict[Mode, list[float]] = {"vector": [], "hybrid": []}
            for _ in range(_RESTARTS):
                for mode, seen in took.items():
                    fresh = opened(None if name == "log" else mode)
                    seen.append(timed_ms(partial(search, fresh, mode)))
                    fresh.log.close()
                    if fresh.snapshots is not None:
                        fresh.snapshots.close()
            row |= {f"first_{mode}_from_{name}_ms": float(np.median(seen)) for mode, seen in took.items()}
    return row


def tables(found: Found) -> list[str]:
    head = ["memories", *(f"{mode}, p50 (p99) ms" for mode in MODES), "hybrid / vector"]
    rows = [
        [
            f"{row['memories']:,}",
            *(_latency(row[mode]) for mode in MODES),
            f"{row['hybrid']['p50_ms'] / row['vector']['p50_ms']:.2f}",
        ]
        for row in found["http"]
    ]
    names = ("log", "snapshot")
    kept = [
        "memories",
        "vectors, bytes",
        "words, bytes",
        *(f"first search from the {name}: vector, hybrid, ratio" for name in names),
    ]
    stored = [
        [
            f"{row['memories']:,}",
            report.number(row["vectors_bytes"]),
            report.number(row["words_bytes"]),
            *(_first(row, name) for name in names),
        ]
        for row in found["store"]
    ]
    parts = []
    if rows:
        parts += ["## Over HTTP\n", report.table(head, rows) + "\n"]
    if stored:
        parts += ["## In the store\n", report.table(kept, stored) + "\n"]
    if found["adds"]:
        adds = [[tree, _latency(latency)] for tree, latency in found["adds"].items()]
        parts += ["## Adds of one short text\n", report.table(["checkout", "p50 (p99) ms"], adds)]
    return parts


def _latency(row: Found) -> str:
    return f"{report.number(row['p50_ms'])} ({report.number(row['p99_ms'])})"


def _first(row: Found, name: str) -> str:
    vector, hybrid = (row[f"first_{mode}_from_{name}_ms"] for mode in ("vector", "hybrid"))
    return f"{report.number(vector)} ms, {report.number(hybrid)} ms, {hybrid / vector:.2f}"


def compare_adds(trees: Sequence[tuple[str, Path]], count: int) -> Found:
    """The latency of adds by checkout, in turns on servers that run one at a time."""
    took: dict[str, list[float]] = {name: [] for name, _ in trees}
    for _ in range(2):
        for name, root in trees:
            with memserve(profile(), root=root) as server:
                adds_ms(server.url, 50)
                took[name] += adds_ms(server.url, count)
    return {name: percentiles_ms(seconds) for name, seconds in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--searches", type=int, default=500)
    parser.add_argument("--only", nargs="+", choices=("http", "store"), default=["http", "store"])
    parser.add_argument("--quick", action="store_true", help="1,000 and 10,000 memories, 100 searches")
    parser.add_argument("--baseline", type=Path, help="another checkout, whose adds are measured, too")
    options = parser.parse_args()
    sizes, searches = ([1_000, 10_000], 100) if options.quick else (options.sizes, options.searches)
    found: Found = {"kind": "search-modes", **machine.provenance(), "http": [], "store": [], "adds": {}}
    if "http" in options.only:
        with memserve(merged(profile(), {"cache": {"max_bytes": 0}})) as server:
            found |= server.ready
            for size in sizes:
                found["http"].append(over_http(server.url, size, searches))
                print(found["http"][-1], flush=True, file=sys.stderr)
    if "store" in options.only:
        for size in sizes:
            found["store"].append(in_store(size))
            print(found["store"][-1], flush=True, file=sys.stderr)
    if options.baseline:
        found["adds"] = compare_adds([("this", machine.ROOT), ("baseline", options.baseline)], searches)
    print("\n".join(tables(found)))
    print("\n".join(map(str, report.save(found, machine.RESULTS / "search-modes.json"))))


if __name__ == "__main__":
    main()
