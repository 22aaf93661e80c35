"""The benchmark of searches by words: its part without a server, and its tables."""

from __future__ import annotations

import pytest

from benchmarks import search_modes


def test_the_store_is_measured_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_modes, "_RESTARTS", 1)
    row = search_modes.in_store(50)
    assert row["memories"] == 50
    assert 0 < row["words_bytes"] < row["vectors_bytes"]
    assert sorted(name for name in row if name.startswith("first_")) == [
        f"first_{mode}_from_{name}_ms" for mode in ("hybrid", "vector") for name in ("log", "snapshot")
    ]
    latency = {"p50_ms": 2.0, "p99_ms": 3.0}
    http = {"memories": 50, "vector": latency, "words": latency, "hybrid": {"p50_ms": 2.5, "p99_ms": 4.0}}
    whole = "\n".join(search_modes.tables({"http": [http], "store": [row], "adds": {"this": latency}}))
    assert "| 50 | 2.00 (3.00) | 2.00 (3.00) | 2.50 (4.00) | 1.25 |" in whole
    assert "## In the store" in whole
    assert "| this | 2.00 (3.00) |" in whole
