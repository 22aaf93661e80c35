"""The worker of a store: one thread that owns it, and the queue of jobs for that thread. Uses neither Ray nor HTTP.

Every call is one job. Jobs of different callers take turns (deployments/fair_queue.py), and small jobs go before bulk
work, so a search waits for the job that runs, for the one that has been handed to the thread, and for at most one more
of each other caller. A job whose deadline passes before it has begun is dropped. A write is answered only after the log
has committed it. The thread does background work (indexes, snapshots, what erasures leave to do) while no call waits,
and once a second under load.
"""

import asyncio
import functools
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from deployments.batcher import Batcher
from deployments.errors import LocatedError, trace_of
from deployments.fair_queue import SentTurn, Turn
from store import Search, SearchResult, Store, StoreError

Answer = TypeVar("Answer")

logger = logging.getLogger("memserve.store")

METHODS = frozenset(
    {
        "append_together",
        "create_key",
        "delete",
        "delete_many",
        "delete_where",
        "duplicates",
        "erase_user",
        "events",
        "export_page",
        "find_keys",
        "get",
        "get_many",
        "history_page",
        "import_page",
        "keys",
        "list",
        "ping",
        "record_refusals",
        "revoke_key",
        "update",
        "user",
        "users",
    }
)
"""The methods of the store that `StoreWorker.run` calls."""

_JOBS_IN_FLIGHT = 2  # one runs, and the next has been handed to the thread, which must not wait for the event loop

_IDLE_S = 0.1  # pause after a look for background work that found none
_BUSY_S = 0.005  # pause before the next look while calls wait
_OVERDUE_S = 1.0  # the longest time without a step of background work
_FAILED_S = 5.0  # pause after a step that failed


class _Job(NamedTuple):
    """One call for the worker thread. `cost` is about the number of searches that take as long."""

    call: Callable[[], Any]
    cost: int


class StoreWorker:
    """A store and its thread. Belongs to one event loop."""

    async def open(self, make: Callable[[], Store], *, max_wait_s: float) -> None:
        """Open a store in the thread, and begin its background work.

        Args:
            max_wait_s: the longest time that a job may wait.
        """
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._name = uuid.uuid4().hex  # tells callers which replica answered
        self._jobs: Batcher[_Job, Any] = Batcher(
            self._run_job,
            in_flight=_JOBS_IN_FLIGHT,
            budget=1,
            max_wait_s=max_wait_s,
            cost=lambda job: job.cost,
        )
        self._store = await self._in_worker(make)
        self._background = asyncio.create_task(self._work_in_background())

    def limit_wait(self, max_wait_s: float) -> None:
        """Change the longest time that a job may wait."""
        self._jobs.reconfigure(in_flight=_JOBS_IN_FLIGHT, budget=1, max_wait_s=max_wait_s)

    async def _in_worker(self, call: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._worker, call)

    async def _run_job(self, jobs: list[_Job]) -> list[Any]:
        (job,) = jobs  # one at a time, since each costs at least the budget
        return [await self._in_worker(job.call)]

    async def run(self, method: str, sent: SentTurn, *args: Any, **options: Any) -> Any:
        """Call a method of the store by its name.

        Returns:
            its answer, or its StoreError or DeadlineExceeded as a value: neither is a failure of this replica.

        Raises:
            ValueError: the name is not one of METHODS.
        """
        if method not in METHODS:
            raise ValueError(f"The store has no method {method!r} for callers.")
        return await self._answer(functools.partial(getattr(self._store, method), *args, **options), sent)

    async def _answer(self, call: Callable[[], Answer], sent: SentTurn) -> Answer | LocatedError:
        caller, bulk, remaining_s, cost = sent
        turn = Turn(caller, bulk, None if remaining_s is None else time.monotonic() + remaining_s)
        try:
            answer: Answer = await self._jobs.submit(_Job(call, cost), turn)
        except LocatedError as error:
            return error
        return answer

    async def search(
        self, sent: SentTurn, requests: Sequence[Search]
    ) -> tuple[str, list[SearchResult | StoreError]] | LocatedError:
        """Search many users. Returns the name of this replica and an answer for each request, in order."""
        found = await self._answer(lambda: self._store.search(requests), sent)
        return found if isinstance(found, LocatedError) else (self._name, found)

    async def _work_in_background(self) -> None:
        """Take steps of background work until this replica ends."""
        stepped_at = 0.0
        while True:
            pause_s = _BUSY_S
            if self._jobs.running == 0 or time.monotonic() - stepped_at > _OVERDUE_S:
                try:
                    more = await self._in_worker(self._store.background_step)
                    pause_s = 0.0 if more else _IDLE_S
                except Exception as error:  # noqa: BLE001 - later erasures need later steps, so the loop must continue
                    reason = error if isinstance(error, StoreError) else trace_of(error)
                    logger.warning("Background work of the store failed: %s", reason)
                    pause_s = _FAILED_S
                stepped_at = time.monotonic()
            await asyncio.sleep(pause_s)

    def close(self) -> None:
        """Finish the job that runs, close the store and end the thread. Closing a second time does nothing."""
        background = self.__dict__.pop("_background", None)
        if background is not None:
            background.cancel()
            self._worker.submit(self._store.close)
        self._worker.shutdown(wait=True)
