"""How costs grow with users, memories of a user, words of a text and replicas, with the exponent of each.

    python -m benchmarks.growth                    # all, in about 5 minutes on two cores
    python -m benchmarks.growth --full             # up to 1,000,000 users, and 100,000 memories of one: minutes more
    python -m benchmarks.growth --only replicas --replicas 1,2,4,8,16

Users and memories are measured in the store itself, because the time of an HTTP request would hide the growth. Words
and replicas are measured through the server. The vectors in the store are synthetic; store_bench.py describes them.
Writes benchmarks/results/growth-<machine>-<commit>.json, a Markdown report next to it, and its plots.
"""

import argparse
import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks import machine, report
from benchmarks.figures import percentiles_ms, spread
from benchmarks.server import Args, Failed, load, memserve, merged, parse_args, profile, replicas
from benchmarks.store_bench import TEXT, T, draw, fill, open_store
from benchmarks.workload import seed_of
from store import Append, IndexOptions, NewMemory, Search, Store, StoreError

Row = dict[str, Any]

USERS = (100, 1_000, 10_000, 100_000)
MEMORIES = (100, 300, 1_000, 3_000, 10_000)
WORDS = (4, 8, 16, 32, 64, 128, 200)
CALLS = 200  # timed calls of each kind
USERS_A_TRANSACTION = 1_000


def milliseconds(calls: Iterable[Callable[[], object]]) -> tuple[float, float]:
    """p50 and p99 in milliseconds of calls that are made one after the other."""
    ready = list(calls)
    gc.collect()
    took = []
    for call in ready:
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    found = percentiles_ms(took)
    return found["p50_ms"], found["p99_ms"]


def search(store: Store, user: str, query: Any) -> None:
    (found,) = store.search([Search(T, user, query)])
    if isinstance(found, StoreError):
        raise found


def append(store: Store, user: str, memory: NewMemory) -> None:
    (done,) = store.append([Append(T, user, (memory,))])
    if isinstance(done, StoreError):
        raise done


def users(counts: Sequence[int], folder: Path) -> Row:
    """Open a log of more and more users with one memory each; search and add for some of them."""
    vectors = draw(USERS_A_TRANSACTION)
    random = np.random.default_rng(1)
    rows: list[Row] = []
    path = folder / "users.db"
    there = 0
    for count in tqdm(counts, desc="users"):
        bulk = open_store(path, synchronous="NORMAL")
        began, before = time.perf_counter(), there
        while there < count:
            step = min(USERS_A_TRANSACTION, count - there)
            memories = [NewMemory("1", f"{TEXT}{there + n}", vectors[n]) for n in range(step)]
            bulk.append([Append(T, f"user{there + n}", (memory,)) for n, memory in enumerate(memories)])
            there += step
        bulk_s = time.perf_counter() - began
        bulk.close()
        began = time.perf_counter()
        store = open_store(path)
        open_ms = (time.perf_counter() - began) * 1e3
        asked = [f"user{n}" for n in random.choice(count, min(CALLS, count), replace=False)]
        cold = milliseconds(partial(search, store, user, vector) for user, vector in zip(asked, vectors, strict=False))
        users_and_vectors = list(zip(islice(cycle(asked), CALLS), vectors, strict=False))
        warm = milliseconds(partial(search, store, user, vector) for user, vector in users_and_vectors)
        added = milliseconds(
            partial(append, store, user, NewMemory(f"new{count}-{n}", TEXT, vector))
            for n, (user, vector) in enumerate(users_and_vectors)
        )
        store.close()
        rows.append(
            {
                "users": count,
                "bulk_users_per_s": round((count - before) / bulk_s),
                "open_ms": open_ms,
                "cold_search_p50_ms": cold[0],
                "warm_search_p50_ms": warm[0],
                "durable_add_p50_ms": added[0],
                "file_mb": path.stat().st_size / 1e6,
            }
        )
    figures = ["open_ms", "cold_search_p50_ms", "warm_search_p50_ms", "durable_add_p50_ms", "bulk_users_per_s"]
    return {"title": "Users in the log", "x": "users", "figures": [*figures, "file_mb"], "rows": rows}


def memories(counts: Sequence[int], folder: Path) -> Row:
    """Build the index of one user with more and more memories, search and add."""
    rows: list[Row] = []
    for count in tqdm(counts, desc="memories"):
        path = folder / f"memories{count}.db"
        store = open_store(path)
        vectors = draw(count)
        began = time.perf_counter()
        fill(store, "ann", vectors)
        filled_s = time.perf_counter() - began
        store.close()
        store = open_store(path)
        cold = milliseconds([partial(search, store, "ann", draw(1)[0])])
        began = time.perf_counter()
        while store.background_step():
            pass
        build_s = time.perf_counter() - began
        warm = milliseconds(partial(search, store, "ann", query) for query in draw(CALLS))
        added = milliseconds(
            partial(append, store, "ann", NewMemory(f"new-{n}", TEXT, vector)) for n, vector in enumerate(draw(CALLS))
        )
        rows.append(
            {
                "memories": count,
                "append_500_per_s": round(count / filled_s),
                "cold_search_ms": cold[0],
                "search_p50_ms": warm[0],
                "search_p99_ms": warm[1],
                "durable_add_p50_ms": added[0],
                "index_build_s": build_s if count > IndexOptions().switch else None,  # else it is a matrix
                "index_mb": store.resident.bytes / 1e6,
            }
        )
        store.close()
        path.unlink()
    figures = ["cold_search_ms", "search_p50_ms", "search_p99_ms", "durable_add_p50_ms", "append_500_per_s"]
    return {
        "title": "Memories of a user",
        "x": "memories",
        "figures": [*figures, "index_build_s", "index_mb"],
        "rows": rows,
    }


class Timing(NamedTuple):
    """The seed, repetitions and duration of a load."""

    seed: int
    rounds: int
    measure_s: float


def served(url: str, name: str, timing: Timing, *arguments: object) -> Row:
    """Medians of a few runs of the load generator, and their errors."""
    runs = []
    for turn in range(timing.rounds):
        seed = seed_of(timing.seed, name, turn)
        runs.append(load(url, *arguments, "--warm-s", 0.7, "--measure-s", timing.measure_s, "--seed", seed))
    figures = {key: spread([run[key] for run in runs]).median for key in ("texts_per_s", "p50_ms", "p99_ms")}
    return {**figures, "errors": report.errors(runs)}


def failures(*loads: Row) -> str:
    """The errors of several loads; empty if there was none."""
    return "; ".join(load["errors"] for load in loads if load["errors"])


def words(counts: Sequence[int], settings: Args, timing: Timing) -> Row:
    """Texts of more and more words: one at a time, and 32 a request from 4 clients, which no length makes too many."""
    rows: list[Row] = []
    with memserve(settings) as server:
        for count in tqdm(counts, desc="words"):
            length = ("--length", count)
            alone = served(server.url, f"alone {count}", timing, *length, "--clients", 1)
            many = served(server.url, f"many {count}", timing, *length, "--clients", 4, "--size", 32)
            rows.append(
                {
                    "words": count,
                    "single_p50_ms": alone["p50_ms"],
                    "embed_32_texts_per_s": many["texts_per_s"],
                    "embed_32_words_per_s": many["texts_per_s"] * count,
                    "errors": failures(alone, many),
                }
            )
    figures = ["single_p50_ms", "embed_32_texts_per_s", "embed_32_words_per_s"]
    return {"title": "Words of a text", "x": "words", "figures": figures, "rows": rows}


def embedders(counts: Sequence[int], settings: Args, timing: Timing) -> Row:
    """More and more embedder replicas on this machine, with one text per request and with 32."""
    rows: list[Row] = []
    gpus = len(machine.gpus())
    for count in tqdm(counts, desc="replicas"):
        share = {"num_gpus": math.floor(1000 * gpus / count) / 1000} if count > gpus > 0 else {}
        try:
            with memserve(merged(settings, {"embedder": replicas(count, **share)})) as server:
                one = served(server.url, f"one {count}", timing, "--clients", 64)
                many = served(server.url, f"many {count}", timing, "--clients", 16, "--size", 32)
                adds = served(server.url, f"adds {count}", timing, "--clients", 64, "--job", "add")
        except Failed as error:  # so many may not fit; the results of fewer are kept
            rows.append({"replicas": count, "errors": str(error).strip().splitlines()[-1]})
            continue
        rows.append(
            {
                "replicas": count,
                "embed_1_texts_per_s": one["texts_per_s"],
                "embed_32_texts_per_s": many["texts_per_s"],
                "durable_adds_texts_per_s": adds["texts_per_s"],
                "embed_1_p99_ms": one["p99_ms"],
                "errors": failures(one, many, adds),
            }
        )
    figures = ["embed_1_texts_per_s", "embed_32_texts_per_s", "durable_adds_texts_per_s", "embed_1_p99_ms"]
    return {"title": "Embedder replicas", "x": "replicas", "figures": figures, "rows": rows}


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("users", "memories", "words", "replicas")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--full", action="store_true", help="also the points that take minutes each")
    parser.add_argument("--users", type=integers, help="default: 100 to 100,000")
    parser.add_argument("--memories", type=integers, help="default: 100 to 10,000")
    parser.add_argument("--words", type=integers, default=list(WORDS))
    parser.add_argument("--replicas", type=integers, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure-s", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="folder for the logs, which are removed at the end")
    parser.add_argument("--args", type=parse_args, default={}, help="settings over this machine's profile, as JSON")
    parser.add_argument("--commit", help="the commit of a copy without git")
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    options = parser.parse_args()
    found: dict[str, Any] = {"kind": "growth", **machine.provenance(options.commit)}
    settings = merged(profile(), options.args)
    timing = Timing(options.seed, options.rounds, options.measure_s)
    parts: dict[str, Callable[[Path], Row]] = {
        "users": lambda folder: users(options.users or [*USERS, *[1_000_000] * options.full], folder),
        "memories": lambda folder: memories(options.memories or [*MEMORIES, *[100_000] * options.full], folder),
        "words": lambda _: words(options.words, settings, timing),
        "replicas": lambda _: embedders(options.replicas, settings, timing),
    }
    found["parts"] = {}
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="memserve-growth-", dir=options.folder) as folder:
            found["parts"][name] = parts[name](Path(folder))
    path = options.results / f"growth-{machine.stem(found)}.json"
    print("\n".join(map(str, report.save(found, path))))


if __name__ == "__main__":
    main()
