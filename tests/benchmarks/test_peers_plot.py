"""The README's plot of memserve and its peers: its content, and that the committed plot is up to date."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.peers.plot import LABELS, PANELS, bars, main, svg

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "docs/benchmarks/peers.json"
PICTURE = ROOT / "docs/images/peers.svg"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return json.loads(RESULT.read_text())


def test_the_committed_plot_is_made_of_the_committed_result(tmp_path: Path) -> None:
    main([str(RESULT), str(tmp_path / "peers.svg")])
    assert (tmp_path / "peers.svg").read_bytes() == PICTURE.read_bytes()


def test_the_best_server_stands_first(found: dict[str, Any]) -> None:
    for panel in PANELS:
        medians = [figure.median for _, _, figure in bars(found, panel)]
        assert medians == sorted(medians, reverse=not panel.lowest_first)


def test_bars_are_as_long_as_their_medians(found: dict[str, Any]) -> None:
    drawn = [
        float(bar.attrib["width"])
        for bar in ElementTree.fromstring(svg(found)).iter(f"{SVG}rect")
        if bar.attrib["x"] == str(LABELS)
    ]
    for panel in PANELS:
        shown = [figure.median for _, _, figure in bars(found, panel)]
        widths, drawn = drawn[: len(shown)], drawn[len(shown) :]
        for width, median in zip(widths, shown, strict=True):
            assert width == pytest.approx(widths[0] * median / shown[0], abs=0.2)  # the SVG holds tenths of a pixel
    assert drawn == []
