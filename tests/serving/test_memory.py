"""Replicas return freed memory to the system."""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import psutil
import pytest

from deployments.serving import launch, memory, plan


def kept_after_freeing(start: Callable[[], object]) -> tuple[int, int]:
    """How much this process grows by 200 MB of small blocks, in MB: once they are freed, and at least a while later."""
    memory._INTERVAL_S = 0.05
    process = psutil.Process()
    before = process.memory_info().rss
    blocks = [bytes(50_000) for _ in range(4000)]
    last = bytes(50_000)  # the end of the heap stays in use
    blocks.clear()
    freed = process.memory_info().rss - before
    start()
    deadline = time.monotonic() + 20
    while (later := process.memory_info().rss - before) > 20_000_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(last) == 50_000
    return freed // 1_000_000, later // 1_000_000


def test_freed_memory_is_returned() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        freed, later = pool.submit(kept_after_freeing, memory.return_freed_memory_regularly).result()
    assert freed > 150
    assert later < 20


def test_a_process_has_one_such_thread() -> None:
    thread = memory.return_freed_memory_regularly()
    assert thread is memory.return_freed_memory_regularly()
    assert thread is not None and thread.daemon


def test_servers_and_shells_get_the_variables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in memory.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert plan._environment().items() >= memory.VARIABLES.items()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    assert plan._environment()["MALLOC_ARENA_MAX"] == "8"
    launch.print_environment()
    assert capsys.readouterr().out.count("export MALLOC_ARENA_MAX=2\n") == 1
