"""From the JSON of a run to its tables. Measures nothing."""

from statistics import median
from typing import Any

from benchmarks.figures import Spread, spread
from benchmarks.peers.scenarios import ENGINE, OURS, OURS_DTYPE, SCENARIOS, TARGETS, Target
from benchmarks.report import errors, number, provenance, ranged, table

Found = dict[str, Any]
OUR_NAME = f"{OURS} {OURS_DTYPE}"


def by_round(runs: list[Found]) -> dict[int, float]:
    return {run["round"]: run["texts_per_s"] for run in runs}


def ratios(ours: list[Found], others: list[Found]) -> Spread | None:
    """Our rate over theirs, round by round; None where no round has both."""
    mine, theirs = by_round(ours), by_round(others)
    both = [mine[n] / theirs[n] for n in sorted(mine.keys() & theirs.keys()) if theirs[n]]
    return spread(both) if both else None


def hardest(found: Found, target: Target) -> tuple[str, Spread] | None:
    """The contender that a target is judged by, the fastest of its peer, and our rate over its."""
    ours = found["runs"].get(target.scenario, {}).get(OUR_NAME, [])
    if target.over == OURS:
        rival = {OUR_NAME: found["runs"].get(target.of or target.scenario, {}).get(OUR_NAME, [])}
    else:
        runs = found["runs"].get(target.scenario, {})
        rival = {name: seen for name, seen in runs.items() if name.startswith(target.over)}
    known = [(name, ratio) for name, seen in rival.items() if (ratio := ratios(ours, seen)) is not None]
    return min(known, key=lambda pair: pair[1].median) if known else None


def targets(found: Found) -> str:
    rows = []
    for target in TARGETS:
        judged = hardest(found, target)
        if judged is None:
            continue
        name, ratio = judged
        over = f"{name}, {target.of}" if target.of else ENGINE_TITLE if name == ENGINE else name
        reached = "yes" if ratio.median >= target.at_least else "**no**"
        rows.append([target.scenario, over, f"{target.at_least:g}", ranged(ratio), reached])
    return table(["scenario", "memserve over", "at least", "measured", "reached"], rows) if rows else ""


ENGINE_TITLE = "memserve's bare engine, two processes"


def titled(found: Found, name: str) -> str:
    """What a row is called: the peer, its version, its dtype."""
    if name == ENGINE:
        return ENGINE_TITLE
    key, dtype, *rest = name.split(" ", 2)
    versions = found["peers"][key]["versions"]
    version = f" {next(iter(versions.values()))}" if versions else ""
    shown = "" if key in ("chroma", "qdrant") else f", {dtype}"
    return f"{found['peers'][key]['title']}{version}{shown}" + "".join(f", {part}" for part in rest)


def scenario_table(found: Found, key: str) -> str:
    """Fastest first; who did not run stands last, with the reason."""
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


def markdown(found: Found) -> str:
    plan = found["plan"]
    versions = {key: ", ".join(map(" ".join, peer["versions"].items())) for key, peer in found["peers"].items()}
    parts = [
        "# memserve beside others\n",
        provenance(found),
        "- " + "; ".join(f"{key}: {known}" for key, known in versions.items() if known),
        f"\nMedians of {plan['rounds']} rounds of {plan['measure_s']:g} s, least and greatest in brackets; the same "
        "load generator on the same cores; only the server that is measured runs. Ratios are taken within a round, and "
        f"are those of memserve in {OURS_DTYPE}.\n",
        targets(found),
    ]
    for scenario in SCENARIOS:
        if scenario.key in found["runs"] or scenario.key in found["errors"]:
            parts += [f"\n## {scenario.title}\n", scenario_table(found, scenario.key)]
    return "\n".join(parts) + "\n"
