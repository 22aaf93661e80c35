"""Measure the store in this process. Prints a table and writes benchmarks/results/store.json and its report.

    python -m benchmarks.store_bench [--only NAME ...] [--large 100000] [--users 1000000] [--folder DIR]

Vectors are synthetic: 384 dimensions, drawn near a 24-dimensional subspace around 200 topics. For HNSW they are about
as hard as sentence embeddings. Independent noise in 384 dimensions would be far harder, and unlike any text.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, report
from store import Append, NewMemory, Search, SearchResult, Store
from store.index.matrix import normalised

DIM = 384
T = "default"
TEXT = "The user prefers tea over coffee in the morning, and asked to be reminded of the meeting on Tuesday. "
RESULTS = machine.RESULTS / "store.json"
_rng = np.random.default_rng(11)
_basis = _rng.normal(size=(24, DIM))
_topics = _rng.normal(size=(200, 24)) * 1.5


def draw(count: int) -> Any:
    """Draw vectors: (count, DIM) float32, L2-normalised as those of an embedding model."""
    latent = _topics[_rng.integers(0, len(_topics), count)] + _rng.normal(size=(count, 24))
    return normalised((latent @ _basis + 0.3 * _rng.normal(size=(count, DIM))).astype(np.float32))


def open_store(path: Path, **options: Any) -> Store:
    return Store.open(f"sqlite:///{path}", dim=DIM, model="bench", index_budget_bytes=8 << 30, **options)


def fill(store: Store, user: str, vectors: Any, batch: int = 500) -> None:
    for first in range(0, len(vectors), batch):
        made = tuple(
            NewMemory(f"{user}-{first + n}", f"{TEXT}{first + n}", vector, {"n": first + n, "k": (first + n) % 100})
            for n, vector in enumerate(vectors[first : first + batch])
        )
        (result,) = store.append([Append(T, user, made)])
        if isinstance(result, Exception):
            raise result


def build(store: Store) -> list[float]:
    """Run background steps until none is left. Returns the seconds that each took."""
    steps = []
    more = True
    while more:
        began = time.perf_counter()
        more = store.background_step()
        steps.append(time.perf_counter() - began)
    return steps


def timed(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Percentiles of the milliseconds that a call takes."""
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        took.append((time.perf_counter() - began) * 1000)
    return {f"p{q}_ms": round(float(np.percentile(took, q)), 3) for q in (50, 99)}


def recall(store: Store, user: str, truth: dict[str, Any], filter: Any = None, queries: int = 200) -> float:
    """The share of the ten nearest memories that a search finds."""
    ids = np.array(list(truth))
    matrix = np.array(list(truth.values()))
    hit = 0
    for query in draw(queries):
        best = set(ids[np.argsort(matrix @ query)[-10:]].tolist())
        (result,) = store.search([Search(T, user, query, 10, filter)])
        assert isinstance(result, SearchResult)
        assert len(result.results) == 10
        hit += sum(memory.id in best for memory in result.results)
    return round(hit / (10 * queries), 4)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def small(folder: Path, _: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """One user with 1,000 memories: searches with and without its index in memory."""
    store = open_store(folder / "small.db")
    vectors = draw(1000)
    fill(store, "ann", vectors)
    queries = iter(draw(5000))
    yield "recall@10 at 1,000", recall(store, "ann", {f"ann-{n}": v for n, v in enumerate(vectors)})
    yield (
        "search at 1,000, warm",
        timed(lambda: store.search([Search(T, "ann", next(queries))]), 2000),
    )
    for name in range(20):
        fill(store, f"cold{name}", vectors)
    store.close()
    store = open_store(folder / "small.db")
    names = iter(range(20))
    yield "search at 1,000, cold user", timed(lambda: store.search([Search(T, f"cold{next(names)}", vectors[0])]), 20)
    store.close()


def large(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """One large user: build its index, search, and measure the recall after each change."""
    n = options.large
    store = open_store(folder / "large.db", snapshot_dir=folder / "snapshots")
    vectors = draw(n)
    began = time.perf_counter()
    fill(store, "ann", vectors)
    yield f"append {n:,}, 500 a transaction, rows/s", round(n / (time.perf_counter() - began))
    truth = {f"ann-{i}": v for i, v in enumerate(vectors)}
    queries = iter(draw(20_000))
    before = resident_bytes()
    yield f"search at {n:,}, cold, no snapshot", timed(lambda: store.search([Search(T, "ann", next(queries))]), 1)
    yield f"search at {n:,}, graph not built yet", timed(lambda: store.search([Search(T, "ann", next(queries))]), 100)
    began = time.perf_counter()
    steps = build(store)
    yield f"build the graph of {n:,}, s", round(time.perf_counter() - began, 1)
    yield "one background step", {f"p{q}_ms": round(float(np.percentile(steps, q)) * 1000, 1) for q in (50, 99, 100)}
    yield f"bytes a memory at {n:,}, counted", round(store.resident.bytes / n)
    yield f"bytes a memory at {n:,}, RSS", round((resident_bytes() - before) / n)
    yield f"search at {n:,}, warm", timed(lambda: store.search([Search(T, "ann", next(queries))]), 2000)
    yield f"recall@10 at {n:,}", recall(store, "ann", truth)
    kept = {id: v for i, (id, v) in enumerate(truth.items()) if i % 100 == 7}
    yield "recall@10, a filter leaves 1 %", recall(store, "ann", kept, {"k": 7}, queries=5)
    yield "search, a filter leaves 1 %", timed(lambda: store.search([Search(T, "ann", next(queries), 10, {"k": 7})]), 5)
    store.close()
    store = open_store(folder / "large.db", snapshot_dir=folder / "snapshots")
    yield f"search at {n:,}, cold, from a snapshot", timed(lambda: store.search([Search(T, "ann", next(queries))]), 1)
    store.delete_where(T, "ann", {"n": {"lt": n // 2}})
    truth = dict(list(truth.items())[n // 2 :])
    yield "recall@10, half deleted, before the rebuild", recall(store, "ann", truth)
    build(store)
    yield "recall@10, half deleted, rebuilt", recall(store, "ann", truth)
    store.close()


def updated(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Recall after every memory of a user was updated."""
    n = min(10_000, options.large)
    store = open_store(folder / "updated.db")
    fill(store, "ann", draw(n))
    store.search([Search(T, "ann", draw(1)[0])])
    build(store)
    vectors = draw(n)
    for first in range(0, n, 500):
        made = tuple(NewMemory(f"ann-{first + i}", f"new {i}", v) for i, v in enumerate(vectors[first : first + 500]))
        store.append([Append(T, "ann", made, upsert=True)])
    truth = {f"ann-{i}": v for i, v in enumerate(vectors)}
    yield f"recall@10 at {n:,}, every memory updated, before the rebuild", recall(store, "ann", truth)
    build(store)
    yield f"recall@10 at {n:,}, every memory updated, rebuilt", recall(store, "ann", truth)
    store.close()


def commits(folder: Path, _: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Group commit, compared with one transaction for each row."""
    store = open_store(folder / "commits.db")
    vectors = draw(256)

    def rate(users: int, batches: int, name: str) -> float:
        began = time.perf_counter()
        for batch in range(batches):
            requests = [Append(T, f"u{n}", (NewMemory(f"{name}{batch}-{n}", TEXT, vectors[n]),)) for n in range(users)]
            store.append(requests)
        return users * batches / (time.perf_counter() - began)

    rate(256, 2, "warm")
    one, many = rate(1, 300, "one"), rate(256, 40, "many")
    yield "rows/s, one a transaction", round(one)
    yield "rows/s, 256 users a transaction", round(many)
    yield "group commit, times", round(many / one, 1)
    store.close()


_OPEN = """
import sys, time, json
began = time.perf_counter()
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import numpy as np
from store import Search, Store
from benchmarks.store_bench import DIM, T, resident_bytes
imported = time.perf_counter()
store = Store.open("sqlite:///" + sys.argv[1], dim=DIM, model="bench")
opened = time.perf_counter()
query = np.ones(DIM, np.float32)
for n in range(1000):
    (result,) = store.search([Search(T, f"user{n}", query)])
    assert len(result.results) == 1
print(json.dumps({"open_ms": round((opened - imported) * 1000, 2), "start_ms": round((opened - began) * 1000),
                  "rss_mb": round(resident_bytes() / 1e6, 1), "search_ms": round(time.perf_counter() - opened, 3)}))
"""


def many_users(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """A log of many users, of which 1,000 are searched, compared with a log of 1,000 users."""
    vectors = draw(1000)
    sizes = (1000, options.users)
    paths = {users: folder / f"users{users}.db" for users in sizes}
    for users, path in paths.items():
        store = open_store(path, synchronous="NORMAL")
        for first in range(0, users, 1000):
            requests = [Append(T, f"user{first + n}", (NewMemory("1", TEXT, vectors[n]),)) for n in range(1000)]
            store.append(requests)
        store.close()
    runs: dict[int, list[dict[str, float]]] = {users: [] for users in sizes}
    for _ in range(15):  # in turn, so that a change in the machine's speed affects both
        for users, path in paths.items():
            command = [sys.executable, "-c", _OPEN, str(path), str(Path(__file__).parents[1])]
            runs[users].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    for users, path in paths.items():
        found = {key: float(np.median([run[key] for run in runs[users]])) for key in runs[users][0]}
        yield f"{users:,} users in the log, 1,000 asked for", found
        yield f"{users:,} users, file MB", round(path.stat().st_size / 1e6)
    few, many = (runs[users] for users in sizes)
    for key, name in (("start_ms", "start-up"), ("rss_mb", "resident memory")):
        ratios = [b[key] / a[key] for a, b in zip(few, many, strict=True)]
        yield f"{name}, {options.users:,} users : 1,000", round(float(np.median(ratios)), 3)


def residents(folder: Path, _: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """The memory that a small user takes while its index is resident."""
    store = open_store(folder / "residents.db", synchronous="NORMAL")
    vectors = draw(10)
    for first in range(0, 5000, 500):
        requests = [
            Append(T, f"u{first + n}", tuple(NewMemory(str(i), TEXT, v) for i, v in enumerate(vectors)))
            for n in range(500)
        ]
        store.append(requests)
    ask = [[Search(T, f"u{first + n}", vectors[0]) for n in range(100)] for first in range(0, 5000, 100)]
    for part in ask[:2]:
        store.search(part)
    before = resident_bytes()
    for part in ask[2:]:
        store.search(part)
    yield "bytes a resident user of 10 memories, RSS", round((resident_bytes() - before) / 4800)
    yield "bytes a resident user of 10 memories, counted", round(store.resident.bytes / 5000)
    store.close()


PARTS = {part.__name__: part for part in (small, commits, residents, updated, many_users, large)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the store.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--large", type=int, default=100_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text())["figures"] if RESULTS.exists() else {}
    where = machine.provenance()
    for name in options.only:
        folder = Path(tempfile.mkdtemp(prefix="store-bench-", dir=options.folder))
        figures: dict[str, Any] = {}
        try:
            for figure, value in PARTS[name](folder, options):
                figures[figure] = value
                print(f"{figure:60} {value}", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        found[name] = {
            "where": where,
            **figures,
        }  # for each part: others may be from elsewhere or earlier
    print("\n".join(map(str, report.save({"kind": "store", "figures": found}, RESULTS))))


if __name__ == "__main__":
    main()
