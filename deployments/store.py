"""The Store deployment: a thin shell around the package store/.

One worker thread owns the log's connection and the indexes; every call is one job for it. A write is answered only
after the log has committed it. The thread does background work (indexes, snapshots, what erasures leave to do) while no
call waits, and once a second under load.
"""

import asyncio
import functools
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ray.serve.handle import DeploymentHandle

from deployments.metrics import EventLoopLag
from deployments.serving import logs
from deployments.serving.autoscaling import BUSY, BusyTime
from deployments.serving.garbage import collect_old_seldom
from deployments.serving.live_settings import LiveSettings
from deployments.settings import Settings
from store import IndexOptions, Search, SearchResult, Store, StoreError

Answer = TypeVar("Answer")

logger = logging.getLogger("memserve.store")

METHODS = frozenset(
    {
        "append_together",
        "delete",
        "delete_many",
        "delete_where",
        "erase_user",
        "export_page",
        "get",
        "get_many",
        "history",
        "import_page",
        "list",
        "ping",
        "update",
        "user",
        "users",
    }
)
"""The methods of the store that `StoreReplica.run` calls."""

_IDLE_S = 0.1  # pause after a look for background work that found none
_BUSY_S = 0.005  # pause before the next look while calls wait
_OVERDUE_S = 1.0  # the longest time without a step of background work
_FAILED_S = 5.0  # pause after a step that failed


class StoreReplica:
    """One replica. It answers for any user, and has the indexes of the users that are routed to it in memory."""

    # Serve awaits an async constructor; type checkers want it synchronous.
    async def __init__(self, settings: Settings, embedder: DeploymentHandle) -> None:  # type: ignore[misc]
        logs.attach(settings.log_level)
        collect_old_seldom()
        info = await embedder.info.remote()
        options = settings.store
        self._live = LiveSettings(settings, "Store")
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._name = uuid.uuid4().hex  # tells callers which replica answered
        self._busy = BusyTime()
        self._lag = EventLoopLag()
        self._waiting_jobs = 0
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
            resident = self._store.resident
            resident.budget_bytes = self._live.settings.store.index_budget_bytes
            await self._in_worker(resident.trim)

    async def _in_worker(self, job: Callable[[], Answer]) -> Answer:
        self._waiting_jobs += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, job)
        finally:
            self._waiting_jobs -= 1

    async def run(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the store by its name.

        Returns:
            its answer, or its StoreError as a value: an invalid request is not a failure of this replica.

        Raises:
            ValueError: the name is not one of METHODS.
        """
        if method not in METHODS:
            raise ValueError(f"The store has no method {method!r} for callers.")
        return await self._answer(functools.partial(getattr(self._store, method), *args, **options))

    async def _answer(self, job: Callable[[], Answer]) -> Answer | StoreError:
        with self._busy.call():
            try:
                return await self._in_worker(job)
            except StoreError as error:
                return error

    async def search(self, requests: Sequence[Search]) -> tuple[str, list[SearchResult | StoreError]] | StoreError:
        """Search many users. Returns the name of this replica and an answer for each request, in order."""
        found = await self._answer(lambda: self._store.search(requests))
        return found if isinstance(found, StoreError) else (self._name, found)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The share of time in which a call was in progress. Serve reads it each second, for autoscaling."""
        return {BUSY: self._busy.share()}

    async def _work_in_background(self) -> None:
        """Take steps of background work until this replica ends."""
        stepped_at = 0.0
        while True:
            pause_s = _BUSY_S
            if self._waiting_jobs == 0 or time.monotonic() - stepped_at > _OVERDUE_S:
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
