"""Write the report of a result: Markdown tables and SVG plots from its JSON. Measures nothing.

    python -m benchmarks.report benchmarks/results/FILE.json ...              # writes each report next to its file
    python -m benchmarks.report --publish benchmarks/results/FILE.json ...    # into docs/benchmarks/<kind>.{json,md}

The plots need matplotlib (`pip install -e '.[bench]'`). Without it the report has only its tables and says so. It may
be written again from the same JSON on another machine.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import Growth, Spread, power_law, spread
from benchmarks.machine import ROOT

Found = dict[str, Any]
Line = tuple[str, Sequence[float], Sequence[float]]

PUBLISHED = ROOT / "docs" / "benchmarks"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, thousands with a comma; a dash if there is no value."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def of_runs(runs: Sequence[Found], key: str) -> Spread:
    """Median, lowest and highest of one figure over runs."""
    return spread([run[key] if run[key] is not None else math.nan for run in runs])


def ranged(value: Spread) -> str:
    """`median (lowest to highest)`."""
    if value.low == value.high or math.isnan(value.median):
        return number(value.median)
    return f"{number(value.median)} ({number(value.low)} to {number(value.high)})"


def errors(runs: Iterable[Found]) -> str:
    """`429: 12, ...`, summed over all runs; empty if there was none."""
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
    """Commit, machine, model, settings, versions and command, one line each."""
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


def images(found: Found, titles: dict[str, str]) -> list[str]:
    """Links to the plots of a result, by the ends of their file names; none if they were not drawn."""
    if not found["drawn"]:
        return []
    return [f"![{title}]({found['stem']}{suffix}.svg)\n" for suffix, title in titles.items()]


def suite_report(found: Found) -> list[str]:
    """Closed loop, then open loop."""
    runs = found["plan"]["repeats"]
    parts = images(found, {"-concurrency": "Load by number of clients", "-open-loop": "Latency by offered load"})
    parts += [
        "## Closed loop\n",
        f"Each client sends its next request when it has the answer to the previous one. Medians of {runs} runs of "
        f"{found['plan']['measure_s']:g} s, with the lowest and highest in brackets.\n",
    ]
    rows = []
    for row in sorted(found["closed"], key=lambda row: (row["size"], row["length"] != "short", row["length"])):
        seen = row["runs"]
        latency = [number(of_runs(seen, key).median) for key in ("p50_ms", "p90_ms", "p99_ms")]
        rows.append(
            [cell_name(row), row["clients"], ranged(of_runs(seen, "texts_per_s")), *latency, errors(seen) or "none"]
        )
    head = ["job, texts per request", "clients", "texts/s", "p50 ms", "p90 ms", "p99 ms", "errors"]
    parts.append(table(head, rows))
    parts += [
        "\n## Open loop\n",
        "Poisson arrivals of one short text each, at a share of the closed loop's best rate. Latency counts from the "
        "moment a request was due. A request that is never answered counts with the time it waited. `late` is the "
        "99th percentile of the load generator's own delay.\n",
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
    """Lines of a plot: one for each kind of row that `only` keeps, if it has several points."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if only(row):
            xs, ys = lines.setdefault(cell_name(row) if "size" in row else row["job"], ([], []))
            xs.append(row[of])
            ys.append(of_runs(row["runs"], key).median)
    return [(name, xs, ys) for name, (xs, ys) in lines.items() if len(xs) > 1]


def growth_points(part: Found, key: str) -> list[tuple[float, float]]:
    """The points at which one figure of a part of the growth benchmark has a value."""
    return [(row[part["x"]], row[key]) for row in part["rows"] if row.get(key) and not math.isnan(row[key])]


def growth_rows(part: Found) -> list[tuple[str, Growth]]:
    """The exponent of each figure of one part of the growth benchmark."""
    points = [(key, growth_points(part, key)) for key in part["figures"]]
    return [(key, power_law(*zip(*seen, strict=True))) for key, seen in points if len(seen) > 1]


def growth_report(found: Found) -> list[str]:
    parts = [
        "Each figure is fitted as `y = c * x^exponent` on logarithms. An exponent of 0 means that the figure does not "
        "grow, 1 that it grows in proportion. R² near 0 with an exponent near 0 is noise around a constant.\n"
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
        parts += images(found, {f"-{name}": part["title"]})
    return parts


def reference_table(found: Found) -> str:
    """AgentMem's published ratios and rates, compared with memserve's."""
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
                *_in_process(row),
                f"`python -m benchmarks.reference {row['name']}`",
            ]
        )
    head = ["scenario", "ratio: theirs", "ours", "to", "texts/s: theirs", "ours", "p50, p99 ms"]
    return table([*head, "in process: ratio", "texts/s", "p50, p99 ms", "one command"], rows)


def _in_process(row: Found) -> list[str]:
    """The cells of the runs in process; empty in results that are older than they are."""
    seen = row.get("in_process")
    if not seen:
        return ["-", "-", "-"]
    ratios = row["ratios_in_process"]
    return [
        f"**{number(spread(ratios).median)}x**" if ratios else "1",
        ranged(of_runs(seen, "texts_per_s")),
        f"{number(of_runs(seen, 'p50_ms').median)}, {number(of_runs(seen, 'p99_ms').median)}",
    ]


def plot(path: Path, panels: Sequence[Found]) -> Path:
    """Draw panels side by side: `{title, x, y, lines, log_x?, log_y?, ticks?}`. By default each x has a tick."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "memserve", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for n, (name, xs, ys) in enumerate(panel["lines"]):
            axis.plot(xs, ys, marker="os^Dvx*"[n % 7], markersize=4, linewidth=1.3, label=name)
        ticks = panel.get("ticks") or sorted({x for _, xs, _ in panel["lines"] for x in xs})
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


def scaling_report(found: Found) -> list[str]:
    from benchmarks.scaling.figures import table as scaling_table

    title = "Offered and answered load, latency, waiting tokens and replicas over time"
    return [*images(found, {"": title}), scaling_table(found)]


def scaling_plots(found: Found, folder: Path) -> list[Path]:
    from benchmarks.scaling.figures import draw

    path = folder / f"{found['stem']}.svg"
    draw(found, path)
    return [path]


def peers_report(found: Found) -> list[str]:
    from benchmarks.peers.report import tables

    return tables(found)


def overload_report(found: Found) -> list[str]:
    from benchmarks.overload import table as overload_table

    return [overload_table(found["rows"])]


def fairness_report(found: Found) -> list[str]:
    from benchmarks import fairness

    title = "Latency of a search and an embedding beside bulk work"
    return [fairness.describe_trees(found), *images(found, {"": title}), fairness.table(found)]


def fairness_plots(found: Found, folder: Path) -> list[Path]:
    from benchmarks.fairness import draw

    path = folder / f"{found['stem']}.svg"
    draw(found, path)
    return [path]


def soak_report(found: Found) -> list[str]:
    from benchmarks import soak

    return [*images(found, {"": "Memory of each process over time"}), soak.table(found)]


def soak_plots(found: Found, folder: Path) -> list[Path]:
    from benchmarks.soak import draw

    path = folder / f"{found['stem']}.svg"
    draw(found, path)
    return [path]


def goodput_report(found: Found) -> list[str]:
    from benchmarks.goodput import table as goodput_table

    return [
        "Ten times the rate that the server can sustain, from clients that give up after a second. Refused with 429.\n",
        *images(found, {"": "Answers in time and their latency, before, during and after the overload"}),
        goodput_table(found["rows"]),
    ]


def goodput_plots(found: Found, folder: Path) -> list[Path]:
    from benchmarks.goodput import draw

    return [draw(found["rows"], folder / f"{found['stem']}.svg")]


def engine_report(found: Found) -> list[str]:
    """The sweep of the engine, then the latency of one text alone."""
    head = ["threads", "texts", "budget, tokens", "`encode`, texts/s", "engine, texts/s", "64 callers, texts/s"]
    head += ["engine / `encode`", "the same in CPU time", "padding"]
    keys = ("encode_texts_s", "engine_texts_s", "clients_texts_s", "gain", "cpu_gain")
    rows = [
        [row["threads"], row["mix"], f"{row['budget']:,}", *(number(row[key]) for key in keys), f"{row['padding']:.0%}"]
        for row in found["rows"]
    ]
    alone = [[one["threads"], number(one["bare_ms"]), number(one["engine_ms"])] for one in found["alone"]]
    return [
        table(head, rows) + "\n",
        "## One short text alone\n",
        table(["threads", "forward pass, p50 ms", "engine, p50 ms"], alone),
    ]


def rerank_report(found: Found) -> list[str]:
    """One row for each number format."""
    head = ["dtype", "`predict`, pairs/s", "engine, pairs/s", "engine / `predict`", "the same in CPU time"]
    head += ["4 callers, pairs/s", "largest difference of two scores"]
    keys = ("predict_pairs_s", "engine_pairs_s", "gain", "cpu_gain", "callers_pairs_s")
    return [
        "32 pairs of a query and a text of 20 to 200 words; a random model of the shape of ms-marco-MiniLM-L6-v2.\n",
        table(
            head,
            [
                [row["dtype"], *(number(row[key]) for key in keys), f"{row['largest_difference']:.1g}"]
                for row in found["rows"]
            ],
        ),
    ]


def store_report(found: Found) -> list[str]:
    """One section for each part, because the parts may have been measured at different commits."""
    parts = []
    for name, part in found["figures"].items():
        where = part["where"]
        rows = [[figure, _store_value(value)] for figure, value in part.items() if figure != "where"]
        parts.append(f"## {name.replace('_', ' ').capitalize()}\n")
        parts.append(f"Commit {where['commit'][:7]}, {where['at']}, {where['cpu']}, {where['cores']} cores.\n")
        parts.append(table(["figure", "measured"], rows) + "\n")
    return parts


def _store_value(value: Any) -> str:
    """A figure; a dictionary such as `{"p50_ms": 0.6}` is written `p50 0.6 ms`."""
    if not isinstance(value, dict):
        return f"{value:,}"
    named = [(*key.rsplit("_", 1), one) for key, one in value.items()]
    return ", ".join(f"{name} {one:,g} {unit}" for name, unit, one in named)


def index_report(found: Found) -> list[str]:
    """One row for each size; a cell is `exact / graph`."""
    figures = {
        "p50_us": "search p50, us",
        "cpu_us": "CPU time, us",
        "searches_per_s": "searches/s, two processes",
        "recall": "recall@10",
        "build_s": "to build, s",
        "mb": "memory, MB",
        "restart_ms": "first search after a restart, ms",
    }
    rows = [
        [f"{row['memories']:,}", *(f"{row['exact'][key]:,g} / {row['graph'][key]:,g}" for key in figures)]
        for row in found["rows"]
    ]
    return ["Each cell: exact matrix / HNSW graph.\n", table(["memories", *figures.values()], rows)]


def store_handle_report(found: Found) -> list[str]:
    head = ["handle", "memories", "first search, ms", "p50 ms", "p90 ms", "p99 ms"]
    rows = [
        [row["handle"], f"{row['memories']:,}", number(row.get("cold_ms")), row["p50_ms"], row["p90_ms"], row["p99_ms"]]
        for row in found["rows"]
    ]
    return [table(head, rows)]


def locomo_report(found: Found) -> list[str]:
    from benchmarks.locomo import tables

    return [
        f"{found['conversations']} conversations with {found['memories']:,} memories, of which the best 20 are asked "
        "for. Recall is the share of the memories that answer a question, and hit the share of questions for which at "
        "least one is found.\n",
        *images(found, {"": "Recall and hit rate by the number of results"}),
        *tables(found["rows"]),
    ]


def locomo_plots(found: Found, folder: Path) -> list[Path]:
    from benchmarks.locomo import draw

    return [draw(found["rows"], folder / f"{found['stem']}.svg")]


def search_modes_report(found: Found) -> list[str]:
    from benchmarks.search_modes import tables

    return tables(found)


class Kind(NamedTuple):
    """How a kind of result is reported: the title, the tables, the plots."""

    title: str
    tables: Callable[[Found], list[str]]
    plots: Callable[[Found, Path], list[Path]] | None = None


KINDS = {
    "suite": Kind("memserve under load", suite_report, suite_plots),
    "growth": Kind("Cost as work grows", growth_report, growth_plots),
    "reference": Kind("memserve compared with AgentMem", lambda found: [reference_table(found)]),
    "peers": Kind("memserve compared with other servers", peers_report),
    "scaling": Kind("Replicas that follow the load", scaling_report, scaling_plots),
    "overload": Kind("More load than one embedder can serve", overload_report),
    "fairness": Kind("Small requests beside bulk work", fairness_report, fairness_plots),
    "soak": Kind("Memory under a long, mixed load", soak_report, soak_plots),
    "goodput": Kind("Ten times too many requests", goodput_report, goodput_plots),
    "locomo": Kind("Questions about long conversations", locomo_report, locomo_plots),
    "search-modes": Kind("What searches by words cost", search_modes_report),
    "engine": Kind("The engine without HTTP and Ray", engine_report),
    "rerank": Kind("Reranking by the engine", rerank_report),
    "store": Kind("The store without HTTP and Ray", store_report),
    "index": Kind("The exact index and the graph, by size", index_report),
    "store-handle": Kind("Searches through Serve handles", store_handle_report),
}


def markdown(found: Found) -> str:
    """The report of a result. `stem`: the name of its files; `drawn`: whether its plots were drawn."""
    kind = KINDS[found["kind"]]
    parts = [f"# {kind.title}\n"]
    if "commit" in found:
        parts.append(provenance(found) + "\n")
    if kind.plots and not found["drawn"]:
        parts.append("The plots are missing: matplotlib is not installed here.\n")
    return "\n".join([*parts, *kind.tables(found)]).rstrip() + "\n"


def write(path: Path) -> list[Path]:
    """Write the report of a result next to its JSON. Returns the files."""
    found: Found = {**json.loads(path.read_text()), "stem": path.stem, "drawn": find_spec("matplotlib") is not None}
    plots = KINDS[found["kind"]].plots
    drawn = plots(found, path.parent) if plots and found["drawn"] else []
    report = path.with_suffix(".md")
    report.write_text(markdown(found))
    return [report, *drawn]


def save(found: Found, path: Path) -> list[Path]:
    """Write a result as JSON, and its report next to it. Returns the files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return [path, *write(path)]


def publish(path: Path) -> list[Path]:
    """Copy a result to `docs/benchmarks/<kind>.json`, and write its report there. Returns the files."""
    copy = PUBLISHED / f"{json.loads(path.read_text())['kind']}.json"
    copy.write_text(path.read_text())
    return [copy, *write(copy)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--publish", action="store_true", help="write into docs/benchmarks/, by kind")
    options = parser.parse_args()
    for path in options.results:
        print("\n".join(str(written) for written in (publish if options.publish else write)(path)))


if __name__ == "__main__":
    main()
