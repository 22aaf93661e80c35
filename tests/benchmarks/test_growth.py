"""The parts of the growth benchmark that need no server, in small; and the table of a GPU run."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.growth import memories, milliseconds, users


def test_users_are_counted_and_every_figure_is_measured(tmp_path: Path) -> None:
    part = users([3, 8], tmp_path)
    assert [row["users"] for row in part["rows"]] == [3, 8]
    for row in part["rows"]:
        assert set(row) == {part["x"], *part["figures"]}
        assert all(row[figure] > 0 for figure in part["figures"])


def test_memories_are_searched_below_and_above_the_switch(tmp_path: Path) -> None:
    part = memories([50, 2_500], tmp_path)
    small, large = part["rows"]
    assert (small["memories"], large["memories"]) == (50, 2_500)
    assert small["index_build_s"] is None and large["index_build_s"] > 0
    assert large["index_mb"] > 10 * small["index_mb"]
    assert list(tmp_path.glob("*.db")) == []


def test_calls_are_made_once_each_in_order() -> None:
    made: list[int] = []
    p50, p99 = milliseconds([lambda n=n: made.append(n) for n in range(5)])  # type: ignore[misc]
    assert made == [0, 1, 2, 3, 4]
    assert 0 < p50 <= p99


def test_the_gpu_table_says_what_is_to_be_reached() -> None:
    machine = {"gpus": ["NVIDIA H100"], "cpu": "a cpu", "commit": "0123456789"}
    where: dict[str, Any] = {**machine, "model": "m", "device": "cuda:0", "dtype": "bfloat16"}
    runs = [
        {
            "engine_texts_per_s": 900.0,
            "clients_texts_per_s": 800.0,
            "encode_texts_per_s": 300.0,
            "times_encode": 3.0,
            "flops_per_s": 1e12,
            "share_of_matrix_rate": 0.25,
        }
    ]
    rows = [{"mix": mix, "tokens": 10, "texts": 1, "runs": runs} for mix in gpu.MIXES]
    served = [
        {"job": job, "clients": clients, "runs": [{"texts_per_s": rate, "p99_ms": 7.0}]}
        for job in ("add", "embed")
        for clients, rate in ((64, 100.0), (256, 400.0))
    ]
    engine = {"kind": "engine", "matrix_flops_per_s": 4e12, "rows": rows, **where}
    lines = {line[0]: line[1:] for line in gpu.lines_of([engine, {"kind": "serve", "rows": served, **where}])}
    on = "NVIDIA H100, m, bfloat16, 01234567"
    assert lines["matrix products"] == ["4.00 TFLOP/s", "", on]
    assert lines["engine / `encode`, 8 words"] == ["3.00x", "3x", on]
    assert lines["share of the matrix rate, 256 tokens"] == ["25.0 %", "50 %", on]
    assert lines["durable single adds over HTTP"] == ["400/s at 256 clients, p99 7.00 ms", "10,000/s", on]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_matrix_rate_counts_two_operations_a_multiply_add(dtype: str) -> None:
    assert 1e6 < gpu.matrix_rate("cpu", dtype, 64, repeats=2) < 1e16
