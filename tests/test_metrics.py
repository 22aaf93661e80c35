"""The metric of the event loop's lag."""

import asyncio
from typing import Any

import pytest

from deployments import metrics
from deployments.metrics import EventLoopLag


async def test_the_lag_is_the_longest_of_each_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, late_s = 0.0, iter([0.0] * 7 + [0.5] + [0.25] * 12 + [0.0] * 20)
    recorded: list[float] = []

    class Recorder:
        def __init__(self, name: str, _: str) -> None:
            assert name == "memserve_event_loop_lag_seconds"

        def set(self, value: float) -> None:
            recorded.append(value)

    async def sleep(delay_s: float) -> None:
        nonlocal now
        late = next(late_s, None)
        if late is None:
            raise asyncio.CancelledError
        now += delay_s + late

    monkeypatch.setattr(metrics, "Gauge", Recorder)
    lag = EventLoopLag(clock=lambda: now)
    lag.start()
    lag.start()
    task: Any = lag._task
    monkeypatch.setattr(metrics.asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert recorded == pytest.approx([0.5, 0.0])
