"""Natural batching: items that arrive while every slot is busy are batched into the next run. There is no timer.

The same class queues the gateway's calls, the tokenizer's inputs, the device's forwards and the store's work.

Guarantees:
- An item that finds a free slot is run at once. Under load, batches fill by themselves, up to `budget`.
- Every item is answered exactly once: with its result, with its own error, with `DeadlineExceeded` if it waited too
  long, or with `ShuttingDown` when the batcher closes.
- At most `in_flight` batches run at a time, plus `prefetch` while enough is queued. With `separate_slots` that many
  bulk batches run beside the urgent ones.
- Callers are served in turn (deployments/fair_queue.py). An urgent batch is not filled up with bulk work. Urgent work
  goes first, but a bulk batch follows each urgent batch that left no urgent item in the queue: small batches take long
  for their cost, and would hold bulk work up. So a single urgent item waits for at most one bulk batch. While more
  urgent items wait than fit into a batch, bulk work gets `BULK_SHARE` of the work that is done.
- If callers give up while they wait, those of their items that have waited long are served after fresh ones
  (deployments/patience.py).
- `select` chooses the items of a batch. By default it stays within the budget; an item that costs more runs alone.
- A call is admitted as a whole or refused as a whole. A call that exceeds its caller's share of a full queue is refused
  at once with `Overloaded`; a caller that has nothing waiting is refused only to protect memory.
- An item whose deadline passes while it is queued never runs. Its caller is answered when the deadline passes.
- If a call is cancelled, its items leave the queue. Items of it that already run are left out of retries.
- With `bisect`, a batch that raises is halved until only the failing item is left: the other items get their results.

A batcher is not thread-safe: it belongs to one event loop. Nothing is durable: queued items are lost with the process.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from deployments.errors import DeadlineExceeded, Overloaded, ShuttingDown
from deployments.fair_queue import FairQueue, Turn
from deployments.patience import PatienceOfCallers

Item = TypeVar("Item")
Result = TypeVar("Result")

BULK_SHARE = 0.25
"""The part of the work, in cost units, that bulk items get while more urgent items wait than fit into a batch."""


SLOTS_BESIDE_BULK = 8
"""With separate slots: the urgent batches, for each one of `in_flight`, that may run while bulk batches run."""


class _Call:
    """One submission: its results in order, and the future that its caller awaits."""

    __slots__ = ("abandoned", "caller", "deadline", "expires_at", "future", "queued_at", "remaining", "results")

    def __init__(
        self, size: int, future: asyncio.Future[None], turn: Turn, queued_at: float, expires_at: float
    ) -> None:
        self.results: list[object] = [None] * size
        self.remaining = size
        self.future = future
        self.caller = turn.caller
        self.deadline = turn.deadline
        self.queued_at = queued_at
        self.expires_at = expires_at
        self.abandoned = False


class Waiting(Generic[Item]):
    """A queued item. `passed_over` counts the batches that took a later item and left this one in the queue."""

    __slots__ = ("_call", "_index", "cost", "item", "passed_over", "tag")

    def __init__(self, item: Item, cost: int, call: _Call, index: int) -> None:
        self.item = item
        self.cost = cost
        self.tag = 0.0
        self.passed_over = 0
        self._call = call
        self._index = index

    @property
    def caller(self) -> str:
        """The caller by which shares are counted."""
        return self._call.caller

    @property
    def abandoned(self) -> bool:
        """Whether the caller has cancelled its call."""
        return self._call.abandoned

    def waited_s(self, now: float) -> float:
        """The time since the item was queued."""
        return now - self._call.queued_at

    @property
    def own_s(self) -> float | None:
        """The time from queueing to the deadline that the caller gave; None if it gave none."""
        call = self._call
        return None if call.deadline is None else call.deadline - call.queued_at

    def expired(self, now: float) -> bool:
        """Whether the deadline has passed."""
        return self._call.expires_at <= now

    def answer(self, result: object) -> None:
        """Store the item's result, or its exception, and wake the caller if it was the last of the call."""
        call = self._call
        call.results[self._index] = result
        call.remaining -= 1
        if call.remaining == 0 and not call.future.done():
            call.future.set_result(None)


class Costed(Protocol):
    """The part of a queued item that a selection by cost needs."""

    @property
    def cost(self) -> int: ...
    @property
    def passed_over(self) -> int: ...


def oldest_first(waiting: Sequence[Costed], budget: int) -> list[int]:
    """Select the longest run of the first items whose costs add up to at most `budget`.

    Args:
        waiting: in the order in which they are to be served, not empty.
        budget: cost units. If the first item alone exceeds it, that item is selected alone.

    Returns:
        Indices into `waiting`, at least one.
    """
    total = 0
    for index, entry in enumerate(waiting):
        total += entry.cost
        if total > budget and index:
            return list(range(index))
    return list(range(len(waiting)))


def oldest_call(waiting: Sequence[Waiting[Any]], budget: int) -> list[int]:
    """Select the items of the call whose item is first, whatever they cost: calls run one by one.

    Args:
        waiting: in the order in which they are to be served, not empty.
        budget: ignored.

    Returns:
        Indices into `waiting`, at least one.
    """
    oldest = waiting[0]._call
    return [index for index, entry in enumerate(waiting) if entry._call is oldest]


class _Lane(Generic[Item]):
    """The queue of urgent or of bulk items, and the batches of it that run."""

    __slots__ = ("patience", "queue", "running", "running_cost")

    def __init__(self) -> None:
        self.queue: FairQueue[Waiting[Item]] = FairQueue()
        self.patience = PatienceOfCallers()
        self.running = 0
        self.running_cost = 0


class Batcher(Generic[Item, Result]):
    """A queue in front of `run` that batches its items.

    Args:
        run: takes a list of items and returns one result for each, in order. A result that is an Exception is the error
            of its item. If `run` raises, all items of the batch get that error, unless `bisect` is set.
        in_flight: the number of batches that may run at a time.
        budget: the most that the costs of one batch may add up to, as `select` counts them.
        cost: gives the cost units of an item, at least 1.
        select: picks the next batch. It takes the queued items in the order in which they are to be served, and the
            budget; it returns indices, at least one.
        max_queued: the cost units of urgent items, and of bulk items, above which a caller may queue no more than its
            share of them; None for no limit. See `Shares.admits`.
        max_wait_s: the longest time that an item may be queued; None for no limit.
        bisect: run the halves of a failed batch again, down to single items.
        prefetch: batches beyond `in_flight` that may start while at least `prefetch_at` cost units are queued. They
            keep a distant `run` busy. If fewer are queued, they would only split items that could share a batch.
        separate_slots: urgent and bulk batches have `in_flight` and `prefetch` each, so that an urgent batch never
            waits for a bulk batch to end. While bulk batches run, `SLOTS_BESIDE_BULK` times as many urgent ones may
            run, since each of them may wait for bulk work where it runs.
        clock: seconds, monotonic; the clock of the turns' deadlines.

    `reconfigure` changes `in_flight`, `budget`, `max_queued`, `max_wait_s`, `prefetch` and `prefetch_at` of a running
    batcher.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Result | Exception]]],
        *,
        in_flight: int,
        budget: int,
        cost: Callable[[Item], int] = lambda _: 1,
        select: Callable[[Sequence[Waiting[Item]], int], Sequence[int]] = oldest_first,
        max_queued: int | None = None,
        max_wait_s: float | None = None,
        bisect: bool = False,
        prefetch: int = 0,
        prefetch_at: int = 1,
        separate_slots: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_batch = run
        self._cost = cost
        self._select = select
        self._bisect = bisect
        self._separate_slots = separate_slots
        self._clock = clock
        self._urgent: _Lane[Item] = _Lane()
        self._bulk: _Lane[Item] = _Lane()
        self._bulk_credit = 0.0  # cost units that bulk items may run before the urgent items that wait
        self._bulk_is_next = False  # the last urgent batch left none in the queue
        self._tasks: set[asyncio.Task[list[object]]] = set()
        self._pump_scheduled = False
        self._cancelled = False  # whether a call was cancelled whose items may still be queued
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._closed = False
        self._drained_cost = 0.0
        self._drain_s = 0.0
        self._last_finish = clock()
        self.reconfigure(
            in_flight=in_flight,
            budget=budget,
            max_queued=max_queued,
            max_wait_s=max_wait_s,
            prefetch=prefetch,
            prefetch_at=prefetch_at,
        )

    def reconfigure(
        self,
        *,
        in_flight: int,
        budget: int,
        max_queued: int | None = None,
        max_wait_s: float | None = None,
        prefetch: int = 0,
        prefetch_at: int = 1,
    ) -> None:
        """Change the limits. Running batches and admitted items stay; the next batch is made by the new limits."""
        if in_flight < 1 or budget < 1:
            raise ValueError("in_flight and budget must be at least 1")
        self.in_flight = in_flight
        self.budget = budget
        self.max_queued = max_queued
        self.max_wait_s = max_wait_s
        self._prefetch = prefetch
        self._prefetch_at = prefetch_at
        if self.queued:
            self._schedule_pump()

    @property
    def queued(self) -> int:
        """The number of queued items."""
        return len(self._urgent.queue) + len(self._bulk.queue)

    @property
    def queued_cost(self) -> int:
        """The cost units of all queued items."""
        return self._urgent.queue.cost + self._bulk.queue.cost

    @property
    def running(self) -> int:
        """The number of running batches."""
        return len(self._tasks)

    @property
    def slots(self) -> int:
        """The most bulk batches that may run at a time, and the most urgent ones while no bulk batch runs."""
        return self.in_flight + self._prefetch

    @property
    def drain_rate(self) -> float:
        """Cost units per second of busy time, over about the last ten batches; 0.0 until the first has finished."""
        return self._drained_cost / self._drain_s if self._drain_s > 0 else 0.0

    def drain_s(self, *, bulk: bool = True) -> float:
        """Seconds in which the queued and running items are expected to finish; 1.0 until the first batch has.

        Args:
            bulk: False leaves out the queued bulk items, which urgent items do not wait for.
        """
        rate = self.drain_rate
        cost = self._urgent.queue.cost + self._urgent.running_cost + self._bulk.running_cost
        if bulk:
            cost += self._bulk.queue.cost
        return cost / rate if rate else 1.0

    def admit(self, cost: int, turn: Turn) -> None:
        """Refuse work that `submit` would refuse, before anything is spent on it. Work that has begun is not refused.

        Raises:
            Overloaded: the queue is full, and the caller has its share of it; or much more than a full queue waits.
        """
        lane = self._bulk if turn.bulk else self._urgent
        if not turn.begun and not lane.queue.shares.admits(turn.caller, cost, self.max_queued):
            retry_after_s = min(60.0, max(0.05, self.drain_s(bulk=turn.bulk)))
            raise Overloaded("Too much work is queued; try again later.", retry_after_s=retry_after_s)

    async def submit(self, item: Item, turn: Turn | None = None) -> Result:
        """Queue one item and return its result.

        Args:
            turn: who asks, how urgently and until when. By default the call is a caller of its own.

        Raises:
            Overloaded: at once, if the queue is full; `retry_after_s` is the time in which it is expected to drain.
            DeadlineExceeded: the turn's deadline passed, or `max_wait_s`, and the item had not begun to run.
            ShuttingDown: the batcher is closed, or was closed before the item's turn.
            Exception: the item's own error.
        """
        (result,) = await self.submit_all([item], turn)
        if isinstance(result, Exception):
            raise result
        return result

    async def submit_all(self, items: Sequence[Item], turn: Turn | None = None) -> list[Result | Exception]:
        """Queue many items, admitted or refused together. Returns one result or exception per item, in order.

        Raises:
            Overloaded: the queue is full, as in `submit`.
            DeadlineExceeded: the deadline has passed already. If it passes later, this is the result of the items that
                have not begun to run.
            ShuttingDown: the batcher is closed. If it closes later, this is the result of items that did not run.
        """
        if self._closed:
            raise ShuttingDown("The server is shutting down.")
        if not items:
            return []
        if turn is None:
            turn = Turn()
        costs = [self._cost(item) for item in items]
        self.admit(sum(costs), turn)
        now = self._clock()
        expires_at = self._expires_at(turn, now)
        call = _Call(len(items), asyncio.get_running_loop().create_future(), turn, now, expires_at)
        entries = [
            Waiting(item, cost, call, index) for index, (item, cost) in enumerate(zip(items, costs, strict=True))
        ]
        lane = self._bulk if turn.bulk else self._urgent
        lane.queue.push(turn.caller, entries)
        if expires_at < self._timer_at:
            self._set_timer(expires_at)
        self._schedule_pump()
        try:
            await call.future
        except asyncio.CancelledError:
            lane.patience.gave_up(call.caller, self._clock() - now)
            call.abandoned = True
            self._cancelled = True
            self._schedule_pump()
            raise
        return call.results  # type: ignore[return-value]

    def _expires_at(self, turn: Turn, now: float) -> float:
        """When an item that is queued now has waited too long. Raises DeadlineExceeded if it has already."""
        expires_at = math.inf if self.max_wait_s is None else now + self.max_wait_s
        if turn.deadline is not None:
            expires_at = min(expires_at, turn.deadline)
        if expires_at <= now:
            raise _too_late()
        return expires_at

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = None
        if at < math.inf:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, at - self._clock()), self._timer_ended)

    def _timer_ended(self) -> None:
        if self._clock() >= self._timer_at:
            self._schedule_pump()
        else:  # the event loop may be early by the resolution of its clock
            self._set_timer(self._timer_at)

    def _schedule_pump(self) -> None:
        # At the end of this turn of the event loop, so that all calls made in this turn share a batch.
        if not self._pump_scheduled:
            self._pump_scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _drop_expired(self) -> None:
        """Answer the items whose deadline has passed, and set the timer for the next one."""
        now = self._clock()
        lanes = (self._urgent, self._bulk)
        for lane in lanes:
            expired = lane.queue.remove(lambda entry: entry.expired(now))
            _count_those_that_expired(lane, expired, now)
            for entry in expired:
                entry.answer(_too_late())
        self._set_timer(
            min((entry._call.expires_at for lane in lanes for entry in lane.queue.entries), default=math.inf)
        )

    def _next_lane(self) -> _Lane[Item] | None:
        """The lane of the next batch; None if nothing is queued that may run now."""
        urgent, bulk = self._urgent, self._bulk
        if not urgent.queue.entries and not bulk.queue.entries:
            return None
        if self._separate_slots:
            if urgent.queue.entries:
                if bulk.running and urgent.running < SLOTS_BESIDE_BULK * self.in_flight:
                    return urgent
                if self._has_slot(urgent.queue.cost, urgent.running):
                    return urgent
            return bulk if bulk.queue.entries and self._has_slot(bulk.queue.cost, bulk.running) else None
        if not self._has_slot(urgent.queue.cost + bulk.queue.cost, urgent.running + bulk.running):
            return None
        if not bulk.queue.entries:
            return urgent
        if not urgent.queue.entries or self._bulk_is_next or self._bulk_credit >= min(self.budget, bulk.queue.cost):
            return bulk
        return urgent

    def _has_slot(self, queued_cost: int, running: int) -> bool:
        return running < self.in_flight + (self._prefetch if queued_cost >= self._prefetch_at else 0)

    def _pump(self) -> None:
        self._pump_scheduled = False
        if self._cancelled:
            self._cancelled = False
            for lane in (self._urgent, self._bulk):
                lane.queue.remove(lambda entry: entry.abandoned)
        if self._timer_at < math.inf and self._timer_at <= self._clock():
            self._drop_expired()
        while (ready := self._next_lane()) is not None:
            self._start(ready)

    def _start(self, lane: _Lane[Item]) -> None:
        """Run the next batch of a lane."""
        contended = bool(self._urgent.queue.entries and self._bulk.queue.entries)
        before = lane.queue.cost
        batch = lane.queue.take(self._chosen(lane))
        lane.patience.served([call.caller for call in {entry._call for entry in batch}])
        cost = before - lane.queue.cost
        self._bulk_is_next = contended and lane is self._urgent and not lane.queue.entries
        if not contended:
            self._bulk_credit = 0.0
        elif lane is self._bulk:
            self._bulk_credit -= cost
        else:
            self._bulk_credit += cost * BULK_SHARE / (1 - BULK_SHARE)
        lane.running += 1
        lane.running_cost += cost
        if not self._tasks:
            self._last_finish = self._clock()
        # A batch serves many requests, and a request may have several batches, so it runs in no request's context.
        # Serve gives all calls that are made in one context the same id, and if two calls have the same id,
        # ConsistentHashRouter loses one of them.
        task = asyncio.get_running_loop().create_task(self._results(batch), context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._finished, lane, batch, cost))

    def _chosen(self, lane: _Lane[Item]) -> Sequence[int]:
        """The indices of the items of the next batch."""
        entries, patience = lane.queue.entries, lane.patience
        if not patience.is_short:
            return self._select(entries, self.budget)
        fresh_s = [patience.fresh_s(entry.caller, entry.own_s) for entry in entries]
        budget = self.budget
        longest_s = max(math.inf if one is None else one for one in fresh_s)
        if self.drain_rate and longest_s < math.inf:
            # The running batches may not take longer either, together: on a slow device full ones would be late for
            # all of their callers.
            budget = min(budget, max(1, int(self.drain_rate * longest_s / self.slots)))
        if patience.takes_oldest:
            return self._select(entries, budget)
        now = self._clock()
        late = [one is not None and entry.waited_s(now) > one for entry, one in zip(entries, fresh_s, strict=True)]
        order = sorted(range(len(entries)), key=late.__getitem__)
        chosen = self._select([entries[index] for index in order], budget)
        return [order[index] for index in chosen]

    def _finished(
        self, lane: _Lane[Item], batch: list[Waiting[Item]], cost: int, task: asyncio.Task[list[object]]
    ) -> None:
        self._tasks.discard(task)
        lane.running -= 1
        lane.running_cost -= cost
        now = self._clock()
        self._drained_cost = 0.9 * self._drained_cost + cost
        self._drain_s = 0.9 * self._drain_s + (now - self._last_finish)
        self._last_finish = now
        # The next batch starts before these callers are woken: what they do with their results must not delay it.
        self._pump()
        if task.cancelled():  # the event loop is shutting down
            results: list[object] = [ShuttingDown("The server is shutting down.")] * len(batch)
        else:
            results = task.result()
        for entry, result in zip(batch, results, strict=True):
            entry.answer(result)

    async def _results(self, batch: list[Waiting[Item]]) -> list[object]:
        """Run a batch. Returns a result or an exception for each of its items, whatever happens."""
        # Callers may have cancelled since the batch was picked, or since it failed: their items are not run.
        alive = [entry for entry in batch if not entry.abandoned]
        results: Sequence[object] = []
        if alive:
            try:
                results = await self._run_batch([entry.item for entry in alive])
                if len(results) != len(alive):
                    raise RuntimeError(f"run returned {len(results)} results for {len(alive)} items")
            except Exception as error:  # noqa: BLE001 - answered to the callers
                if self._bisect and len(alive) > 1:
                    middle = len(alive) // 2
                    results = await self._results(alive[:middle]) + await self._results(alive[middle:])
                else:
                    results = [error] * len(alive)
        result_of = dict(zip(alive, results, strict=True))
        return [result_of.get(entry) for entry in batch]

    async def close(self) -> None:
        """Let the running batches finish. Items that are queued or submitted later get `ShuttingDown`."""
        self._closed = True
        self._set_timer(math.inf)
        for lane in (self._urgent, self._bulk):
            for entry in lane.queue.remove(lambda _: True):
                entry.answer(ShuttingDown("The server is shutting down."))
        if self._tasks:
            await asyncio.wait(self._tasks)


def _count_those_that_expired(lane: _Lane[Any], expired: Sequence[Waiting[Any]], now: float) -> None:
    """Count each call once, however many items it has: one large call says nothing about other callers."""
    for call in {entry._call for entry in expired}:
        by_own_deadline = call.deadline is not None and call.deadline <= now
        lane.patience.gave_up(call.caller, None if by_own_deadline else now - call.queued_at)


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("The request waited in the queue until its deadline passed.")
