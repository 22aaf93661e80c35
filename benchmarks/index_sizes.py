"""From how many memories on a graph is better than the exact matrix: the default of `store.exact_below` follows.

    python -m benchmarks.index_sizes [--sizes 1000 2000 5000 10000 20000 50000] [--searches 1000]

For each size the index of one user is made in both forms, and the same queries are put to both. Throughput is that of
two processes that search at the same time, each in its own index, since they share the bandwidth of the memory. The
first search after a restart opens a store on a log in SQLite: an exact index is read from the log, a graph from its
snapshot. Vectors are those of `benchmarks.store_bench`. Prints a table and writes benchmarks/results/index.json and its
report.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, report
from benchmarks.store_bench import DIM, T, build, draw, fill, open_store
from store import IndexOptions, Search
from store.index.matrix import normalised
from store.index.user_index import UserIndex
from store.log.reading import NEVER, Changes

KINDS = {"exact": IndexOptions(switch=10**9), "graph": IndexOptions(switch=1)}
RESTARTS = 5


def index_of(vectors: Any, options: IndexOptions) -> tuple[UserIndex, float]:
    """An index of the vectors, and the seconds that it took to make it."""
    n = len(vectors)
    index = UserIndex(1, 0, DIM, options)
    began = time.perf_counter()
    for first in range(0, n, 500):
        labels = np.arange(first, min(first + 500, n))
        part = vectors[first : first + 500]
        index.apply(Changes(labels, labels + 1, np.ones(len(part), np.bool_), np.full(len(part), NEVER), part))
    while index.maintain():
        pass
    return index, time.perf_counter() - began


def search(index: UserIndex, query: Any, vectors: Any) -> Any:
    return index.search(query, 10, lambda labels: vectors[labels])


def single(indexes: dict[str, UserIndex], vectors: Any, queries: Any) -> dict[str, dict[str, float]]:
    """The median of a search in microseconds of time and of CPU time, and the recall@10, for each index.

    The CPU time is hardly changed by other work on the machine.
    """
    best = np.sort(queries @ vectors.T)[:, -10]
    figures = {}
    for kind, index in indexes.items():
        took = np.empty((len(queries), 2))
        hits = 0
        for n, query in enumerate(queries):
            began = time.perf_counter(), time.thread_time()
            found = search(index, query, vectors)
            took[n] = time.perf_counter() - began[0], time.thread_time() - began[1]
            hits += int((found.scores >= best[n] - 2e-6).sum())
        wall, cpu = (round(1e6 * float(value)) for value in np.median(took, axis=0))
        figures[kind] = {"p50_us": wall, "cpu_us": cpu, "recall": round(hits / (10 * len(queries)), 4)}
    return figures


def _searches(vectors: Any, options: IndexOptions, queries: Any, barrier: Any, rates: Any) -> None:
    index, _ = index_of(vectors, options)
    barrier.wait()
    began = time.perf_counter()
    for query in queries:
        search(index, query, vectors)
    rates.put(len(queries) / (time.perf_counter() - began))


def throughput(vectors: Any, options: IndexOptions, queries: Any) -> int:
    """Searches per second of two processes together."""
    context = get_context("fork")
    barrier, rates = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_searches, args=(vectors, options, queries, barrier, rates)) for _ in range(2)]
    for process in processes:
        process.start()
    total = sum(rates.get() for _ in processes)
    for process in processes:
        process.join()
    return round(total)


def restart_ms(folder: Path, options: IndexOptions, vectors: Any) -> float:
    """Milliseconds of the first search of a user after a restart: the median of several."""
    opened: dict[str, Any] = {"index": options, "snapshot_dir": folder / "snapshots"}
    store = open_store(folder / "log.db", **opened)
    fill(store, "ann", vectors)
    store.search([Search(T, "ann", vectors[0])])
    build(store)
    store.close()
    took = []
    for _ in range(RESTARTS):
        store = open_store(folder / "log.db", **opened)
        began = time.perf_counter()
        store.search([Search(T, "ann", vectors[0])])
        took.append(1000 * (time.perf_counter() - began))
        store.close()
    return round(float(np.median(took)), 1)


def measure(n: int, searches: int) -> dict[str, Any]:
    """All figures of one size, for both kinds of index."""
    vectors = draw(n)
    queries = normalised(draw(searches))
    made = {kind: index_of(vectors, options) for kind, options in KINDS.items()}
    row: dict[str, Any] = {
        "memories": n,
        **single({kind: index for kind, (index, _) in made.items()}, vectors, queries),
    }
    for kind, options in KINDS.items():
        index, build_s = made[kind]
        row[kind] |= {"build_s": round(build_s, 3), "mb": round(index.bytes / 1e6, 1)}
        row[kind]["searches_per_s"] = throughput(vectors, options, queries)
        with tempfile.TemporaryDirectory(prefix="index-sizes-") as folder:
            row[kind]["restart_ms"] = restart_ms(Path(folder), options, vectors)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the exact index of a user with the graph, by size.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 2000, 5000, 10_000, 20_000, 50_000])
    parser.add_argument("--searches", type=int, default=1000)
    options = parser.parse_args()
    found = {"kind": "index", **machine.provenance(), "command": "python -m benchmarks.index_sizes", "rows": []}
    for n in options.sizes:
        found["rows"].append(measure(n, options.searches))
        print(found["rows"][-1], flush=True)
        files = report.save(found, machine.RESULTS / "index.json")
    print("\n".join(report.index_report(found)))
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    main()
