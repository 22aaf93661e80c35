"""Checks of readiness that probes share."""

import asyncio
from collections.abc import Sequence

import pytest

from deployments.calls.readiness import KEPT_S, SharedCheck
from deployments.fair_queue import deadline_of_request


class Check:
    """A check that waits. Attributes: calls, the number of checks; found, which it returns."""

    def __init__(self) -> None:
        self.calls = 0
        self.found: Sequence[str] = ()
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> Sequence[str]:
        self.calls += 1
        self.begun.set()
        assert deadline_of_request.get() is None
        await self.may_end.wait()
        if "error" in self.found:
            raise ValueError
        return self.found


async def test_one_check_answers_all_probes_of_a_second() -> None:
    now = 100.0
    check = Check()
    shared = SharedCheck(check, clock=lambda: now)
    deadline_of_request.set(1.0)
    probes = [asyncio.create_task(shared()) for _ in range(400)]
    await asyncio.sleep(0)
    check.found = ["store: away"]
    check.may_end.set()
    assert await asyncio.gather(*probes) == [["store: away"]] * 400
    check.found = ()
    now += KEPT_S - 0.001
    assert (await shared(), check.calls) == (["store: away"], 1)
    now += 0.001
    assert (await shared(), check.calls) == ((), 2)


async def test_a_probe_that_is_cancelled_ends_no_check() -> None:
    check = Check()
    shared = SharedCheck(check)
    first, second = asyncio.create_task(shared()), asyncio.create_task(shared())
    await check.begun.wait()
    first.cancel()
    check.may_end.set()
    assert (await second, check.calls) == ((), 1)


async def test_a_check_that_fails_is_made_again() -> None:
    check = Check()
    check.may_end.set()
    check.found = ["error"]
    shared = SharedCheck(check)
    for _ in range(2):
        with pytest.raises(ValueError):
            await shared()
    check.found = ()
    assert (await shared(), check.calls) == ((), 3)
