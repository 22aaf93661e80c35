"""The tables of a comparison with other servers. Measures nothing."""

from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.figures import Spread, spread
from benchmarks.peers.scenarios import ENGINE, OURS, OURS_DTYPE, SCENARIOS
from benchmarks.peers.table import BASELINE
from benchmarks.report import errors, number, ranged, table

Found = dict[str, Any]
OUR_NAME = f"{OURS} {OURS_DTYPE}"


def by_round(runs: list[Found]) -> dict[int, float]:
    return {run["round"]: run["texts_per_s"] for run in runs}


def ratios(ours: list[Found], others: list[Found]) -> Spread | None:
    """memserve's rate over another's, round by round; None if no round has both."""
    mine, theirs = by_round(ours), by_round(others)
    both = [mine[n] / theirs[n] for n in sorted(mine.keys() & theirs.keys()) if theirs[n]]
    return spread(both) if both else None


ENGINE_TITLE = "memserve's bare engine, two processes"


def titled(found: Found, name: str) -> str:
    """The title of a row: the peer, its version, its dtype."""
    if name == ENGINE:
        return ENGINE_TITLE
    key, dtype, *rest = name.split(" ", 2)
    versions = found["peers"][key]["versions"]
    version = f" {next(iter(versions.values()))}" if versions else ""
    shown = "" if key in ("chroma", "qdrant") else f", {dtype}"
    return f"{found['peers'][key]['title']}{version}{shown}" + "".join(f", {part}" for part in rest)


def scenario_table(found: Found, key: str) -> str:
    """Fastest first. Contenders that did not run come last, with the reason."""
    runs = found["runs"].get(key, {})
    ours = runs.get(OUR_NAME, [])
    rows = []
    for name, seen in sorted(runs.items(), key=lambda item: -median(by_round(item[1]).values())):
        ratio = ratios(ours, seen)
        latency = [number(median(run[p] for run in seen)) if p in seen[0] else "-" for p in ("p50_ms", "p99_ms")]
        failed = errors(run for run in seen if "errors" in run)
        times = "" if name == OUR_NAME or ratio is None else ranged(ratio)
        rate = ranged(spread(list(by_round(seen).values())))
        rows.append([titled(found, name), rate, times, *latency, failed or "none"])
    for name, error in found["errors"].get(key, {}).items():
        rows.append([titled(found, name), "did not run" if name not in runs else "stopped", "", "", "", error])
    unit = "texts/s" if key[0].isdigit() else "requests/s"
    return table(["server", unit, "memserve over it", "p50 ms", "p99 ms", "errors"], rows)


def fastest(runs: dict[str, list[Found]], wanted: Callable[[str], bool]) -> str | None:
    """The contender with the highest median rate among those that are wanted; None if there is none."""
    rates = {name: median(by_round(seen).values()) for name, seen in runs.items() if wanted(name)}
    return max(rates, key=lambda name: rates[name]) if rates else None


def summary(found: Found) -> str:
    """One row for each scenario: memserve and the fastest of the other servers."""
    return comparison(found, "fastest other server", lambda name: name.split()[0] not in (ENGINE, OURS, BASELINE))


def comparison(found: Found, title: str, wanted: Callable[[str], bool]) -> str:
    """One row for each scenario: memserve and the fastest of the contenders that are wanted."""
    rows = []
    for scenario in SCENARIOS:
        runs = found["runs"].get(scenario.key, {})
        rival = fastest(runs, wanted)
        if OUR_NAME not in runs or rival is None:
            continue
        ratio = ratios(runs[OUR_NAME], runs[rival])
        rates = [ranged(spread(list(by_round(runs[name]).values()))) for name in (OUR_NAME, rival)]
        rows.append([scenario.title, rates[0], titled(found, rival), rates[1], ranged(ratio) if ratio else "-"])
    head = ["scenario", "memserve, a second", title, "its rate, a second", "memserve over it"]
    return table(head, rows) + "\n" if rows else ""


def tables(found: Found) -> list[str]:
    """A summary, then one table for each scenario."""
    plan = found["plan"]
    versions = {key: ", ".join(map(" ".join, peer["versions"].items())) for key, peer in found["peers"].items()}
    parts = [
        "Versions of the others: " + "; ".join(f"{key}: {known}" for key, known in versions.items() if known) + ".\n",
        f"Medians of {plan['rounds']} rounds of {plan['measure_s']:g} s, with the lowest and highest in brackets. The "
        "same load generator runs on the same cores, and only the server under test runs. Ratios are taken within a "
        f"round; they are those of memserve in {OURS_DTYPE}.\n",
        summary(found),
    ]
    if BASELINE in found["peers"]:
        parts.append(comparison(found, "baseline", lambda name: name == f"{BASELINE} {OURS_DTYPE}"))
    for scenario in SCENARIOS:
        if scenario.key in found["runs"] or scenario.key in found["errors"]:
            parts += [f"## {scenario.title}\n", scenario_table(found, scenario.key) + "\n"]
    return parts
