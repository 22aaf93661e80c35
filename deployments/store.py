"""The Store deployment: Serve's hooks around a store and its thread (deployments/store_worker.py)."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ray.serve.handle import DeploymentHandle

from deployments.errors import LocatedError
from deployments.fair_queue import SentTurn
from deployments.metrics import EventLoopLag
from deployments.rate_limits import Ask, Lease, SharedBuckets
from deployments.serving import logs
from deployments.serving.autoscaling import BUSY, BusyTime
from deployments.serving.garbage import collect_old_seldom
from deployments.serving.live_settings import LiveSettings
from deployments.serving.memory import return_freed_memory_regularly
from deployments.serving.ray_internals import listen_for_calls_on_loopback
from deployments.settings import Settings
from deployments.store_worker import StoreWorker
from store import IndexOptions, Quotas, Store

Answer = TypeVar("Answer")


class StoreReplica(StoreWorker):
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
        self._busy = BusyTime()
        self._lag = EventLoopLag()
        self._buckets = SharedBuckets()
        await self.open(
            lambda: Store.open(
                options.url,
                dim=info.dim,
                model=info.name,
                synchronous=options.synchronous,
                index=IndexOptions(
                    switch=options.exact_below,
                    m=options.m,
                    ef_construction=options.ef_construction,
                    ef=options.ef,
                    k1=options.bm25_k1,
                    b=options.bm25_b,
                ),
                index_budget_bytes=options.index_budget_bytes,
                snapshot_dir=options.snapshot_dir,
                quotas=Quotas(
                    memories=settings.limits.memories_per_tenant,
                    bytes=settings.limits.bytes_per_tenant,
                    keys=settings.limits.keys_per_tenant,
                ),
                audit_days=settings.audit.days,
            ),
            max_wait_s=settings.queue.max_wait_s,
        )

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Apply `user_config`. Serve calls this after the constructor and whenever `user_config` has changed."""
        self._lag.start()
        if self._live.take(user_config):
            settings, resident = self._live.settings, self._store.resident
            self.limit_wait(settings.queue.max_wait_s)
            resident.budget_bytes = settings.store.index_budget_bytes
            await self._in_worker(resident.trim)

    async def _answer(self, call: Callable[[], Answer], sent: SentTurn) -> Answer | LocatedError:
        with self._busy.call():
            return await super()._answer(call, sent)

    async def lease(self, ask: Ask) -> Lease:
        """Hand out a part of a bucket: see deployments/rate_limits.py. Does not wait for the store's thread."""
        return self._buckets.lease(ask)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The share of time in which a call was in progress. Serve reads it each second, for autoscaling."""
        return {BUSY: self._busy.share()}

    def __del__(self) -> None:  # the first call is Serve's, the second Python's
        self.close()
