"""From a result's JSON to a report in Markdown with plots in SVG. Measures nothing.

    python -m benchmarks.report benchmarks/results/FILE.json ...

The plots need matplotlib (`pip install -e .[bench]`); without it the report has its tables and says so, and may be made
again elsewhere from the same JSON.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.figures import Growth, Spread, power_law, spread

Found = dict[str, Any]
Line = tuple[str, Sequence[float], Sequence[float]]


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, thousands with a comma; a dash where there is no value."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def of_runs(runs: Sequence[Found], key: str) -> Spread:
    """Median and range of one figure."""
    return spread([run[key] if run[key] is not None else math.nan for run in runs])


def ranged(value: Spread) -> str:
    """`median (least to greatest)`."""
    if value.low == value.high or math.isnan(value.median):
        return number(value.median)
    return f"{number(value.median)} ({number(value.low)} to {number(value.high)})"


def errors(runs: Iterable[Found]) -> str:
    """`429: 12, ...`, over all runs; empty where there was none."""
    total: dict[str, int] = {}
    for run in runs:
        for status, count in run["errors"].items():
            total[status] = total.get(status, 0) + count
    return ", ".join(f"{status}: {count}" for status, count in sorted(total.items()))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def provenance(found: Found) -> str:
    """What was measured, on what, in a few lines."""
    tree = {True: ", tree with changes", False: "", None: ", tree unknown"}[found["dirty"]]
    cards = f", {' and '.join(found['gpus'])}" if found["gpus"] else ""
    lines = [
        f"- commit {found['commit'][:12]}{tree}, {found['at']}",
        f"- {found['cpu']}, {found['cores']} cores{cards}; load average before: {found['load_average_before']}",
    ]
    if "model" in found:
        lines.append(f"- {found['model']} on {found['device']} in {found['dtype']}")
    if "settings" in found:
        lines.append(f"- settings: `{json.dumps(found['settings'])}`")
    lines.append("- " + ", ".join(f"{name} {known}" for name, known in found["versions"].items()))
    lines.append(f"- `{found['command']}`")
    return "\n".join(lines)


def cell_name(row: Found) -> str:
    return f"{row['job']}, {row['size']} {row['length']}"


def suite_tables(found: Found) -> list[str]:
    """Closed loop, then open loop."""
    runs = found["plan"]["repeats"]
    parts = [
        "## Closed loop\n",
        f"A client sends its next request when it has the answer to its last one. Medians of {runs} runs of "
        f"{found['plan']['measure_s']:g} s, least and greatest in brackets.\n",
    ]
    rows = []
    for row in sorted(found["closed"], key=lambda row: (row["size"], row["length"] != "short", row["length"])):
        seen = row["runs"]
        latency = [number(of_runs(seen, key).median) for key in ("p50_ms", "p90_ms", "p99_ms")]
        rows.append(
            [cell_name(row), row["clients"], ranged(of_runs(seen, "texts_per_s")), *latency, errors(seen) or "none"]
        )
    head = ["job, texts a request", "clients", "texts/s", "p50 ms", "p90 ms", "p99 ms", "errors"]
    parts.append(table(head, rows))
    parts += [
        "\n## Open loop\n",
        "Poisson arrivals of one short text each, at a share of the closed loop's best rate; latency counts from the "
        "moment a request was due, and what is never answered counts with the time it waited. `late` is how late "
        "the load generator itself was, 99 % of the time.\n",
    ]
    rows = []
    for row in found["open"]:
        seen = row["runs"]
        latency = [number(of_runs(seen, key).median) for key in ("p50_ms", "p90_ms", "p99_ms", "late_p99_ms")]
        answered = ranged(of_runs(seen, "requests_per_s"))
        rows.append(
            [row["job"], f"{row['share']:.0%}", number(row["rate"]), answered, *latency, errors(seen) or "none"]
        )
    head = ["job", "load", "offered/s", "answered/s", "p50 ms", "p90 ms", "p99 ms", "late ms", "errors"]
    parts.append(table(head, rows))
    return parts


def series(rows: Iterable[Found], of: str, key: str, only: Callable[[Found], bool]) -> list[Line]:
    """Lines of a plot: one for each kind of row that `only` keeps and that has several points."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if only(row):
            xs, ys = lines.setdefault(cell_name(row) if "size" in row else row["job"], ([], []))
            xs.append(row[of])
            ys.append(of_runs(row["runs"], key).median)
    return [(name, xs, ys) for name, (xs, ys) in lines.items() if len(xs) > 1]


def growth_points(part: Found, key: str) -> list[tuple[float, float]]:
    """Where one figure of a part of the growth benchmark has a value."""
    return [(row[part["x"]], row[key]) for row in part["rows"] if row.get(key) and not math.isnan(row[key])]


def growth_rows(part: Found) -> list[tuple[str, Growth]]:
    """The exponent of each figure of one part of the growth benchmark."""
    points = [(key, growth_points(part, key)) for key in part["figures"]]
    return [(key, power_law(*zip(*seen, strict=True))) for key, seen in points if len(seen) > 1]


def growth_tables(found: Found) -> list[str]:
    parts = [
        "Each figure is fitted as `y = c * x^exponent` on logarithms: 0 costs nothing more, 1 grows in proportion. "
        "R² near 0 with an exponent near 0 is noise around a constant.\n"
    ]
    for name, part in found["parts"].items():
        failed = ["errors"] if any(row.get("errors") for row in part["rows"]) else []
        head = [part["x"], *part["figures"], *failed]
        rows = [
            [f"{row[part['x']]:,}", *(number(row.get(key)) for key in part["figures"]), *(row[key] for key in failed)]
            for row in part["rows"]
        ]
        fits = [[key, f"{fit.exponent:+.2f}", f"{fit.r_squared:.2f}"] for key, fit in growth_rows(part)]
        parts += [f"## {part['title']}\n", table(head, rows) + "\n", table(["figure", "exponent", "R²"], fits) + "\n"]
        parts += [f"![{part['title']}]({found['stem']}-{name}.svg)\n"]
    return parts


def reference_table(found: Found) -> str:
    """Ratios first, theirs beside ours."""
    rows = []
    for row in found["scenarios"]:
        seen = row["runs"]
        ours = spread(row["ratios"]) if row["ratios"] else None
        rows.append(
            [
                row["title"],
                row["their_ratio"] or "-",
                f"**{number(ours.median)}x** ({number(ours.low)} to {number(ours.high)})" if ours else "1",
                row["base"] or "",
                row["theirs"] or "-",
                ranged(of_runs(seen, "texts_per_s")),
                f"{number(of_runs(seen, 'p50_ms').median)}, {number(of_runs(seen, 'p99_ms').median)}",
                f"`python -m benchmarks.reference {row['name']}`",
            ]
        )
    head = ["scenario", "ratio: theirs", "ours", "to", "texts/s: theirs", "ours", "p50, p99 ms", "one command"]
    return table(head, rows)


def plot(path: Path, panels: Sequence[Found]) -> Path:
    """Draw panels side by side: `{title, x, y, lines, log_x?, log_y?}`."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "memserve", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for n, (name, xs, ys) in enumerate(panel["lines"]):
            axis.plot(xs, ys, marker="os^Dvx*"[n % 7], markersize=4, linewidth=1.3, label=name)
        ticks = sorted({x for _, xs, _ in panel["lines"] for x in xs})
        if panel.get("log_x"):
            axis.set_xscale("log")
        if panel.get("log_y"):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        else:
            axis.set_ylim(bottom=0)
        axis.minorticks_off()
        axis.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
        axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def suite_plots(found: Found, folder: Path) -> list[Path]:
    def short(row: Found) -> bool:
        return bool(row["length"] == "short")

    def single(row: Found) -> bool:
        return short(row) and row["size"] == 1

    def panel(rows: Iterable[Found], of: str, key: str, only: Callable[[Found], bool], **texts: Any) -> Found:
        return {"lines": series(rows, of, key, only), **texts}

    closed, opened = found["closed"], [{**row, "percent": row["share"] * 100} for row in found["open"]]
    clients: Found = {"x": "clients", "log_x": True}
    latency: Found = {"y": "ms", "log_y": True}
    share: Found = {"x": "offered load, % of the closed loop's best", **latency}
    return [
        plot(
            folder / f"{found['stem']}-concurrency.svg",
            [
                panel(closed, "clients", "texts_per_s", short, title="Throughput", y="texts/s", **clients),
                panel(closed, "clients", "p50_ms", single, title="Latency, p50", **clients, **latency),
                panel(closed, "clients", "p99_ms", single, title="Latency, p99", **clients, **latency),
            ],
        ),
        plot(
            folder / f"{found['stem']}-open-loop.svg",
            [
                panel(opened, "percent", f"p{q}_ms", lambda _: True, title=f"Open loop, p{q}", **share)
                for q in (50, 90, 99)
            ],
        ),
    ]


def growth_plots(found: Found, folder: Path) -> list[Path]:
    paths = []
    for name, part in found["parts"].items():
        fits = dict(growth_rows(part))
        by_unit: dict[str, list[Line]] = {}
        for key, fit in fits.items():
            xs, ys = zip(*growth_points(part, key), strict=True)
            unit = "a second" if key.endswith("_per_s") else key.rsplit("_", 1)[-1].replace("mb", "MB")
            by_unit.setdefault(unit, []).append((f"{key}: {fit.exponent:+.2f}", xs, ys))
        panels = [
            {"title": part["title"], "x": part["x"], "y": unit, "lines": lines, "log_x": True, "log_y": True}
            for unit, lines in by_unit.items()
        ]
        paths.append(plot(folder / f"{found['stem']}-{name}.svg", panels))
    return paths


def write(path: Path) -> list[Path]:
    """Write the report of a result beside it. Returns the files."""
    found: Found = {**json.loads(path.read_text()), "stem": path.stem}
    drawn: list[Path] = []
    plots = {"suite": suite_plots, "growth": growth_plots}.get(found["kind"])
    without = plots is not None and find_spec("matplotlib") is None
    if plots is not None and not without:
        drawn = plots(found, path.parent)
    title = {"suite": "memserve under load", "growth": "Cost as work grows", "reference": "Beside AgentMem"}
    parts = [f"# {title[found['kind']]}\n", provenance(found) + "\n"]
    if without:
        parts.append("No plots: matplotlib is not installed here.\n")
    if found["kind"] == "suite":
        parts += [f"![{file.stem}]({file.name})\n" for file in drawn] + suite_tables(found)
    elif found["kind"] == "growth":
        parts += growth_tables(found)
    else:
        parts.append(reference_table(found))
    report = path.with_suffix(".md")
    report.write_text("\n".join(parts) + "\n")
    return [report, *drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    for path in parser.parse_args().results:
        print("\n".join(str(written) for written in write(path)))


if __name__ == "__main__":
    main()
