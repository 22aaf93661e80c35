"""The Store deployment: methods are called by name, and background work runs while no call waits."""

import asyncio
import itertools
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from pickletools import genops
from typing import Any

import pytest

import deployments.store_worker
from deployments.errors import DeadlineExceeded
from deployments.store_worker import METHODS
from store import AppendResult, LogUnavailable, SearchResult, Store
from tests.local_app import DIM, LocalApp

CALL = ("a caller", False, None, 1)  # the turn of a call: caller, bulk, seconds until its deadline, cost


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

    monkeypatch.setattr(deployments.store_worker, "_FAILED_S", 0.001)
    monkeypatch.setattr(Store, "background_step", background_step)
    await until(lambda: len(steps) >= 5)


async def test_background_work_yields_to_calls_up_to_a_limit(app: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(deployments.store_worker, "_OVERDUE_S", 0.1)
    monkeypatch.setattr(Store, "background_step", lambda self: bool(done.append("fold")))
    monkeypatch.setattr(Store, "ping", lambda self: (time.sleep(0.01), done.append("call")))

    async def caller() -> None:
        for _ in range(25):  # a second of work in all
            await app.store.deployment.run("ping", CALL)

    await until(lambda: "fold" in done)
    done.clear()
    began = time.monotonic()
    await asyncio.gather(*(caller() for _ in range(4)))
    overdue = (time.monotonic() - began) / 0.1
    assert done.count("call") == 100
    assert 1 <= done.count("fold") <= overdue + 3  # at the end few callers are left, so the store has idle moments


async def test_an_error_of_the_store_is_returned_as_a_value(app: LocalApp) -> None:
    answer = await app.store.run.remote("get", CALL, "default", "nobody", "none")
    assert (type(answer).__name__, answer.param) == ("NotFound", "user_id")


@pytest.mark.parametrize("name", ["close", "_reading", "resident", "__init__", "append", "no_such_method"])
async def test_a_name_outside_the_list_is_refused(app: LocalApp, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        await app.store.run.remote(name, CALL)


async def test_every_name_in_the_list_is_a_method_of_the_store() -> None:
    assert {name for name in METHODS if callable(getattr(Store, name, None))} == METHODS


async def test_a_call_carries_only_the_name_of_its_method(app: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway and a store of two versions must understand each other even if a class or a module was renamed."""
    sent: list[bytes] = []
    dumps = pickle.dumps
    monkeypatch.setattr(pickle, "dumps", lambda value: sent.append(dumps(value)) or dumps(value))
    await app.gateway.user("ann")
    globals_named = [argument for data in sent[:1] for op, argument, _ in genops(data) if "GLOBAL" in op.name]
    turn = ("user:7:defaultann", False, None, 1)
    assert (pickle.loads(sent[0]), globals_named) == ((("user", turn, "default", "ann"), {}), [])


class Gate:
    """The jobs of a store in the order in which its thread runs them. Each waits until the gate is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.ran: list[str] = []
        answers = {"search": [SearchResult([], "exact", 0)], "append_together": [[AppendResult([], 1)]]}
        for method in ("search", "append_together", "list", "export_page", "delete_where", "get"):
            monkeypatch.setattr(Store, method, self._job(method, answers.get(method)))
        monkeypatch.setattr(Store, "background_step", lambda _: False)

    def _job(self, method: str, answer: Any) -> Callable[..., Any]:
        def run(*_: Any, **__: Any) -> Any:
            assert self.open.wait(60.0)
            self.ran.append(method)
            return answer

        run.__name__ = method  # by which it is called
        return run


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("method", ["list", "export_page", "append_together", "delete_where"])
async def test_a_search_waits_for_three_jobs_of_another_user_and_no_more(
    app: LocalApp, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    gate, store = Gate(monkeypatch), app.store.deployment
    busy = ("user:ann", method in ("export_page", "delete_where", "append_together"), None, 13)
    waiting = [asyncio.ensure_future(store.run(method, busy)) for _ in range(1000)]
    await turns()
    search = asyncio.ensure_future(store.search(("user:bob", False, None, 1), []))
    await turns()
    gate.open.set()
    await search
    await asyncio.gather(*waiting)
    assert len(gate.ran) == 1001
    assert gate.ran.index("search") <= 3  # one ran, one had been handed to the thread, and one has an equal turn


async def test_bulk_work_gets_a_share_while_small_jobs_wait(app: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, store = Gate(monkeypatch), app.store.deployment
    small = [asyncio.ensure_future(store.run("get", ("user:bob", False, None, 1))) for _ in range(60)]
    bulk = [asyncio.ensure_future(store.run("export_page", ("user:ann", True, None, 1))) for _ in range(5)]
    await turns()
    gate.open.set()
    await asyncio.gather(*small, *bulk)
    pages = [index for index, method in enumerate(gate.ran) if method == "export_page"]
    assert [b - a for a, b in itertools.pairwise(pages)] == [4] * 4


async def test_a_job_whose_deadline_passes_in_the_queue_is_not_run(
    app: LocalApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, store = Gate(monkeypatch), app.store.deployment
    running = [asyncio.ensure_future(store.run("append_together", ("user:ann", False, None, 1))) for _ in range(2)]
    await turns()
    late = await store.run("append_together", ("user:bob", False, 0.001, 1))
    assert isinstance(late, DeadlineExceeded)
    gate.open.set()
    assert [len(answer) for answer in await asyncio.gather(*running)] == [1, 1]
    assert gate.ran == ["append_together"] * 2


async def test_a_replica_can_be_stopped_twice(tmp_path: Path) -> None:
    """Serve calls `__del__`, and Python calls it again when the object is collected."""
    app = await LocalApp.start(tmp_path)
    for _ in range(2):
        app.store.deployment.__del__()
    await app.model.engine.close()


async def test_requests_whose_deadline_passes_in_the_store_are_answered_504_and_not_made(
    app: LocalApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, store = Gate(monkeypatch), app.store.deployment
    await app.http.post("/embed", json={"inputs": "a request that asks for the model's info"})
    running = [asyncio.ensure_future(store.run("list", CALL)) for _ in range(2)]
    await turns()
    vector, memories = [1.0] * DIM, "/v1/users/bob/memories"
    for method, path, body in (
        ("POST", memories, {"text": "tea", "vector": vector}),
        ("POST", f"{memories}/search", {"vector": vector}),
        ("GET", f"{memories}/1", None),
        ("DELETE", memories, {"filter": {"a": 1}}),
        ("GET", "/v1/users", None),
    ):
        late = await app.http.request(method, path, json=body, headers={"x-request-timeout-ms": "20"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    gate.open.set()
    await asyncio.gather(*running)
    assert gate.ran == ["list", "list"]


async def test_the_longest_wait_of_a_job_can_be_changed_while_a_replica_runs(
    app: LocalApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, store = Gate(monkeypatch), app.store.deployment
    running = [asyncio.ensure_future(store.run("get", CALL)) for _ in range(2)]
    await turns()
    changing = asyncio.ensure_future(store.reconfigure({"queue": {"max_wait_s": 0.001}}))
    await turns()
    assert isinstance(await store.run("get", CALL), DeadlineExceeded)
    gate.open.set()
    assert await asyncio.gather(*running) == [None, None]
    await changing
