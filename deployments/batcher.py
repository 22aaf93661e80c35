"""Natural batching, once for every queue: whatever waits when a slot is free rides the next batch; there is no timer.

Guarantees:
- Alone, an item is run at once; under load batches fill by themselves, up to `budget`.
- Every item is answered exactly once: with its own result, its own error, or `ShuttingDown` when the batcher closes.
- At most `in_flight` (+ `prefetch`) batches run at a time. An item that costs more than the budget travels alone.
- A call is admitted or refused whole. Past `max_queued` it is refused at once with `Overloaded`.
- The items of a cancelled call leave the queue; one that is already in a batch is dropped from any retry of it.
- With `bisect`, a batch that raises is halved until only the culprit fails: the others get their results.

Not thread-safe: a batcher belongs to one event loop. Nothing is durable: what waits is lost with the process.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, Protocol, TypeVar

from deployments.errors import Overloaded, ShuttingDown

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Call:
    """One submission: its results in order, and the future its caller waits on."""

    __slots__ = ("abandoned", "future", "remaining", "results")

    def __init__(self, size: int, future: asyncio.Future[None]) -> None:
        self.results: list[object] = [None] * size
        self.remaining = size
        self.future = future
        self.abandoned = False


class Waiting(Generic[Item]):
    """An item in the queue. `passed_over` counts the batches that left before it with a younger item in them."""

    __slots__ = ("_call", "_index", "cost", "item", "passed_over")

    def __init__(self, item: Item, cost: int, call: _Call, index: int) -> None:
        self.item = item
        self.cost = cost
        self.passed_over = 0
        self._call = call
        self._index = index

    @property
    def abandoned(self) -> bool:
        """Its caller has gone away."""
        return self._call.abandoned

    def answer(self, result: object) -> None:
        """Hand the result, or an exception as a value, to the caller."""
        call = self._call
        call.results[self._index] = result
        call.remaining -= 1
        if call.remaining == 0 and not call.future.done():
            call.future.set_result(None)


class Costed(Protocol):
    """What a selection sees of a waiting item."""

    @property
    def cost(self) -> int: ...
    @property
    def passed_over(self) -> int: ...


def oldest_first(waiting: Sequence[Costed], budget: int) -> list[int]:
    """The longest run of the oldest items whose costs add up to at most `budget`; the first alone if it is larger.

    Args:
        waiting: oldest first, not empty.
        budget: cost units.

    Returns:
        Indices into `waiting`, at least one.
    """
    total = 0
    for index, entry in enumerate(waiting):
        total += entry.cost
        if total > budget and index:
            return list(range(index))
    return list(range(len(waiting)))


class Batcher(Generic[Item, Result]):
    """A queue in front of `run` that batches by itself.

    Args:
        run: takes a list of items, returns one result an item, in order; a result that is an Exception is that
            item's error. What it raises is every item's, unless `bisect`.
        in_flight: how many batches may run at a time.
        budget: the most that the costs of one batch may add up to, as `select` counts them.
        cost: cost units of an item.
        select: picks the next batch: (waiting items oldest first, budget) -> indices, at least one.
        max_queued: the most cost units that may wait; None for no limit. A call that finds the queue empty is admitted
            whatever it costs, so that none is impossible.
        bisect: run the halves of a failed batch again, down to single items.
        prefetch: batches beyond `in_flight` that may start while at least `prefetch_at` cost units wait. Where `run` is
            far away they keep it fed; with less waiting they would only split what could travel together.
        clock: seconds, monotonic.

    `in_flight`, `budget`, `max_queued`, `prefetch`, `prefetch_at` may be changed while it runs (`reconfigure`).
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
        """Change the limits. What is running or admitted stays; the next batch sees the new ones."""
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
        """Items that wait."""
        return len(self._waiting)

    @property
    def queued_cost(self) -> int:
        """Cost units that wait."""
        return self._queued_cost

    @property
    def running(self) -> int:
        """Batches that run."""
        return len(self._tasks)

    @property
    def drain_rate(self) -> float:
        """Cost units a second while busy, over about the last ten batches; 0.0 before the first has finished."""
        return self._drained_cost / self._drain_s if self._drain_s > 0 else 0.0

    @property
    def drain_s(self) -> float:
        """Seconds until what waits and runs now is expected to be done; 1.0 while nothing is known."""
        rate = self.drain_rate
        return (self._queued_cost + self._running_cost) / rate if rate else 1.0

    def admit(self, cost: int) -> None:
        """Refuse work that would not be admitted, before anything is spent on it.

        Raises:
            Overloaded: something waits, and `cost` more would pass `max_queued`.
        """
        if self.max_queued is not None and self._waiting and self._queued_cost + cost > self.max_queued:
            retry_after_s = min(60.0, max(0.05, self.drain_s))
            raise Overloaded("Too much work is queued; try again later.", retry_after_s=retry_after_s)

    async def submit(self, item: Item) -> Result:
        """Wait for one item's result.

        Raises:
            Overloaded: at once, when the queue is full; `retry_after_s` is when it is expected to have drained.
            ShuttingDown: the batcher is closed, or closed before the item's turn.
            Exception: the item's own error.
        """
        (result,) = await self.submit_all([item])
        if isinstance(result, Exception):
            raise result
        return result

    async def submit_all(self, items: Sequence[Item]) -> list[Result | Exception]:
        """Wait for many items, admitted or refused together. One result or exception an item, in order.

        Raises:
            Overloaded, ShuttingDown: as `submit`, for all of them.
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
        # At the end of this turn of the loop, so that all who are ready to submit in it share a batch.
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
            # Of many requests, or of one that has several batches: in no request's context. Serve would give all calls
            # that are made in one the same id, and ConsistentHashRouter loses one of two with the same.
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
        # The next batch leaves before these callers are woken: what they do with their results must not hold it up.
        self._pump()
        if task.cancelled():  # the loop is going down
            results: list[object] = [ShuttingDown("The server is shutting down.")] * len(batch)
        else:
            results = task.result()
        for entry, result in zip(batch, results, strict=True):
            entry.answer(result)

    async def _results(self, batch: list[Waiting[Item]]) -> list[object]:
        """Run a batch: a result or an exception for each of its items, whatever happens."""
        # Whoever has gone away since the batch was picked, or since it failed, is not worth a run.
        alive = [entry for entry in batch if not entry.abandoned]
        results: Sequence[object] = []
        if alive:
            try:
                results = await self._run_batch([entry.item for entry in alive])
                if len(results) != len(alive):
                    raise RuntimeError(f"run returned {len(results)} results for {len(alive)} items")
            except Exception as error:  # noqa: BLE001 - handed to everyone who waits, or to the culprit alone
                if self._bisect and len(alive) > 1:
                    middle = len(alive) // 2
                    results = await self._results(alive[:middle]) + await self._results(alive[middle:])
                else:
                    results = [error] * len(alive)
        result_of = dict(zip(alive, results, strict=True))
        return [result_of.get(entry) for entry in batch]

    async def close(self) -> None:
        """Finish what was taken; what waits gets `ShuttingDown`, and so does what is submitted later."""
        self._closed = True
        waiting, self._waiting, self._queued_cost = self._waiting, [], 0
        for entry in waiting:
            entry.answer(ShuttingDown("The server is shutting down."))
        if self._tasks:
            await asyncio.wait(self._tasks)
