"""The loads in process: what is called, and what counts."""

from typing import Any

import pytest

from benchmarks.in_process import Stores, caller
from benchmarks.load import Load
from benchmarks.reference import SCENARIOS
from memserve.agentmem import Builder


class Recorder:
    """A store that answers at once, and keeps the names of the calls and the number of their texts."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.client = self

    async def embed(self, texts: list[str]) -> None:
        self.calls.append(("embed", len(texts)))

    async def add_for_user(self, text: str, user_id: str) -> None:
        self.calls.append(("add_for_user", 1))

    async def add_batch_optimized(self, texts: list[str], *, user_id: str) -> None:
        self.calls.append(("add_batch_optimized", len(texts)))


@pytest.mark.parametrize(
    ("job", "size", "called"),
    [("add", 1, "add_for_user"), ("add", 50, "add_batch_optimized"), ("embed", 1, "embed")],
)
async def test_each_job_has_its_call(job: str, size: int, called: str) -> None:
    store: Any = Recorder()
    call = caller(store, Load(job=job, size=size))
    for _ in range(2):
        await call()
    assert store.calls == [(called, size)] * 2


def test_a_measurement_counts_the_texts_of_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    with_embedder = Builder.with_embedder
    monkeypatch.setattr(Builder, "with_embedder", lambda self, *_: with_embedder(self, "fake", "fake"))
    with Stores("any") as stores:
        for queued in (True, False):
            load = Load(job="add", size=5, clients=2, warm_s=0.0, measure_s=0.1)
            found = stores.measure(load, queued=queued)
            assert found["texts_per_s"] == pytest.approx(5 * found["requests_per_s"])
            assert found["requests"] >= 1
            assert found["errors"] == {}


def test_scenarios_without_several_models_run_in_process() -> None:
    assert [one.name for one in SCENARIOS if not one.in_process] == ["instances"]
    assert [one.name for one in SCENARIOS if not one.queued] == ["unqueued"]
