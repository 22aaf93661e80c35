"""How soon requests are refused if there are more than one embedder can serve.

    python -m benchmarks.overload [--seconds 6] [--rounds 5]

Requests have one or four texts, long or short. A few requests with long texts fill an embedder, and the gateway has a
core on which to refuse the others. With short texts the gateway, HAProxy and the client need as much CPU time as the
embedder, so with few cores an answer waits for a core. Prints a table and writes benchmarks/results/overload.json and
its report.
"""

import argparse
import math
from collections.abc import Iterable
from itertools import count
from typing import Any

from benchmarks import machine, report
from benchmarks.figures import spread
from benchmarks.server import load, memserve, profile, replicas

TOO_MUCH = 1.5  # offered load, as a multiple of the closed loop's rate
SIZES = (1, 4)
CLIENTS = {"150": 8, "short": 48}  # by length: enough to fill an embedder, too few to be refused
QUEUED_TOKENS = 16_000  # estimated tokens: full in a second or two, and more than the clients of the closed loop need
ARGS = {"embedder": replicas(1), "gateway": replicas(1, max_queued_tokens=QUEUED_TOKENS)}


def measure(url: str, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """One row for each load, with the runs of all rounds. The loads take turns in each round."""
    rows: list[dict[str, Any]] = []
    seeds = count(1)  # a repeated text would be answered from the cache
    for length, clients in CLIENTS.items():
        for size in SIZES:
            shape = ("--length", length, "--size", size, "--measure-s", seconds)
            closed = load(url, *shape, "--clients", clients, "--warm-s", 1, "--seed", next(seeds))
            rows.append({"length": length, "texts": size, "closed_per_s": closed["requests_per_s"], "runs": []})
    for _ in range(rounds):
        for row in rows:
            shape = ("--length", row["length"], "--size", row["texts"], "--measure-s", seconds)
            open_loop = ("--rate", TOO_MUCH * row["closed_per_s"], "--warm-s", 2, "--seed", next(seeds))
            row["runs"].append(load(url, *shape, *open_loop))
    return rows


def ranged(values: Iterable[float]) -> str:
    return report.ranged(spread(list(values)))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = ("words", "texts", "offered/s", "answered/s", "429", "others", "429 p50 ms", "p90", "p99", "late p99 ms")
    cells = []
    for row in rows:
        runs = row["runs"]
        refused = [run["refused"] or {} for run in runs]
        others = sum(count for run in runs for kind, count in run["errors"].items() if kind != "429")
        cells.append(
            (
                "4 to 12" if row["length"] == "short" else row["length"],
                row["texts"],
                report.number(runs[0]["offered_per_s"]),
                ranged(run["requests_per_s"] for run in runs),
                ranged(run["errors"].get("429", 0) for run in runs),
                others,
                *(ranged(one.get(f"p{q}_ms", math.nan) for one in refused) for q in (50, 90, 99)),
                ranged(run["late_p99_ms"] for run in runs),
            )
        )
    return report.table(head, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with memserve(profile(), ARGS) as server:
        load(server.url, "--clients", 16, "--warm-s", 1, "--measure-s", 2, "--seed", 99)
        rows = measure(server.url, options.seconds, options.rounds)
        found = {"kind": "overload", **machine.provenance(), **server.ready, "rows": rows}
    print(table(found["rows"]))
    print("\n".join(map(str, report.save(found, machine.RESULTS / "overload.json"))))


if __name__ == "__main__":
    main()
