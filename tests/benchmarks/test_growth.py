"""The parts of the growth benchmark that need no server, at a small size, and the table of a GPU run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu, growth
from benchmarks.growth import memories, milliseconds, users
from benchmarks.server import Failed


@pytest.fixture
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time a few calls of each kind: each add is a commit to disk."""
    monkeypatch.setattr(growth, "CALLS", 20)


def test_users_are_counted_and_every_figure_is_measured(tmp_path: Path, few_calls: None) -> None:
    part = users([3, 8], tmp_path)
    assert [row["users"] for row in part["rows"]] == [3, 8]
    for row in part["rows"]:
        assert set(row) == {part["x"], *part["figures"]}
        assert all(row[figure] > 0 for figure in part["figures"])


@pytest.mark.slow
def test_memories_are_searched_below_and_above_the_switch(tmp_path: Path, few_calls: None) -> None:
    part = memories([50, 5_500], tmp_path)
    small, large = part["rows"]
    assert (small["memories"], large["memories"]) == (50, 5_500)
    assert small["index_build_s"] is None and large["index_build_s"] > 0
    assert large["index_mb"] > 10 * small["index_mb"]
    assert list(tmp_path.glob("*.db")) == []


def test_calls_are_made_once_each_in_order() -> None:
    made: list[int] = []
    p50, p99 = milliseconds([lambda n=n: made.append(n) for n in range(5)])  # type: ignore[misc]
    assert made == [0, 1, 2, 3, 4]
    assert 0 < p50 <= p99


def test_the_gpu_table_has_the_targets() -> None:
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
    engine = {"kind": "gpu-engine", "matrix_flops_per_s": 4e12, "rows": rows, **where}
    lines = {line[0]: line[1:] for line in gpu.lines_of([engine, {"kind": "gpu-serve", "rows": served, **where}])}
    on = "NVIDIA H100, m, bfloat16, 01234567"
    assert lines["matrix products"] == ["4.00 TFLOP/s", "", on]
    assert lines["engine / `encode`, 8 words"] == ["3.00x", "3x", on]
    assert lines["share of the matrix rate, 256 tokens"] == ["25.0 %", "50 %", on]
    assert lines["durable single adds over HTTP"] == ["400/s at 256 clients, p99 7.00 ms", "10,000/s", on]


def test_the_figures_of_other_counts_stay_if_some_replicas_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def memserve(args: dict[str, Any]) -> Iterator[Any]:
        if args["embedder"]["min_replicas"] > 2:
            raise Failed("memserve did not start:\nOutOfMemoryError: no room")
        yield SimpleNamespace(url="")

    monkeypatch.setattr(growth, "memserve", memserve)
    monkeypatch.setattr(growth, "served", lambda *_: {"texts_per_s": 7.0, "p99_ms": 3.0, "errors": ""})
    rows = growth.embedders([1, 2, 4], {}, growth.Timing(1, 1, 0.1))["rows"]
    assert [row.get("embed_1_texts_per_s") for row in rows] == [7.0, 7.0, None]
    assert rows[2] == {"replicas": 4, "errors": "OutOfMemoryError: no room"}


def test_a_card_without_a_name_has_a_row_too() -> None:
    found = {"gpus": [], "cpu": "a cpu", "commit": "0123456789", "model": "m", "device": "cuda:0", "dtype": "bfloat16"}
    lines = gpu.lines_of([{"kind": "gpu-engine", "matrix_flops_per_s": 4e12, "rows": [], **found}])
    assert lines == [["matrix products", "4.00 TFLOP/s", "", "a card, m, bfloat16, 01234567"]]


@pytest.mark.slow
def test_the_operations_of_a_model_are_those_for_every_token() -> None:
    from transformers import BertConfig, BertModel

    from benchmarks.engine_sweep import matrix_flops

    shape = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    bert = BertModel(BertConfig(**shape, intermediate_size=32, max_position_embeddings=16))
    assert bert.pooler is not None
    a_token = 2 * 3 * (4 * 8 * 8 + 2 * 8 * 32)
    assert matrix_flops([SimpleNamespace(model=bert)], [5, 7]) == 12 * a_token + 4 * 3 * 8 * (25 + 49)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_matrix_rate_counts_two_operations_a_multiply_add(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([0.0, 3.0, 10.0, 11.0])  # seconds: two repeats of four products each, the second the faster
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: next(looks)))
    assert gpu.matrix_rate("cpu", dtype, 64, repeats=2) == 4 * 2 * 64**3
