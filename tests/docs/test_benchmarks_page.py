"""The tables of docs/benchmarks.md and the figures of README.md are medians of the newest comparison with others."""

import json
import re
import statistics

from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
RUNS = json.loads((ROOT / "docs" / "benchmarks" / "peers.json").read_text())["runs"]

EMBED_PEERS = ("memserve", "litserve", "infinity", "plain-batch", "lock")
EMBED_ROWS = {
    "bfloat16: 64 clients, 1 text": ("64 x 1", "bfloat16"),
    "8 clients, 32 texts (texts/s)": ("8 x 32", "bfloat16"),
    "8 clients, 32 texts of 4 to 200 words (texts/s)": ("8 x 32 mixed", "bfloat16"),
    "1 client, 1 text (p50)": ("1 x 1", "bfloat16"),
    "float32: 64 clients, 1 text": ("64 x 1", "float32"),
    "float32: 8 clients, 32 texts (texts/s)": ("8 x 32", "float32"),
    "float32: 1 client, 1 text (p50)": ("1 x 1", "float32"),
}
STORE_ROWS = {
    "add one text, durable": ("add", ("memserve bfloat16", "mem0-qdrant bfloat16 called directly", None, None)),
    "search by text in 1,000 memories": (
        "search",
        ("memserve bfloat16", "mem0-faiss bfloat16 called directly", None, None),
    ),
    "search by vector in 1,000 memories": (
        "vectors 1,000",
        ("memserve bfloat16", None, "chroma float32", "qdrant float32"),
    ),
    "search by vector in 20,000 memories": (
        "vectors 20,000",
        ("memserve bfloat16", None, "chroma float32", "qdrant float32"),
    ),
}


def _median(scenario: str, server: str, figure: str) -> float:
    return statistics.median(one[figure] for one in RUNS[scenario][server])


def _cells(row: str) -> list[str]:
    """The cells behind a row's name, without emphasis and without what is said in brackets."""
    (line,) = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", PAGE, re.MULTILINE)
    return [re.sub(r"\*\*| \(.*\)", "", cell).strip() for cell in line.split("|")]


def _time(ms: float) -> str:
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms:.0f} ms"


def test_the_table_of_embeddings_is_that_of_the_report() -> None:
    for row, (scenario, dtype) in EMBED_ROWS.items():
        servers = [f"{peer} {dtype}" for peer in EMBED_PEERS]
        if scenario == "1 x 1":
            expected = [f"{_median(scenario, server, 'p50_ms'):.1f} ms" for server in servers]
        else:
            expected = [
                f"{_median(scenario, server, 'texts_per_s'):,.0f}, {_time(_median(scenario, server, 'p99_ms'))}"
                for server in servers
            ]
        assert _cells(row) == expected, row


def test_the_table_of_memories_is_that_of_the_report() -> None:
    for row, (scenario, servers) in STORE_ROWS.items():
        expected = [f"{_median(scenario, server, 'texts_per_s'):,.0f}" if server else "" for server in servers]
        assert _cells(row) == expected, row


def test_the_readme_has_the_figures_of_the_report() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    ours = _median("64 x 1", "memserve bfloat16", "texts_per_s")
    assert f"64 clients get {ours:,.0f} texts/s" in readme
    ratios = [ours / _median("64 x 1", f"{peer} bfloat16", "texts_per_s") for peer in EMBED_PEERS[1:]]
    assert f"{min(ratios):.1f} to {max(ratios):.0f} times as many" in readme
    assert f"add {_median('add', 'memserve bfloat16', 'texts_per_s'):,.0f} memories/s" in readme
    assert f"takes {_median('1 x 1', 'memserve bfloat16', 'p50_ms'):.1f} ms" in readme
    assert f"faster there ({_median('1 x 1', 'lock bfloat16', 'p50_ms'):.1f} ms)" in readme
