"""Figures of a run: one row per second, the time until the latency has recovered, a table and a plot."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import percentiles_ms
from benchmarks.scaling.client import Seen
from benchmarks.scaling.observer import DEPLOYMENTS

STEADY_S = 5


def by_second(requests: Sequence[Seen], started: float, seconds: int) -> list[dict[str, float]]:
    """One row for each second: requests that were due, answered and failed, and latencies of those that were due."""
    due: list[list[Seen]] = [[] for _ in range(seconds)]
    good = Counter(int(seen.done - started) for seen in requests if not seen.error and math.isfinite(seen.done))
    for seen in requests:
        if 0 <= (second := int(seen.due - started)) < seconds:
            due[second].append(seen)
    rows = []
    for second, those in enumerate(due):
        latencies = [seen.done - seen.due for seen in those if not seen.error]
        errors = sum(1 for seen in those if seen.error)
        rows.append(
            {
                "second": second,
                "offered": len(those),
                "goodput": good[second],
                "errors": errors,
                **percentiles_ms(latencies),
            }
        )
    return rows


def recovered_s(rows: Sequence[dict[str, float]], step: float, until: float, target_ms: float) -> float | None:
    """Seconds from the step until p99 is below the target for `STEADY_S` again.

    None if it does not recover; 0 if it is never above the target.
    """
    during = [row for row in rows if step <= row["second"] < until]
    late = [row["p99_ms"] > target_ms for row in during]
    if True not in late:
        return 0.0
    for first in range(late.index(True), len(during) - STEADY_S + 1):
        if not any(late[first : first + STEADY_S]):
            return during[first]["second"] - step
    return None


def extent(samples: Sequence[dict[str, Any]], name: str) -> str:
    """`1 -> 2 -> 1`: the first, the highest and the last number of replicas."""
    counts = [sample["replicas"][name] for sample in samples]
    return f"{counts[0]} -> {max(counts)} -> {counts[-1]}"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw load, latency, queue and replicas on one time axis."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "memserve", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    rows, samples = found["seconds"], found["samples"]
    at = [row["second"] for row in rows]
    sampled = [sample["at"] for sample in samples]
    figure, (load, latency, queue, replicas) = pyplot.subplots(4, 1, sharex=True, figsize=(9, 9))
    load.plot(at, [row["offered"] for row in rows], label="offered", linewidth=1)
    load.plot(at, [row["goodput"] for row in rows], label="answered", linewidth=1)
    load.plot(at, [row["errors"] for row in rows], label="failed", linewidth=1, color="tab:red")
    load.set(ylabel="requests/s")
    for key in ("p50_ms", "p99_ms"):
        latency.plot(at, [row[key] for row in rows], label=key.removesuffix("_ms"), linewidth=1)
    latency.axhline(found["target_ms"], color="grey", linestyle=":", label="target")
    latency.set(ylabel="ms", yscale="log")
    queue.plot(sampled, [sample["waiting_tokens"] for sample in samples], label="waiting tokens", linewidth=1)
    queue.set(ylabel="tokens")
    for name, style in zip(DEPLOYMENTS, ("-", "--", ":"), strict=True):
        counts = [sample["replicas"][name] for sample in samples]
        replicas.step(sampled, counts, where="post", linestyle=style, label=name)
    replicas.set(ylabel="replicas", xlabel="seconds", yticks=range(5))
    begin = 0.0
    for phase in found["phases"]:
        for axis in (load, latency, queue, replicas):
            axis.axvline(begin, color="grey", linewidth=0.5)
        load.text(begin, 1.02, f" {phase['name']}", transform=load.get_xaxis_transform(), fontsize=8)
        begin += phase["seconds"]
    for axis in (load, latency, queue, replicas):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def table(found: dict[str, Any]) -> str:
    """The main figures as a Markdown table."""
    recovery = "never" if found["recovered_s"] is None else f"{found['recovered_s']:.0f} s"
    samples = found["samples"]
    lines = [
        "| figure | measured |\n| --- | --- |",
        f"| capacity of one embedder | {found['per_embedder_per_s']:.0f} requests/s |",
        f"| p99 below {found['target_ms']:g} ms again after the step up | {recovery} |",
        *(f"| {name} replicas: first, most, last | {extent(samples, name)} |" for name in DEPLOYMENTS),
        f"| requests, of which failed | {found['requests']:,}, {found['errors'] or 'none'} |",
        f"| acknowledged memories, of which not found | {found['acknowledged']:,}, {len(found['missing']) or 'none'} |",
    ]
    return "\n".join(lines)
