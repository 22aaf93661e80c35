"""The gateway's calls to the store: callers take turns and have shares, large calls are bulk work, deadlines travel."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from deployments.calls import resilient
from deployments.calls.store import BULK_MEMORIES, KEY_LOOKUPS, StoreCalls
from deployments.errors import DeadlineExceeded, Overloaded
from deployments.fair_queue import deadline_of_request
from store import Append, AppendResult, Credential, NewMemory, Search, SearchResult, Store

VECTOR = np.ones(4, np.float32)


class StoreHandle:
    """The Store deployment. Calls wait for `gate`. `calls` has the name, turn and arguments of each."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[str, bool, float | None, int], tuple[Any, ...]]] = []
        self.gate = asyncio.Event()
        self.answer: Any = None

    def options(self, **_: Any) -> "StoreHandle":
        return self

    @property
    def run(self) -> Any:
        return _Remote(self, None)

    @property
    def search(self) -> Any:
        return _Remote(self, "search")


class _Remote:
    def __init__(self, handle: StoreHandle, method: str | None) -> None:
        self._handle = handle
        self._method = method

    async def remote(self, *args: Any, **_: Any) -> Any:
        handle = self._handle
        method, sent, *rest = args if self._method is None else (self._method, *args)
        handle.calls.append((method, sent, tuple(rest)))
        await handle.gate.wait()
        if handle.answer is not None:
            return handle.answer
        if method == "search":
            return "replica", [SearchResult([], "exact", 0) for _ in rest[0]]
        if method == "append_together":
            return [[AppendResult([], 1) for _ in call] for call in rest[0]]
        return method


def calls_over(handle: StoreHandle, **options: Any) -> StoreCalls:
    limits = {"partitions": 2, "append_in_flight": 1, "append_memories": 256, "max_wait_s": None, **options}
    return StoreCalls(handle, **limits)  # type: ignore[arg-type]


def memories(user: str, count: int = 1) -> Append:
    return Append("t", user, tuple(NewMemory(f"{n}", "tea", VECTOR) for n in range(count)))


@asynccontextmanager
async def started(*calls: Any) -> AsyncIterator[list[asyncio.Future[Any]]]:
    """Calls that have begun, and are cancelled at the end."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    await turns()
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_the_store_is_told_the_caller_of_a_call_and_whether_it_is_bulk_work() -> None:
    handle = StoreHandle()
    handle.gate.set()
    calls = calls_over(handle)
    await calls.read_user(Store.get, "t", "ann", "1")
    await calls.read_user(Store.list, "t", "ann", limit=BULK_MEMORIES)
    await calls.read_user(Store.list, "t", "ann", limit=1_000)
    await calls.read_user(Store.get_many, "t", "ann", ["1"] * 320)
    await calls.export_page("t", "ann", None)
    await calls.write(Store.update, "t", "ann", "1")
    await calls.write(Store.delete_where, "t", "ann", {})
    await calls.write(Store.erase_user, "t", "ann")
    await calls.write(Store.delete_many, "t", "ann", ["1"] * 32)
    await calls.import_page("t", "ann", [], issued_at=datetime(2026, 1, 1, tzinfo=UTC), epoch=None, by=None)
    ann = "user:1:tann"
    assert [(method, sent) for method, sent, _ in handle.calls] == [
        ("get", (ann, False, None, 1)),
        ("list", (ann, False, None, 7)),
        ("list", (ann, True, None, 63)),
        ("get_many", (ann, True, None, 21)),
        ("export_page", (ann, True, None, 13)),
        ("update", (ann, False, None, 1)),
        ("delete_where", (ann, True, None, 13)),
        ("erase_user", (ann, True, None, 13)),
        ("delete_many", (ann, False, None, 3)),
        ("import_page", (ann, True, None, 1)),
    ]
    handle.calls.clear()
    await calls.read(Store.users, "t")
    ((method, (caller, bulk, _, _), _),) = handle.calls
    assert (method, caller.partition(":")[0], bulk) == ("users", "request", True)


async def test_a_small_append_is_sent_beside_a_large_one() -> None:
    handle = StoreHandle()
    calls = calls_over(handle)
    large, small = [("ann", 200), ("ann", 200)], [("bob", 1), ("carl", BULK_MEMORIES)]
    of_ann, of_others = ([calls.append([memories(*one)]) for one in group] for group in (large, small))
    async with started(*of_ann), started(*of_others):
        sent = [(bulk, cost, [call[0].user_id for call in args[0]]) for _, (_, bulk, _, cost), args in handle.calls]
    assert sent == [(True, 13, ["ann"]), (False, 7, ["bob", "carl"])]


async def test_nobody_is_refused_because_of_what_another_caller_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resilient, "MAX_UNBATCHED_CALLS", 50)
    handle = StoreHandle()
    calls = calls_over(handle, append_memories=1)
    busy = [
        *(calls.read_user(Store.list, "t", "ann") for _ in range(20)),
        *(calls.export_page("t", "ann", None) for _ in range(20)),
        *(calls.write(Store.delete_where, "t", "ann", {}) for _ in range(20)),
        *(calls.append([memories("ann")]) for _ in range(100)),
        *(calls.append([memories("ann", 200)]) for _ in range(10)),
        *(calls.search(Search("t", "ann", VECTOR)) for _ in range(10_000)),
    ]
    async with started(*busy) as of_ann:
        refused = [task for task in of_ann if task.done()]
        assert refused
        assert {type(task.exception()) for task in refused} == {Overloaded}
        others = [
            calls.search(Search("t", "bob", VECTOR)),
            calls.append([memories("bob")]),
            calls.append([memories("bob", 200)]),
            calls.read_user(Store.get, "t", "bob", "1"),
            calls.export_page("t", "bob", None),
            calls.write(Store.update, "t", "bob", "1"),
            calls.read(Store.users, "t"),
        ]
        async with started(*others) as of_bob:
            handle.gate.set()
            answers = await asyncio.gather(*of_bob)
    assert isinstance(answers[0], SearchResult)
    assert answers[3:] == ["get", "export_page", "update", "users"]


async def test_an_export_and_an_import_that_have_begun_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resilient, "MAX_UNBATCHED_CALLS", 4)
    handle = StoreHandle()
    calls = calls_over(handle)
    issued_at = datetime(2026, 1, 1, tzinfo=UTC)
    cursor: Any = object()
    async with started(*(calls.export_page("t", "ann", None) for _ in range(4))):
        for first in (
            calls.export_page("t", "ann", None),
            calls.import_page("t", "ann", [], issued_at=issued_at, epoch=None, by=None),
        ):
            with pytest.raises(Overloaded):
                await first
        later = [
            calls.export_page("t", "ann", cursor),
            calls.import_page("t", "ann", [], issued_at=issued_at, epoch=1, by=None),
        ]
        async with started(*later) as waiting:
            handle.gate.set()
            assert await asyncio.gather(*waiting) == ["export_page", "import_page"]


async def test_searches_of_a_caller_wait_behind_one_call_of_another() -> None:
    handle = StoreHandle()
    calls = calls_over(handle)
    async with started(*(calls.search(Search("t", "ann", VECTOR)) for _ in range(1_000))):
        sent = len(handle.calls)
        async with started(calls.search(Search("t", "bob", VECTOR))) as (search,):
            handle.gate.set()
            await search
            users = [{request.user_id for request in args[0]} for _, _, args in handle.calls[sent : sent + 2]]
    assert any("bob" in found for found in users)


async def test_a_deadline_is_sent_as_the_seconds_that_remain() -> None:
    handle = StoreHandle()
    handle.gate.set()
    calls = calls_over(handle)
    deadline_of_request.set(time.monotonic() + 60.0)
    await calls.read_user(Store.get, "t", "ann", "1")
    await calls.search(Search("t", "ann", VECTOR))
    await calls.append([memories("ann")])
    for _, (_, _, remaining_s, _), _ in handle.calls:
        assert remaining_s is not None
        assert 50.0 < remaining_s <= 60.0  # less than ten seconds have passed
    deadline_of_request.set(time.monotonic() - 1.0)
    handle.calls.clear()
    for late in (calls.search(Search("t", "ann", VECTOR)), calls.append([memories("ann")])):
        with pytest.raises(DeadlineExceeded):
            await late
    assert handle.calls == []


async def test_requests_of_one_call_wait_until_the_latest_of_their_deadlines() -> None:
    handle = StoreHandle()
    calls = calls_over(handle)
    async with started(calls.append([memories("ann")])):
        waiting = []
        for user, deadline in (("bob", 5.0), ("carl", 60.0)):
            deadline_of_request.set(time.monotonic() + deadline)
            waiting.append(asyncio.ensure_future(calls.append([memories(user)])))
            await turns()
        handle.gate.set()
        await asyncio.gather(*waiting)
    _, (_, _, remaining_s, _), args = handle.calls[-1]
    assert [call[0].user_id for call in args[0]] == ["bob", "carl"]
    assert remaining_s is not None
    assert 50.0 < remaining_s <= 60.0


async def test_a_call_that_the_store_dropped_raises_its_error() -> None:
    handle = StoreHandle()
    handle.gate.set()
    handle.answer = DeadlineExceeded("The request waited in the queue until its deadline passed.")
    calls = calls_over(handle)
    for call in (
        calls.search(Search("t", "ann", VECTOR)),
        calls.append([memories("ann")]),
        calls.read_user(Store.get, "t", "ann", "1"),
        calls.write(Store.delete, "t", "ann", "1"),
    ):
        with pytest.raises(DeadlineExceeded):
            await call


async def test_lookups_of_keys_that_wait_share_a_call() -> None:
    handle = StoreHandle()
    calls = calls_over(handle)
    credentials = [Credential(f"{n}", bytes([n])) for n in range(20)]
    async with started(*(calls.find_key(one, False) for one in credentials)):
        assert [(method, *args) for method, _, args in handle.calls] == [("find_keys", credentials)]


async def test_a_key_that_was_found_before_is_looked_up_before_others() -> None:
    handle = StoreHandle()
    calls = calls_over(handle)
    unknown = [Credential(f"no key {n}", b"") for n in range(3 * KEY_LOOKUPS)]
    known = Credential("a", b"a")
    async with started(*(calls.find_key(one, False) for one in unknown)), started(calls.find_key(known, True)):
        assert [len(args[0]) for _, _, args in handle.calls] == [KEY_LOOKUPS, KEY_LOOKUPS]
        handle.answer = [None] * KEY_LOOKUPS
        handle.gate.set()
        await turns()
        assert [len(args[0]) for _, _, args in handle.calls[2:]] == [1, KEY_LOOKUPS]


async def test_a_lookup_has_no_deadline_of_its_request_and_a_caller_of_its_own() -> None:
    handle = StoreHandle()
    handle.gate.set()
    handle.answer = [None]
    deadline_of_request.set(time.monotonic() - 1.0)
    assert await calls_over(handle).find_key(Credential("a", b"a"), True) is None
    ((_, (caller, bulk, remaining_s, _), _),) = handle.calls
    assert (caller.partition(":")[0], bulk, remaining_s) == ("request", False, None)
