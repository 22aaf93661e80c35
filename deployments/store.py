"""The Store deployment: a thin shell around the package store/.

One worker thread owns the log's connection and the indexes; every call is one job for it. Jobs of different callers
take turns (deployments/fair_queue.py), and small jobs go before bulk work, so a search waits for the job that runs, for
the one that has been handed to the thread, and for at most one more of each other caller. A job whose deadline passes
before it has begun is dropped. A write is answered only after the log has committed it. The thread does background work
(indexes, snapshots, what erasures leave to do) while no call waits, and once a second under load.
"""

import asyncio
import functools
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from ray.serve.handle import DeploymentHandle

from deployments.batcher import Batcher
from deployments.errors import LocatedError
from deployments.fair_queue import SentTurn, Turn
from deployments.metrics import EventLoopLag
from deployments.serving import logs
from deployments.serving.autoscaling import BUSY, BusyTime
from deployments.serving.garbage import collect_old_seldom
from deployments.serving.live_settings import LiveSettings
from deployments.serving.memory import return_freed_memory_regularly
from deployments.serving.ray_internals import listen_for_calls_on_loopback
from deployments.settings import Settings
from store import IndexOptions, Search, SearchResult, Store, StoreError

Answer = TypeVar("Answer")

logger = logging.getLogger("memserve.store")

METHODS = frozenset(
    {
        "append_together",
        "create_key",
        "delete",
        "delete_many",
        "delete_where",
        "erase_user",
        "export_page",
        "find_keys",
        "get",
        "get_many",
        "history_page",
        "import_page",
        "keys",
        "list",
        "ping",
        "revoke_key",
        "update",
        "user",
        "users",
    }
)
"""The methods of the store that `StoreReplica.run` calls."""

_JOBS_IN_FLIGHT = 2  # one runs, and the next has been handed to the thread, which must not wait for the event loop

_IDLE_S = 0.1  # pause after a look for background work that found none
_BUSY_S = 0.005  # pause before the next look while calls wait
_OVERDUE_S = 1.0  # the longest time without a step of background work
_FAILED_S = 5.0  # pause after a step that failed


class _Job(NamedTuple):
    """One call for the worker thread. `cost` is about the number of searches that take as long."""

    call: Callable[[], Any]
    cost: int


class StoreReplica:
    """One replica. It answers for any user, and has the indexes of the users that are routed to it in memory."""

    # Serve awaits an async constructor; type checkers want it synchronous.
    async def __init__(self, settings: Settings, embedder: DeploymentHandle) -> None:  # type: ignore[misc]
        logs.attach(settings.log_level)
        listen_for_calls_on_loopback()
        collect_old_seldom()
        return_freed_memory_regularly()
        info = await embedder.info.remote()
        options = settings.store
        self._live = LiveSettings(settings, "Store")
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._name = uuid.uuid4().hex  # tells callers which replica answered
        self._busy = BusyTime()
        self._lag = EventLoopLag()
        self._jobs: Batcher[_Job, Any] = Batcher(
            self._run_job,
            in_flight=_JOBS_IN_FLIGHT,
            budget=1,
            max_wait_s=settings.queue.max_wait_s,
            cost=lambda job: job.cost,
        )
        self._store = await self._in_worker(
            lambda: Store.open(
                options.url,
                dim=info.dim,
                model=info.name,
                synchronous=options.synchronous,
                index=IndexOptions(
                    switch=options.exact_below, m=options.m, ef_construction=options.ef_construction, ef=options.ef
                ),
                index_budget_bytes=options.index_budget_bytes,
                snapshot_dir=options.snapshot_dir,
            )
        )
        self._background = asyncio.create_task(self._work_in_background())

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Apply `user_config`. Serve calls this after the constructor and whenever `user_config` has changed."""
        self._lag.start()
        if self._live.take(user_config):
            settings, resident = self._live.settings, self._store.resident
            self._jobs.reconfigure(in_flight=_JOBS_IN_FLIGHT, budget=1, max_wait_s=settings.queue.max_wait_s)
            resident.budget_bytes = settings.store.index_budget_bytes
            await self._in_worker(resident.trim)

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
        with self._busy.call():
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

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The share of time in which a call was in progress. Serve reads it each second, for autoscaling."""
        return {BUSY: self._busy.share()}

    async def _work_in_background(self) -> None:
        """Take steps of background work until this replica ends."""
        stepped_at = 0.0
        while True:
            pause_s = _BUSY_S
            if self._jobs.running == 0 or time.monotonic() - stepped_at > _OVERDUE_S:
                try:
                    more = await self._in_worker(self._store.background_step)
                    pause_s = 0.0 if more else _IDLE_S
                except Exception as error:  # later erasures need later steps, so the loop must continue
                    expected = isinstance(error, StoreError)
                    logger.warning("Background work of the store failed: %s", error, exc_info=not expected)
                    pause_s = _FAILED_S
                stepped_at = time.monotonic()
            await asyncio.sleep(pause_s)

    def __del__(self) -> None:
        background = self.__dict__.pop("_background", None)
        if background is not None:  # the first call is Serve's, the second Python's
            background.cancel()
            self._worker.submit(self._store.close)
        self._worker.shutdown(wait=True)
