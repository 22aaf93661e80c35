"""The Store deployment: methods are called by name, and background work runs while no call waits."""

import asyncio
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from pickletools import genops

import pytest

import deployments.store
from deployments.store import METHODS
from store import LogUnavailable, Store
from tests.local_app import LocalApp


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("error", [LogUnavailable("the disk is full"), MemoryError(), RuntimeError("hnswlib")])
async def test_background_work_continues_after_a_step_that_failed(
    app: LocalApp, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    steps: list[int] = []

    def background_step(self: Store) -> bool:
        steps.append(len(steps))
        if len(steps) == 2:
            raise error
        return len(steps) < 4

    monkeypatch.setattr(deployments.store, "_FAILED_S", 0.001)
    monkeypatch.setattr(Store, "background_step", background_step)
    await until(lambda: len(steps) >= 5)


async def test_background_work_yields_to_calls_up_to_a_limit(app: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(deployments.store, "_OVERDUE_S", 0.1)
    monkeypatch.setattr(Store, "background_step", lambda self: bool(done.append("fold")))
    monkeypatch.setattr(Store, "ping", lambda self: (time.sleep(0.01), done.append("call")))

    async def caller() -> None:
        for _ in range(25):  # a second of work in all
            await app.store.deployment.run("ping")

    await until(lambda: "fold" in done)
    done.clear()
    began = time.monotonic()
    await asyncio.gather(*(caller() for _ in range(4)))
    overdue = (time.monotonic() - began) / 0.1
    assert done.count("call") == 100
    assert 1 <= done.count("fold") <= overdue + 3  # at the end few callers are left, so the store has idle moments


async def test_an_error_of_the_store_is_returned_as_a_value(app: LocalApp) -> None:
    answer = await app.store.run.remote("get", "default", "nobody", "none")
    assert (type(answer).__name__, answer.param) == ("NotFound", "user_id")


@pytest.mark.parametrize("name", ["close", "_reading", "resident", "__init__", "append", "no_such_method"])
async def test_a_name_outside_the_list_is_refused(app: LocalApp, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        await app.store.run.remote(name)


async def test_every_name_in_the_list_is_a_method_of_the_store() -> None:
    assert {name for name in METHODS if callable(getattr(Store, name, None))} == METHODS


async def test_a_call_carries_only_the_name_of_its_method(app: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway and a store of two versions must understand each other even if a class or a module was renamed."""
    sent: list[bytes] = []
    dumps = pickle.dumps
    monkeypatch.setattr(pickle, "dumps", lambda value: sent.append(dumps(value)) or dumps(value))
    await app.gateway.user("ann")
    globals_named = [argument for data in sent[:1] for op, argument, _ in genops(data) if "GLOBAL" in op.name]
    assert (pickle.loads(sent[0]), globals_named) == ((("user", "default", "ann"), {}), [])


async def test_a_replica_can_be_stopped_twice(tmp_path: Path) -> None:
    """Serve calls `__del__`, and Python calls it again when the object is collected."""
    app = await LocalApp.start(tmp_path)
    for _ in range(2):
        app.store.deployment.__del__()
    await app.model.engine.close()
