"""The README's plot of memserve and its peers, drawn from the JSON of a run. Measures nothing.

    python -m benchmarks.peers.plot docs/benchmarks/peers.json docs/images/peers.svg

The SVG is put together here rather than by matplotlib: it follows the reader's light or dark theme, stays readable at
400 pixels, and is the same bytes for the same result.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.figures import Spread
from benchmarks.peers.scenarios import OURS
from benchmarks.report import number, of_runs

WIDTH, LABELS, BARS = 640, 232, 300  # LABELS: where bars begin; BARS: the length of the longest
ROW, HEADING, MARGIN = 25, 50, 18
STYLE = """
  text { font: 16px system-ui, sans-serif; fill: #1f2937 }
  .title { font-weight: 600 }
  .note { font-size: 15px; fill: #4b5563 }
  .card { fill: #ffffff; stroke: #d1d5db }
  .ours { fill: #2563eb }
  .other { fill: #9ca3af }
  .range { stroke: #1f2937 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e5e7eb }
    .note { fill: #9ca3af }
    .card { fill: #0d1117; stroke: #374151 }
    .ours { fill: #60a5fa }
    .other { fill: #6b7280 }
    .range { stroke: #e5e7eb }
  }
"""


@dataclass(frozen=True)
class Panel:
    """One scenario. `names` are the keys of its runs with what they are called, `figure` the key of a run's figure."""

    scenario: str
    title: str
    figure: str
    unit: str
    names: dict[str, str]
    lowest_first: bool = False

    def written(self, value: float) -> str:
        return f"{number(value, 2)}{self.unit}" if self.unit else f"{value:,.0f}"


SERVERS = {
    "memserve bfloat16": "memserve",
    "litserve bfloat16": "LitServe",
    "infinity bfloat16": "Infinity",
    "plain-batch bfloat16": "plain @serve.batch",
    "lock bfloat16": "a lock, FastAPI",
}
PANELS = (
    Panel("64 x 1", "Embed: 64 clients, texts/s (more is better)", "texts_per_s", "", SERVERS),
    Panel(
        "add",
        "Remember: 64 clients, adds/s (more is better)",
        "texts_per_s",
        "",
        {"memserve bfloat16": "memserve, on disk", "mem0-qdrant bfloat16 called directly": "mem0, as a library"},
    ),
    Panel("1 x 1", "Embed: 1 client alone, ms (less is better)", "p50_ms", " ms", SERVERS, lowest_first=True),
)


def bars(found: dict[str, Any], panel: Panel) -> list[tuple[str, str, Spread]]:
    """(key, label, figure) of each server of a panel, the best first."""
    runs = found["runs"][panel.scenario]
    rows = [(key, label, of_runs(runs[key], panel.figure)) for key, label in panel.names.items()]
    return sorted(rows, key=lambda row: row[2].median if panel.lowest_first else -row[2].median)


def panel_svg(found: dict[str, Any], panel: Panel, top: int) -> tuple[list[str], int]:
    """Its elements, and where it ends."""
    rows = bars(found, panel)
    scale = BARS / max(figure.high for _, _, figure in rows)
    lines = [f'<text class="title" x="{MARGIN}" y="{top + 32}">{escape(panel.title)}</text>']
    y = top + HEADING
    for key, label, figure in rows:
        middle = y + 9
        low, end, high = (LABELS + value * scale for value in (figure.low, figure.median, figure.high))
        kind = "ours" if key.startswith(OURS) else "other"
        lines += [
            f'<text x="{LABELS - 10}" y="{y + 14}" text-anchor="end">{escape(label)}</text>',
            f'<rect class="{kind}" x="{LABELS}" y="{y}" width="{end - LABELS:.1f}" height="18" rx="2"/>',
            f'<path class="range" d="M{low:.1f} {middle}H{high:.1f}"/>',
            f'<text x="{high + 8:.1f}" y="{y + 14}">{panel.written(figure.median)}</text>',
        ]
        y += ROW
    return lines, y


def svg(found: dict[str, Any]) -> str:
    lines: list[str] = []
    y = 0
    for panel in PANELS:
        drawn, y = panel_svg(found, panel, y)
        lines += drawn
    plan = found["plan"]
    note = (
        f"{found['cores']} CPU cores for servers and clients, {found['dtype']}; medians of {plan['rounds']} rounds",
        f"and their range; {found['at'][:10]}, commit {found['commit'][:8]}",
    )
    for n, text in enumerate(note):
        lines.append(f'<text class="note" x="{MARGIN}" y="{y + 30 + 20 * n}">{escape(text)}</text>')
    height = y + 68
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            'role="img" aria-label="Throughput and latency of memserve and other servers">',
            f"<style>{STYLE}</style>",
            f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
            *lines,
            "</svg>\n",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.plot", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="the JSON of `python -m benchmarks.peers`")
    parser.add_argument("picture", type=Path, help="the SVG to write")
    arguments = parser.parse_args(argv)
    arguments.picture.write_text(svg(json.loads(arguments.result.read_text())))


if __name__ == "__main__":
    main()
