"""The Store deployment: a thin shell around the package store/.

One worker thread owns the log's connection and the indexes; every call is one job for it. Nothing is answered before
the log has committed it. The thread folds, rebuilds, snapshots and cleans up after erasures while no call waits, and
now and then under load.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

from ray.serve.handle import DeploymentHandle

from deployments.serving import logs
from deployments.serving.autoscaling import BUSY, BusyTime
from deployments.serving.garbage import collect_old_seldom
from deployments.serving.live_settings import LiveSettings
from deployments.settings import Settings
from store import IndexOptions, Search, SearchResult, Store, StoreError

Answer = TypeVar("Answer")
Arguments = ParamSpec("Arguments")

logger = logging.getLogger("memserve.store")

_IDLE_S = 0.1  # between two looks for background work where there was none
_BUSY_S = 0.005  # until the next look where calls wait
_OVERDUE_S = 1.0  # the longest time without a step of background work
_FAILED_S = 5.0  # until the next try of a step that failed


class StoreReplica:
    """One replica: any user, any write; warm for the users that routing keeps on it."""

    # Serve awaits an async constructor; type checkers want it synchronous.
    async def __init__(self, settings: Settings, embedder: DeploymentHandle) -> None:  # type: ignore[misc]
        logs.attach(settings.log_level)
        collect_old_seldom()
        info = await embedder.info.remote()
        options = settings.store
        self._live = LiveSettings(settings, "Store")
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._name = uuid.uuid4().hex  # by which callers tell replicas apart
        self._busy = BusyTime()
        self._waiting = 0
        self._memories = await self._run(
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
        self._tending = asyncio.create_task(self._tend())

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve calls this after the constructor and whenever `user_config` has changed."""
        if self._live.take(user_config):
            resident = self._memories.resident
            resident.budget_bytes = self._live.settings.store.index_budget_bytes
            await self._run(resident.trim)

    async def _run(self, job: Callable[[], Answer]) -> Answer:
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, job)
        finally:
            self._waiting -= 1

    async def run(
        self,
        method: Callable[Concatenate[Store, Arguments], Answer],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer | StoreError:
        """Call a method of the store (`store.Store.search`) with these arguments.

        Its error comes as a value: what a caller did wrong is no failure of this replica.
        """
        with self._busy.call():
            try:
                return await self._run(lambda: method(self._memories, *args, **options))
            except StoreError as error:
                return error

    async def search(self, requests: Sequence[Search]) -> tuple[str, list[SearchResult | StoreError]] | StoreError:
        """Search many users: the name of this replica, and an answer for each request, in order."""
        found = await self.run(Store.search, requests)
        return found if isinstance(found, StoreError) else (self._name, found)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve asks for each second, for deployments/serving/autoscaling.py."""
        return {BUSY: self._busy.share()}

    async def _tend(self) -> None:
        """Steps of background work, as long as this replica lives."""
        stepped_at = 0.0
        while True:
            pause_s = _BUSY_S
            if self._waiting == 0 or time.monotonic() - stepped_at > _OVERDUE_S:
                try:
                    more = await self._run(self._memories.background_step)
                    pause_s = 0.0 if more else _IDLE_S
                except Exception as error:  # what is erased later needs the steps that follow
                    expected = isinstance(error, StoreError)
                    logger.warning("background work of the store: %s", error, exc_info=not expected)
                    pause_s = _FAILED_S
                stepped_at = time.monotonic()
            await asyncio.sleep(pause_s)

    def __del__(self) -> None:
        tending = self.__dict__.pop("_tending", None)
        if tending is not None:  # the first time: Serve calls this, and Python again
            tending.cancel()
            self._worker.submit(self._memories.close)
        self._worker.shutdown(wait=True)
