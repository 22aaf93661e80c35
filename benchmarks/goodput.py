"""Answers in time if ten times more requests arrive than the server can answer, and its latency afterwards.

    python -m benchmarks.goodput [--seconds 60] [--quick]

Each request is a client of its own that gives up after a second and closes its connection. The rate that the server can
sustain is the most answers in time at any offered load (a closed loop gives the first guess). Then one run goes through
three phases: a fifth of that rate, ten times it, and a fifth again. Goodput counts the answers of an overloaded server
that came in time; the others are refusals and clients that gave up. Prints a table and writes
benchmarks/results/goodput.json, its report and its plot.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.load import Load
from benchmarks.server import Failed, load, memserve, profile
from benchmarks.workload import seed_of

PATIENCE_S = 1.0
TOO_MUCH = 10
CALM = 0.2
RECOVERY_S = 5
STEPS = (0.7, 0.85, 1.0, 1.15)  # of the closed loop's rate: the peak is somewhere there
SHAPES = {  # name: job, length, clients of the closed loop
    "embed, 4 to 12 words": ("embed", "short", 64),
    "embed, 150 words": ("embed", "150", 16),
    "search": ("search", "short", 64),
    "add, 4 to 12 words": ("add", "short", 64),
}

Found = dict[str, Any]


def impatient(url: str, phases: list[tuple[float, float]], job: str, length: str, seed: int) -> Found:
    """Run the clients that give up, in a separate process. Returns its result. `phases`: (rate, seconds)."""
    steps = ",".join(f"{rate:g}:{seconds:g}" for rate, seconds in phases)
    command = [sys.executable, "-m", "benchmarks.impatient", "--url", url, "--phases", steps, "--job", job]
    command += ["--length", length, "--seed", str(seed), "--patience-s", str(PATIENCE_S)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(machine.ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=machine.ROOT, env=environment)
    if done.returncode:
        raise Failed(f"the clients failed:\n{done.stderr[-2000:]}")
    result: Found = json.loads(done.stdout)
    return result


def measure(url: str, shape: str, seconds: float, step_s: float, calm_s: float) -> Found:
    """The figures of one shape of requests: `seconds` of overload, between calm phases; each offered rate `step_s`."""
    job, length, clients = SHAPES[shape]
    loaded = ("--job", job, "--length", length, "--clients", clients, "--users", Load.users)
    closed = load(url, *loaded, "--warm-s", 2, "--measure-s", step_s, "--seed", seed_of(shape, "closed"))
    guess = closed["requests_per_s"]
    steps = impatient(url, [(part * guess, step_s) for part in STEPS], job, length, seed_of(shape, "steps"))
    peak = max(phase["good_per_s"] for phase in steps["phases"])
    phases = [(CALM * peak, calm_s), (TOO_MUCH * peak, seconds), (CALM * peak, RECOVERY_S + calm_s)]
    run = impatient(url, phases, job, length, seed_of(shape, "overload"))
    return {
        "shape": shape,
        "closed_per_s": guess,
        "steps": steps["phases"],
        "peak_per_s": peak,
        "overload_from_s": calm_s,
        "overload_to_s": calm_s + seconds,
        **run,
    }


def of_window(seconds: list[Found], key: str, quantile: str) -> float:
    """The median, over some seconds, of a latency percentile; NaN if there was no answer."""
    known = sorted(second[key][quantile] for second in seconds if second[key])
    return known[len(known) // 2] if known else math.nan


def figures(row: Found) -> dict[str, float]:
    """Goodput, refusals and recovery of one row."""
    before, during, _ = row["phases"]
    normal = row["seconds"][round(row["overload_to_s"]) + RECOVERY_S :]
    refused = during["refused_latency"] or {}
    return {
        "offered_per_s": during["offered_per_s"],
        "good_per_s": during["good_per_s"],
        "share": during["good_per_s"] / row["peak_per_s"],
        "good_p99_ms": during["latency"]["p99_ms"] if during["latency"] else math.nan,
        "refused": during["refused"],
        "gave_up": during["gave_up"],
        "errors": sum(during["errors"].values()),
        "refused_p99_ms": refused.get("p99_ms", math.nan),
        "before_p50_ms": before["latency"]["p50_ms"] if before["latency"] else math.nan,
        "after_p50_ms": of_window(normal, "latency", "p50_ms"),
    }


def table(rows: list[Found]) -> str:
    """The rows as a Markdown table."""
    head = ["requests", "peak/s", "offered/s", "in time/s", "of the peak", "p99 ms", "refused", "p99 ms", "gave up"]
    head += ["errors", "p50 before", "5 s after", "clients' CPU"]
    cells = []
    for row in rows:
        found = figures(row)
        cells.append(
            [
                row["shape"],
                report.number(row["peak_per_s"]),
                report.number(found["offered_per_s"]),
                report.number(found["good_per_s"]),
                f"**{found['share']:.0%}**",
                report.number(found["good_p99_ms"]),
                f"{found['refused']:,}",
                report.number(found["refused_p99_ms"]),
                f"{found['gave_up']:,}",
                found["errors"],
                report.number(found["before_p50_ms"]),
                report.number(found["after_p50_ms"]),
                f"{row['cpu_share']:.0%} of a core",
            ]
        )
    return report.table(head, cells)


def draw(rows: list[Found], path: Path) -> Path:
    """Answers in time and their median latency in each second of the run."""

    def lines(of: Any) -> list[report.Line]:
        drawn: list[report.Line] = []
        for row in rows:
            points = [(float(at), of(second, row)) for at, second in enumerate(row["seconds"])]
            known = [(at, value) for at, value in points if value is not None]
            drawn.append((row["shape"], [at for at, _ in known], [value for _, value in known]))
        return drawn

    ticks = list(range(0, max((len(row["seconds"]) for row in rows), default=0) + 1, 10))
    return report.plot(
        path,
        [
            {
                "title": "Answers in time",
                "x": "s",
                "ticks": ticks,
                "y": "% of the peak",
                "lines": lines(lambda second, row: 100 * second["good_per_s"] / row["peak_per_s"]),
            },
            {
                "title": "Latency of answers in time, p50",
                "x": "s",
                "ticks": ticks,
                "y": "ms",
                "log_y": True,
                "lines": lines(lambda second, _: second["latency"] and second["latency"]["p50_ms"]),
            },
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--quick", action="store_true", help="10 s of overload, short steps")
    parser.add_argument("--only", choices=SHAPES, action="append", help="one kind of request; may be repeated")
    options = parser.parse_args()
    seconds, step_s, calm_s = (10.0, 3.0, 4.0) if options.quick else (options.seconds, 8.0, 10.0)
    with memserve(profile()) as server:
        load(server.url, "--clients", 16, "--warm-s", 1, "--measure-s", 2, "--seed", 99)
        rows = [measure(server.url, shape, seconds, step_s, calm_s) for shape in options.only or SHAPES]
        found = {"kind": "goodput", **machine.provenance(), **server.ready, "rows": rows}
    print(table(rows))
    print("\n".join(map(str, report.save(found, machine.RESULTS / "goodput.json"))))


if __name__ == "__main__":
    main()
