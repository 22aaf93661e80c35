"""The batcher: each call gets its own results, exactly once, in any interleaving. No sleep."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.batcher import Batcher, oldest_call
from deployments.errors import DeadlineExceeded, Overloaded, ShuttingDown
from deployments.fair_queue import Turn

CASES = 10_000


async def turns(count: int = 4) -> None:
    """Let the event loop run what is ready. From a submission to its batch, a batcher needs at most three turns."""
    for _ in range(count):
        await asyncio.sleep(0)


class Device:
    """A `run` that doubles each item. Its batches finish, or fail, when the test says so."""

    def __init__(self) -> None:
        self.started: list[list[int]] = []
        self.gates: list[asyncio.Future[None]] = []
        self.most_at_once = 0
        self.at_once = 0

    async def __call__(self, items: list[int]) -> Sequence[int | Exception]:
        gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started.append(list(items))
        self.gates.append(gate)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await gate
        finally:
            self.at_once -= 1
        return [item * 2 for item in items]

    async def finish(self, index: int = -1, error: Exception | None = None) -> None:
        gate = self.gates[index]
        if error is None:
            gate.set_result(None)
        else:
            gate.set_exception(error)
        await turns()


def start(submission: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(submission)


async def test_an_item_alone_runs_at_once_and_items_that_arrive_meanwhile_share_the_next_batch() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=10)
    first = start(batcher.submit(1))
    await turns()
    assert device.started == [[1]]
    others = [start(batcher.submit(item)) for item in (2, 3, 4)]
    await turns()
    assert device.started == [[1]]
    assert (batcher.queued, batcher.queued_cost, batcher.running) == (3, 3, 1)
    await device.finish()
    assert device.started == [[1], [2, 3, 4]]
    await device.finish()
    assert [await task for task in (first, *others)] == [2, 4, 6, 8]
    assert (batcher.queued, batcher.queued_cost, batcher.running) == (0, 0, 0)


async def test_items_submitted_in_one_turn_of_the_loop_share_a_batch() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=2, budget=10)
    tasks = [start(batcher.submit(item)) for item in range(5)]
    await turns()
    assert device.started == [[0, 1, 2, 3, 4]]
    await device.finish()
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8]


async def test_a_large_call_is_split_and_its_results_come_in_order() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=2, budget=3)
    task = start(batcher.submit_all(range(8)))
    await turns()
    assert device.started == [[0, 1, 2], [3, 4, 5]]
    await device.finish(1)
    await device.finish(0)
    await device.finish(2)
    assert await task == [0, 2, 4, 6, 8, 10, 12, 14]
    assert device.most_at_once == 2


async def test_an_item_over_the_budget_runs_alone() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=3, budget=5, cost=lambda item: item)
    start(batcher.submit_all([2, 9, 3]))
    await turns()
    assert device.started == [[2], [9], [3]]
    await batcher_ended(batcher, device)


async def test_oldest_call_runs_call_by_call_in_the_order_of_arrival_whatever_the_budget() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=2, select=oldest_call)
    tasks = [start(batcher.submit_all(items)) for items in ([1, 2, 3], [4], [5, 6])]
    await turns()
    assert device.started == [[1, 2, 3]]
    assert (batcher.queued, batcher.queued_cost) == (3, 3)
    for _ in range(3):
        await device.finish()
    assert device.started == [[1, 2, 3], [4], [5, 6]]
    assert [await task for task in tasks] == [[2, 4, 6], [8], [10, 12]]


async def test_the_items_of_a_cancelled_call_leave_the_queue() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=10)
    first = start(batcher.submit(1))
    await turns()
    gone, stays = start(batcher.submit_all([2, 3])), start(batcher.submit(4))
    await turns()
    gone.cancel()
    await turns()
    assert (batcher.queued, batcher.queued_cost) == (1, 1)
    await device.finish()
    assert device.started == [[1], [4]]
    await device.finish()
    assert [await first, await stays] == [2, 8]
    assert gone.cancelled()


async def test_with_bisect_only_the_poisoned_item_of_64_fails() -> None:
    batches: list[int] = []

    async def run(items: list[int]) -> list[int]:
        batches.append(len(items))
        if 37 in items:
            raise ValueError("poison")
        return [item * 2 for item in items]

    batcher = Batcher(run, in_flight=1, budget=64, bisect=True)
    answers = await batcher.submit_all(range(64))
    assert [item for item, answer in enumerate(answers) if isinstance(answer, ValueError)] == [37]
    assert all(answer == item * 2 for item, answer in enumerate(answers) if item != 37)
    assert batches == [64, 32, 32, 16, 8, 4, 4, 2, 1, 1, 2, 8, 16]


async def test_without_bisect_the_whole_batch_gets_the_error() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=10)
    tasks = [start(batcher.submit(item)) for item in range(3)]
    await turns()
    await device.finish(0, KeyError("down"))
    assert [type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == [KeyError] * 3


async def test_a_wrong_number_of_results_is_an_error_for_all() -> None:
    async def run(items: list[int]) -> list[int]:
        return items[1:]

    batcher = Batcher(run, in_flight=1, budget=10)
    with pytest.raises(RuntimeError, match="1 results for 2 items"):
        raise (await batcher.submit_all([1, 2]))[0]  # type: ignore[misc]


async def test_a_call_over_the_limit_is_refused_as_a_whole_with_the_measured_drain_time() -> None:
    now = [0.0]
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=4, max_queued=6, clock=lambda: now[0])
    start(batcher.submit_all([0] * 4))
    await turns()
    now[0] = 2.0
    await device.finish()  # 4 in 2 s: two a second
    assert batcher.drain_rate == 2.0
    start(batcher.submit_all([1] * 4))
    await turns()
    start(batcher.submit_all([2] * 6, Turn("a")))
    await turns()
    for caller, many in (("a", 1), ("a", 50), ("b", 7)):
        with pytest.raises(Overloaded) as refused:
            await batcher.submit_all([3] * many, Turn(caller))
        assert refused.value.retry_after_s == 5.0  # 4 running and 6 waiting, at two a second
    assert batcher.queued == 6
    await batcher_ended(batcher, device)


async def test_a_caller_with_nothing_waiting_is_admitted_up_to_twice_the_limit() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=1, max_queued=6)
    start(batcher.submit_all([0] * 7, Turn("a")))
    await turns()
    assert batcher.queued == 6
    for caller in "bcdefg":
        start(batcher.submit(1, Turn(caller)))
        await turns()
    assert batcher.queued == 12
    for caller in ("a", "b", "h"):
        with pytest.raises(Overloaded):
            await batcher.submit(2, Turn(caller))
    await batcher_ended(batcher, device)


async def test_a_full_queue_admits_a_caller_up_to_its_share_of_it() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=1, max_queued=6)
    start(batcher.submit_all([0] * 6, Turn("a")))
    await turns()
    start(batcher.submit_all([1, 1], Turn("b")))
    await turns()
    assert batcher.queued == 7
    start(batcher.submit(1, Turn("b")))  # the third of 6 / 2
    await turns()
    for caller in ("a", "b"):
        with pytest.raises(Overloaded):
            await batcher.submit(2, Turn(caller))
    start(batcher.submit(2, Turn("b").after_begin()))
    await turns()
    assert batcher.queued == 9
    await batcher_ended(batcher, device)


async def test_urgent_and_bulk_work_are_admitted_apart() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=1, max_queued=2)
    for bulk in (True, False):
        start(batcher.submit_all([0] * 4, Turn("a", bulk)))
        await turns()
    assert batcher.queued == 7
    for bulk in (True, False):
        with pytest.raises(Overloaded):
            await batcher.submit(1, Turn("a", bulk))
    await batcher_ended(batcher, device)


async def test_callers_take_turns_and_a_lone_item_need_not_wait_for_the_items_of_another_caller() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=2)
    start(batcher.submit_all(range(10), Turn("a")))
    await turns()
    assert device.started == [[0, 1]]
    start(batcher.submit_all(range(10, 14), Turn("b")))
    start(batcher.submit(20))
    await turns()
    for _ in range(7):
        await device.finish()
    assert device.started == [[0, 1], [2, 10], [20, 3], [11, 4], [12, 5], [13, 6], [7, 8], [9]]
    await batcher_ended(batcher, device)


async def test_connections_of_one_caller_have_the_share_of_one_caller() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=2)
    start(batcher.submit(0))
    await turns()
    for connection in range(10):
        start(batcher.submit_all([100 + connection, 200 + connection], Turn("a")))
    start(batcher.submit_all(range(1, 7), Turn("b")))
    await turns()
    for _ in range(6):
        await device.finish()
    assert device.started[1:] == [[100, 1], [200, 2], [101, 3], [201, 4], [102, 5], [202, 6]]
    await batcher_ended(batcher, device)


async def test_a_batch_of_urgent_items_goes_first_and_is_not_filled_up_with_bulk() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=4)
    start(batcher.submit_all(range(10), Turn("bulk", True)))
    await turns()
    start(batcher.submit(20))
    await turns()
    await device.finish()
    await device.finish()
    assert device.started == [[0, 1, 2, 3], [20], [4, 5, 6, 7]]
    await batcher_ended(batcher, device)


async def test_a_bulk_batch_follows_an_urgent_batch_that_left_no_urgent_item() -> None:
    """Two lone callers that take turns do not hold bulk work up, and each waits for one bulk batch."""
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=4)
    start(batcher.submit_all(range(20), Turn("bulk", True)))
    await turns()
    for number in range(100, 103):
        start(batcher.submit(number, Turn("one")))  # arrives while bulk runs
        await turns()
        await device.finish()
        start(batcher.submit(number + 100, Turn("other")))  # arrives while the first runs
        await turns()
        await device.finish()
    assert [sorted(batch) for batch in device.started] == [
        [0, 1, 2, 3],
        *([100], [4, 5, 6, 7]),
        *([101, 200], [8, 9, 10, 11]),
        *([102, 201], [12, 13, 14, 15]),
    ]
    await batcher_ended(batcher, device)


async def test_bulk_gets_a_quarter_of_the_work_while_urgent_items_wait() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=2)
    start(batcher.submit_all(["bulk"] * 20, Turn("bulk", True)))  # type: ignore[list-item]
    start(batcher.submit_all(["urgent"] * 20, Turn("lone")))  # type: ignore[list-item]
    await turns()
    while batcher.running:
        await device.finish()
    ran: list[Any] = [batch[0] for batch in device.started]
    assert ran == ["urgent", "urgent", "urgent", "bulk"] * 3 + ["urgent"] + ["bulk"] * 7


async def test_separate_slots_start_an_urgent_batch_while_bulk_batches_run() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=2, prefetch=1, prefetch_at=2, separate_slots=True)
    start(batcher.submit_all(range(10), Turn("bulk", True)))
    await turns()
    assert device.started == [[0, 1], [2, 3]]
    start(batcher.submit(20))
    await turns()
    start(batcher.submit(21))
    await turns()
    assert device.started == [[0, 1], [2, 3], [20], [21]]
    tasks = [start(batcher.submit(number)) for number in range(30, 47)]
    for _ in tasks:
        await turns()
    started = [[0, 1], [2, 3], [20], [21], *([30 + n, 31 + n] for n in range(0, 12, 2))]
    assert device.started == started  # eight urgent batches for one that may run alone
    assert (batcher.running, batcher.queued) == (10, 6 + 5)
    await batcher_ended(batcher, device)


async def test_separate_slots_collect_urgent_items_while_no_bulk_batch_runs() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=2, prefetch=1, prefetch_at=2, separate_slots=True)
    for number in range(4):
        start(batcher.submit(number))
        await turns()
    assert device.started == [[0], [1, 2]]
    assert (batcher.running, batcher.queued) == (2, 1)
    await batcher_ended(batcher, device)


async def test_an_item_past_its_deadline_never_runs() -> None:
    now = [10.0]
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=4, clock=lambda: now[0])
    with pytest.raises(DeadlineExceeded):
        await batcher.submit(0, Turn(deadline=10.0))
    first = start(batcher.submit(1, Turn(deadline=12.0)))
    await turns()
    late, timely = (
        start(batcher.submit_all([2, 3], Turn("a", False, 12.0))),
        start(batcher.submit(4, Turn(deadline=99))),
    )
    await turns()
    now[0] = 12.0
    await device.finish()
    assert device.started == [[1], [4]]
    assert [type(error) for error in await late] == [DeadlineExceeded] * 2
    await device.finish()
    assert (await first, await timely) == (2, 8)  # what runs is not dropped
    assert batcher.queued == 0


async def test_an_item_that_waits_longer_than_the_limit_never_runs() -> None:
    now = [10.0]
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=4, max_wait_s=3.0, clock=lambda: now[0])
    start(batcher.submit(1))
    await turns()
    waits = start(batcher.submit(2, Turn(deadline=99.0)))
    await turns()
    now[0] = 12.0
    batcher.reconfigure(in_flight=1, budget=1, max_wait_s=30.0)
    later = start(batcher.submit(3))
    await turns()
    now[0] = 13.0
    await device.finish()
    assert isinstance(waits.exception(), DeadlineExceeded)
    assert device.started == [[1], [3]]
    await device.finish()
    assert await later == 6


async def test_a_caller_is_answered_when_the_deadline_passes_though_nothing_finishes() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=4)
    start(batcher.submit(1))
    await turns()
    waits = start(batcher.submit(2, Turn(deadline=time.monotonic() + 60.0)))
    with pytest.raises(DeadlineExceeded):  # the earlier deadline is that of the later item
        await batcher.submit(3, Turn(deadline=time.monotonic() + 0.001))
    assert (batcher.queued, device.started) == (1, [[1]])
    waits.cancel()
    await turns()
    assert batcher.queued == 0
    await batcher_ended(batcher, device)
    await batcher.close()


async def give_up(batcher: Batcher[int, int], now: list[float], count: int, after_s: float) -> None:
    """Queue items while a batch runs, and cancel them after a time."""
    impatient = [start(batcher.submit(1000 + n)) for n in range(count)]
    await turns()
    now[0] += after_s
    for task in impatient:
        task.cancel()
    await asyncio.gather(*impatient, return_exceptions=True)
    await turns()


async def finish_after(device: Device, now: list[float], seconds: float) -> None:
    """Let the running batch take some time."""
    now[0] += seconds
    await device.finish()


async def test_one_call_of_many_items_that_gives_up_does_not_change_the_order() -> None:
    now, device = [0.0], Device()
    batcher = Batcher(device, in_flight=1, budget=2, clock=lambda: now[0])
    running = [start(batcher.submit(0))]
    await turns()
    running += [start(batcher.submit(1))]
    large = start(batcher.submit_all(range(100, 300)))
    await turns()
    now[0] = 1.0
    large.cancel()
    await turns()
    running += [start(batcher.submit(n)) for n in (2, 3)]
    await turns()
    await device.finish()
    assert device.started == [[0], [1, 2]]
    await batcher_ended(batcher, device)
    await asyncio.gather(*running)


async def test_if_callers_give_up_fresh_items_are_served_before_items_that_waited_long() -> None:
    now, device = [0.0], Device()
    batcher = Batcher(device, in_flight=1, budget=2, clock=lambda: now[0])
    running = [start(batcher.submit(n)) for n in range(-20, 0)]
    await turns()
    for _ in range(10):
        await finish_after(device, now, 0.01)  # 200 items a second
    del device.started[:]
    running += [start(batcher.submit(0))]
    await turns()
    await give_up(batcher, now, count=20, after_s=1.0)
    running += [start(batcher.submit(n)) for n in (1, 2, 3)]
    await turns()
    now[0] += 0.3
    running += [start(batcher.submit(n)) for n in (4, 5, 6)]
    await turns()
    for _ in range(4):
        await device.finish()
    # A quarter of a second is fresh, and what is left of a batch is filled up with the oldest.
    assert device.started == [[0], [4, 5], [1, 6], [2, 3]]
    assert await asyncio.gather(*running) == [2 * n for n in range(-20, 7)]


async def test_callers_that_give_up_early_are_not_served_before_others() -> None:
    now, device = [0.0], Device()
    batcher = Batcher(device, in_flight=1, budget=2, clock=lambda: now[0])
    running = [start(batcher.submit(0))]
    await turns()
    running += [start(batcher.submit(n, Turn("bob"))) for n in (1, 2)]
    running += [start(batcher.submit(n)) for n in (3, 4)]
    hasty = [start(batcher.submit(100 + n, Turn("ann"))) for n in range(20)]
    hasty += [start(batcher.submit(200 + n, Turn(deadline=0.01))) for n in range(20)]
    await turns()
    now[0] = 0.3
    for task in hasty[:20]:
        task.cancel()
    await turns()
    assert batcher.queued == 4
    running += [start(batcher.submit(5, Turn("ann"))), start(batcher.submit(6))]
    await turns()
    now[0] = 0.6
    running += [start(batcher.submit(7, Turn("ann"))), start(batcher.submit(8, Turn(deadline=9.0)))]
    await turns()
    for _ in range(6):
        await device.finish()
    # Of all that waits, only Ann's item 5 is late: Ann gives up after 0.3 s, and a fresh item has waited 0.075 s. No
    # batch for Ann alone takes longer than that.
    assert device.started == [[0], [1, 3], [4, 6], [8, 2], [7], [5]]
    assert await asyncio.gather(*running) == [2 * n for n in range(9)]
    await asyncio.gather(*hasty, return_exceptions=True)


async def test_if_callers_give_up_no_batch_takes_longer_than_an_item_is_fresh() -> None:
    now, device = [0.0], Device()
    batcher = Batcher(device, in_flight=1, budget=100, clock=lambda: now[0])
    running = [start(batcher.submit(n)) for n in range(100)]
    await turns()
    await finish_after(device, now, 5.0)  # 20 items a second
    running += [start(batcher.submit(100))]
    await turns()
    await give_up(batcher, now, count=20, after_s=0.8)
    running += [start(batcher.submit(n)) for n in range(101, 111)]
    await turns()
    await device.finish()  # 101 items in 5.8 s: 3 in 0.2 s
    for _ in range(4):
        await finish_after(device, now, 0.2)
    assert [len(batch) for batch in device.started] == [100, 1, 3, 3, 3, 1]
    assert await asyncio.gather(*running) == [2 * n for n in range(111)]


async def test_callers_that_give_up_while_their_item_runs_count_too() -> None:
    now, device = [0.0], Device()
    batcher = Batcher(device, in_flight=1, budget=20, clock=lambda: now[0])
    running = [start(batcher.submit(n)) for n in range(20)]
    await turns()
    await finish_after(device, now, 1.0)  # 20 items a second
    hasty = [start(batcher.submit(1000 + n)) for n in range(20)]
    await turns()
    now[0] += 0.8
    for task in hasty:
        task.cancel()
    await turns()
    running += [start(batcher.submit(n)) for n in range(20, 30)]
    await turns()
    for _ in range(4):
        await finish_after(device, now, 0.2)
    assert [len(batch) for batch in device.started] == [20, 20, 4, 4, 2]
    assert await asyncio.gather(*running) == [2 * n for n in range(30)]


async def test_if_callers_give_up_all_batches_together_take_no_longer_than_an_item_is_fresh() -> None:
    now, device = [0.0], Device()
    batcher = Batcher(device, in_flight=2, prefetch=2, budget=100, clock=lambda: now[0])
    running = [start(batcher.submit(n)) for n in range(100)]
    await turns()
    await finish_after(device, now, 1.0)  # 100 items a second
    await give_up(batcher, now, count=20, after_s=0.8)
    await finish_after(device, now, 0.2)  # 58 items a second by the moving average: 11 in 0.2 s, in 4 batches
    running += [start(batcher.submit(n)) for n in range(100, 112)]
    await turns()
    assert [len(batch) for batch in device.started] == [100, 20, 2, 2, 2, 2]
    for index in range(2, 8):
        await device.finish(index)
    assert await asyncio.gather(*running) == [2 * n for n in range(112)]


async def test_if_callers_are_patient_the_oldest_item_is_served_first_however_long_it_waited() -> None:
    now, device = [0.0], Device()
    batcher = Batcher(device, in_flight=1, budget=2, clock=lambda: now[0])
    running = [start(batcher.submit(0))]
    await turns()
    await give_up(batcher, now, count=3, after_s=1.0)  # too few of all callers
    running += [start(batcher.submit(n)) for n in (1, 2, 3)]
    await turns()
    now[0] += 60.0
    running += [start(batcher.submit(4))]
    await turns()
    for _ in range(3):
        await device.finish()
    assert device.started == [[0], [1, 2], [3, 4]]
    assert await asyncio.gather(*running) == [0, 2, 4, 6, 8]


async def test_callers_whose_deadline_passes_have_given_up() -> None:
    now, device = [0.0], Device()
    batcher = Batcher(device, in_flight=1, budget=1, clock=lambda: now[0])
    running = [start(batcher.submit(0))]
    await turns()
    hasty = [start(batcher.submit(1000 + n, Turn(deadline=1.0))) for n in range(20)]
    await turns()
    now[0] = 1.0
    running += [start(batcher.submit(1, Turn(deadline=4.0)))]
    await turns()
    assert all(isinstance(error, DeadlineExceeded) for error in await asyncio.gather(*hasty, return_exceptions=True))
    now[0] = 2.0
    running += [start(batcher.submit(2, Turn(deadline=6.0)))]
    await turns()
    await device.finish()
    await device.finish()
    await device.finish()
    assert device.started == [[0], [2], [1]]
    assert await asyncio.gather(*running) == [0, 2, 4]


async def test_a_patient_caller_is_served_in_an_endless_overload() -> None:
    now, device = [0.0], Device()
    batcher = Batcher(device, in_flight=1, budget=1, clock=lambda: now[0])
    first = start(batcher.submit(0))
    await turns()
    patient = start(batcher.submit(1))
    batches = 0
    while not patient.done():
        await give_up(batcher, now, count=9, after_s=1.0)
        fresh = start(batcher.submit(1000))
        await turns()
        await device.finish()
        batches += 1
        assert batches <= 17
        fresh.cancel()
    assert (await first, await patient) == (0, 2)


async def test_an_empty_queue_admits_a_call_of_any_size() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=4, max_queued=6)
    start(batcher.submit_all([0] * 50))
    await turns()
    assert (batcher.queued, batcher.running) == (46, 1)
    await batcher_ended(batcher, device)


async def test_limits_of_a_running_batcher_can_be_changed() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=1)
    start(batcher.submit_all(range(6)))
    await turns()
    assert device.started == [[0]]
    batcher.reconfigure(in_flight=2, budget=3, max_queued=0)
    await turns()
    assert device.started == [[0], [1, 2, 3]]
    with pytest.raises(Overloaded):
        await batcher.submit(7)
    await batcher_ended(batcher, device)


async def test_close_finishes_running_batches_and_refuses_the_rest() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=1)
    taken, waits = start(batcher.submit(1)), start(batcher.submit(2))
    await turns()
    closing = start(batcher.close())
    await turns()
    assert isinstance(waits.exception(), ShuttingDown)
    assert not closing.done()
    await device.finish()
    await closing
    assert await taken == 2
    with pytest.raises(ShuttingDown):
        await batcher.submit(3)


async def test_a_batch_whose_task_is_cancelled_answers_its_callers() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=8)
    task = start(batcher.submit(1))
    await turns()
    (running,) = batcher._tasks
    running.cancel()
    with pytest.raises(ShuttingDown):
        await task


async def batcher_ended(batcher: Batcher[int, int], device: Device) -> None:
    while batcher.running:
        for gate in device.gates:
            if not gate.done():
                gate.set_result(None)
        await turns()


# Interleavings. A script is a list of steps. Each step is an action and a number that selects its object.

POISON = 7  # a batch raises if it holds an item whose number ends in 7
ACTIONS = ("submit", "submit", "submit many", "finish", "finish", "fail", "cancel", "turn", "reconfigure")
scripts = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 9)), min_size=1, max_size=24)


class Interleaving:
    """Plays a script and checks every rule that a caller can observe."""

    def __init__(self, in_flight: int, budget: int, max_queued: int | None, bisect: bool) -> None:
        self.batcher: Batcher[int, int] = Batcher(
            self.run,
            in_flight=in_flight,
            budget=budget,
            cost=lambda item: 1 + item % 3,
            max_queued=max_queued,
            bisect=bisect,
        )
        self.bisect = bisect
        self.items: Iterator[int] = iter(range(1_000_000))
        self.calls: list[tuple[list[int], asyncio.Task[list[int | Exception]]]] = []
        self.owner: dict[int, int] = {}
        self.running: list[tuple[list[int], asyncio.Future[None]]] = []
        self.succeeded: Counter[int] = Counter()
        self.failed_runs: dict[int, list[int]] = {}
        self.broken: list[str] = []

    async def run(self, items: list[int]) -> Sequence[int | Exception]:
        # Collected here and asserted at the end: the batcher would hand an error that is raised here to the callers.
        if any(self.calls[self.owner[item]][1].done() for item in items):
            self.broken.append("an item of an answered or cancelled call reached the device")
        gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.running.append((items, gate))
        if len(self.running) > self.batcher.in_flight and not self.shrunk:
            self.broken.append("more batches than in_flight ran at once")
        if sum(1 + item % 3 for item in items) > self.budget_then and len(items) != 1:
            self.broken.append("a batch exceeded the budget")
        try:
            await gate
            if any(item % 10 == POISON for item in items):
                raise ValueError("poison")
        except (ValueError, ConnectionError):
            for item in items:
                self.failed_runs[item] = [len(items), *self.failed_runs.get(item, [])]
            raise
        finally:
            self.running.remove((items, gate))
        self.succeeded.update(items)
        return [item * 2 for item in items]

    async def play(self, script: list[tuple[str, int]]) -> None:
        self.shrunk = False
        self.budget_then = self.batcher.budget
        for action, number in script:
            if action in ("submit", "submit many"):
                items = [next(self.items) for _ in range(1 if action == "submit" else number)]
                self.owner.update(dict.fromkeys(items, len(self.calls)))
                turn = Turn(f"caller {number % 3}", bulk=number % 4 == 0)
                self.calls.append((items, start(self.batcher.submit_all(items, turn))))
            elif action in ("finish", "fail") and self.running:
                gate = self.running[number % len(self.running)][1]
                if not gate.done():
                    if action == "finish":
                        gate.set_result(None)
                    else:
                        gate.set_exception(ConnectionError("down"))
            elif action == "cancel" and self.calls:
                self.calls[number % len(self.calls)][1].cancel()
            elif action == "turn":
                await turns(number % 4)
            elif action == "reconfigure":
                # A retry of a batch made under the old budget may exceed the new one: compare with the largest.
                self.shrunk = True
                self.budget_then = max(self.budget_then, 1 + number)
                self.batcher.reconfigure(in_flight=1 + number % 3, budget=1 + number, max_queued=None)
        await turns()
        while self.running:
            for _, gate in list(self.running):
                if not gate.done():
                    gate.set_result(None)
            await turns()
        await turns()
        self.check()

    def check(self) -> None:
        """Check that each caller has its results and that nothing is left in the batcher."""
        assert self.broken == []
        assert (self.batcher.queued, self.batcher.queued_cost, self.batcher.running) == (0, 0, 0)
        for items, call in self.calls:
            assert call.done()
            if call.cancelled():
                continue
            if call.exception() is not None:
                assert isinstance(call.exception(), Overloaded)
                assert not any(self.succeeded[item] or item in self.failed_runs for item in items)
                continue
            answers = call.result()
            assert len(answers) == len(items)
            for item, answer in zip(items, answers, strict=True):
                if isinstance(answer, Exception):
                    assert self.succeeded[item] == 0
                    assert isinstance(answer, ValueError | ConnectionError)
                    # The error is the item's own or its batch's. With bisect, the item must have failed alone.
                    assert not self.bisect or self.failed_runs[item][0] == 1
                    assert not isinstance(answer, ValueError) or not self.bisect or item % 10 == POISON
                else:
                    assert answer == item * 2
                    assert self.succeeded[item] == 1
                    assert item % 10 != POISON


@pytest.fixture(scope="module")
def loop_of_cases() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.mark.slow
@pytest.mark.timeout(600)  # 10,000 cases
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    script=scripts,
    limits=st.tuples(st.integers(1, 3), st.integers(1, 9), st.none() | st.integers(1, 12)),
    bisect=st.booleans(),
)
def test_every_call_is_answered_once_in_any_interleaving(
    loop_of_cases: asyncio.AbstractEventLoop,
    script: list[tuple[str, int]],
    limits: tuple[int, int, int | None],
    bisect: bool,
) -> None:
    case = Interleaving(*limits, bisect)
    loop_of_cases.run_until_complete(case.play(script))


async def test_a_prefetch_batch_starts_only_while_enough_is_queued() -> None:
    device = Device()
    batcher = Batcher(device, in_flight=1, budget=10, prefetch=1, prefetch_at=4)
    tasks = [start(batcher.submit(0))]
    await turns()
    tasks += [start(batcher.submit(item)) for item in (1, 2, 3)]
    await turns()
    assert device.started == [[0]]
    tasks.append(start(batcher.submit(4)))
    await turns()
    assert device.started == [[0], [1, 2, 3, 4]]
    tasks += [start(batcher.submit(item)) for item in range(5, 20)]
    await turns()
    assert len(device.started) == 2
    for index in range(4):
        await device.finish(index)
    assert device.started[2:] == [list(range(5, 15)), list(range(15, 20))]
    assert [await task for task in tasks] == [item * 2 for item in range(20)]
    assert device.most_at_once == 2


async def test_a_batch_carries_no_request_context() -> None:
    """Serve routes calls by an id that it keeps in the context. If two batches have the same id, one is not routed."""
    request_id = contextvars.ContextVar("request_id", default="none")
    seen: list[str] = []

    async def run(items: list[int]) -> list[int]:
        seen.append(request_id.get())
        return items

    request_id.set("of the request")
    batcher: Batcher[int, int] = Batcher(run, in_flight=2, budget=1)
    assert await batcher.submit_all([1, 2, 3]) == [1, 2, 3]
    assert seen == ["none", "none", "none"]
