"""Natural batching: items that arrive while every slot is busy are batched into the next run. There is no timer.

The same class queues the gateway's calls, the tokenizer's inputs and the device's forwards.

Guarantees:
- An item that finds a free slot is run at once. Under load, batches fill by themselves, up to `budget`.
- Every item is answered exactly once: with its result, with its own error, or with `ShuttingDown` when the batcher
  closes.
- At most `in_flight` batches run at a time, plus `prefetch` while enough is queued.
- `select` chooses the items of a batch. By default it stays within the budget; an item that costs more runs alone.
- A call is admitted as a whole or refused as a whole. A call that would exceed `max_queued` is refused at once with
  `Overloaded`.
- If a call is cancelled, its items leave the queue. Items of it that already run are left out of retries.
- With `bisect`, a batch that raises is halved until only the failing item is left: the other items get their results.

A batcher is not thread-safe: it belongs to one event loop. Nothing is durable: queued items are lost with the process.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from deployments.errors import Overloaded, ShuttingDown

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Call:
    """One submission: its results in order, and the future that its caller awaits."""

    __slots__ = ("abandoned", "future", "remaining", "results")

    def __init__(self, size: int, future: asyncio.Future[None]) -> None:
        self.results: list[object] = [None] * size
        self.remaining = size
        self.future = future
        self.abandoned = False


class Waiting(Generic[Item]):
    """A queued item. `passed_over` counts the batches that took a younger item and left this one in the queue."""

    __slots__ = ("_call", "_index", "cost", "item", "passed_over")

    def __init__(self, item: Item, cost: int, call: _Call, index: int) -> None:
        self.item = item
        self.cost = cost
        self.passed_over = 0
        self._call = call
        self._index = index

    @property
    def abandoned(self) -> bool:
        """Whether the caller has cancelled its call."""
        return self._call.abandoned

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
    """Select the longest run of the oldest items whose costs add up to at most `budget`.

    Args:
        waiting: oldest first, not empty.
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
    """Select the items of the oldest call, whatever they cost: calls run one by one, in the order of arrival.

    Args:
        waiting: oldest first, not empty. The items of a call are neighbours.
        budget: ignored.

    Returns:
        Indices into `waiting`, at least one.
    """
    oldest = waiting[0]._call
    return list(range(sum(1 for _ in itertools.takewhile(lambda entry: entry._call is oldest, waiting))))


class Batcher(Generic[Item, Result]):
    """A queue in front of `run` that batches its items.

    Args:
        run: takes a list of items and returns one result for each, in order. A result that is an Exception is the error
            of its item. If `run` raises, all items of the batch get that error, unless `bisect` is set.
        in_flight: the number of batches that may run at a time.
        budget: the most that the costs of one batch may add up to, as `select` counts them.
        cost: gives the cost units of an item.
        select: picks the next batch. It takes the queued items, oldest first, and the budget; it returns indices, at
            least one.
        max_queued: the most cost units that may be queued; None for no limit. A call that finds the queue empty is
            admitted whatever it costs: otherwise a call could be too large ever to be admitted.
        bisect: run the halves of a failed batch again, down to single items.
        prefetch: batches beyond `in_flight` that may start while at least `prefetch_at` cost units are queued. They
            keep a distant `run` busy. If fewer are queued, they would only split items that could share a batch.
        clock: seconds, monotonic.

    `reconfigure` changes `in_flight`, `budget`, `max_queued`, `prefetch` and `prefetch_at` of a running batcher.
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
        bisect: bool = False,
        prefetch: int = 0,
        prefetch_at: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._run_batch = run
        self._cost = cost
        self._select = select
        self._bisect = bisect
        self._clock = clock
        self._waiting: list[Waiting[Item]] = []
        self._tasks: set[asyncio.Task[list[object]]] = set()
        self._queued_cost = 0
        self._running_cost = 0
        self._pump_scheduled = False
        self._closed = False
        self._drained_cost = 0.0
        self._drain_s = 0.0
        self._last_finish = clock()
        self.reconfigure(
            in_flight=in_flight, budget=budget, max_queued=max_queued, prefetch=prefetch, prefetch_at=prefetch_at
        )

    def reconfigure(
        self, *, in_flight: int, budget: int, max_queued: int | None = None, prefetch: int = 0, prefetch_at: int = 1
    ) -> None:
        """Change the limits. Running batches and admitted items stay; the next batch is made by the new limits."""
        if in_flight < 1 or budget < 1:
            raise ValueError("in_flight and budget must be at least 1")
        self.in_flight = in_flight
        self.budget = budget
        self.max_queued = max_queued
        self._prefetch = prefetch
        self._prefetch_at = prefetch_at
        if self._waiting:
            self._schedule_pump()

    @property
    def queued(self) -> int:
        """The number of queued items."""
        return len(self._waiting)

    @property
    def queued_cost(self) -> int:
        """The cost units of all queued items."""
        return self._queued_cost

    @property
    def running(self) -> int:
        """The number of running batches."""
        return len(self._tasks)

    @property
    def drain_rate(self) -> float:
        """Cost units per second of busy time, over about the last ten batches; 0.0 until the first has finished."""
        return self._drained_cost / self._drain_s if self._drain_s > 0 else 0.0

    @property
    def drain_s(self) -> float:
        """Seconds in which the queued and running items are expected to finish; 1.0 until the first batch has."""
        rate = self.drain_rate
        return (self._queued_cost + self._running_cost) / rate if rate else 1.0

    def admit(self, cost: int) -> None:
        """Refuse work that `submit` would refuse, before anything is spent on it.

        Raises:
            Overloaded: the queue is not empty, and `cost` more would exceed `max_queued`.
        """
        if self.max_queued is not None and self._waiting and self._queued_cost + cost > self.max_queued:
            retry_after_s = min(60.0, max(0.05, self.drain_s))
            raise Overloaded("Too much work is queued; try again later.", retry_after_s=retry_after_s)

    async def submit(self, item: Item) -> Result:
        """Queue one item and return its result.

        Raises:
            Overloaded: at once, if the queue is full; `retry_after_s` is the time in which it is expected to drain.
            ShuttingDown: the batcher is closed, or was closed before the item's turn.
            Exception: the item's own error.
        """
        (result,) = await self.submit_all([item])
        if isinstance(result, Exception):
            raise result
        return result

    async def submit_all(self, items: Sequence[Item]) -> list[Result | Exception]:
        """Queue many items, admitted or refused together. Returns one result or exception per item, in order.

        Raises:
            Overloaded: the queue is full, as in `submit`.
            ShuttingDown: the batcher is closed. If it closes later, this is the result of items that did not run.
        """
        if self._closed:
            raise ShuttingDown("The server is shutting down.")
        if not items:
            return []
        costs = [self._cost(item) for item in items]
        total = sum(costs)
        self.admit(total)
        call = _Call(len(items), asyncio.get_running_loop().create_future())
        self._waiting += [
            Waiting(item, cost, call, index) for index, (item, cost) in enumerate(zip(items, costs, strict=True))
        ]
        self._queued_cost += total
        self._schedule_pump()
        try:
            await call.future
        except asyncio.CancelledError:
            call.abandoned = True
            self._waiting = [entry for entry in self._waiting if not entry.abandoned]
            self._queued_cost = sum(entry.cost for entry in self._waiting)
            raise
        return call.results  # type: ignore[return-value]

    def _schedule_pump(self) -> None:
        # At the end of this turn of the event loop, so that all calls made in this turn share a batch.
        if not self._pump_scheduled:
            self._pump_scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    @property
    def _slots(self) -> int:
        return self.in_flight + (self._prefetch if self._queued_cost >= self._prefetch_at else 0)

    def _pump(self) -> None:
        self._pump_scheduled = False
        while self._waiting and len(self._tasks) < self._slots:
            chosen = sorted(self._select(self._waiting, self.budget))
            youngest = chosen[-1]
            leaving = set(chosen)
            batch = [self._waiting[index] for index in chosen]
            stay = [entry for index, entry in enumerate(self._waiting[:youngest]) if index not in leaving]
            for entry in stay:
                entry.passed_over += 1
            self._waiting[: youngest + 1] = stay
            cost = sum(entry.cost for entry in batch)
            self._queued_cost -= cost
            self._running_cost += cost
            if not self._tasks:
                self._last_finish = self._clock()
            # A batch serves many requests, and a request may have several batches, so it runs in no request's context.
            # Serve gives all calls that are made in one context the same id, and if two calls have the same id,
            # ConsistentHashRouter loses one of them.
            task = asyncio.get_running_loop().create_task(self._results(batch), context=contextvars.Context())
            self._tasks.add(task)
            task.add_done_callback(functools.partial(self._finished, batch, cost))

    def _finished(self, batch: list[Waiting[Item]], cost: int, task: asyncio.Task[list[object]]) -> None:
        self._tasks.discard(task)
        self._running_cost -= cost
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
        waiting, self._waiting, self._queued_cost = self._waiting, [], 0
        for entry in waiting:
            entry.answer(ShuttingDown("The server is shutting down."))
        if self._tasks:
            await asyncio.wait(self._tasks)
