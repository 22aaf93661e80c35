"""The Store deployment: a thin shell around the package store/.

One worker thread owns the log's connection and the indexes; every method is one job for it. Nothing is answered before
the log has committed it. The thread folds, rebuilds and snapshots when no request waits.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ray.serve.handle import DeploymentHandle

from deployments.settings import Settings
from store import Append, AppendResult, IndexOptions, Search, SearchResult, StoreError
from store import Store as Memories

Answer = TypeVar("Answer")


class Store:
    """One replica: any user, any write; warm for the users that routing keeps on it."""

    # Serve awaits an async constructor; type checkers want it synchronous.
    async def __init__(self, settings: Settings, embedder: DeploymentHandle) -> None:  # type: ignore[misc]
        info = await embedder.info.remote()
        options = settings.store
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._memories = await self._run(
            lambda: Memories.open(
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

    async def _run(self, job: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._worker, job)

    async def _answer(self, job: Callable[[], Answer]) -> Answer | StoreError:
        """The job's result, or its error as a value: what a caller did wrong is no failure of this replica."""
        try:
            return await self._run(job)
        except StoreError as error:
            return error

    async def append(self, requests: Sequence[Append]) -> list[AppendResult | StoreError] | StoreError:
        """Commit all requests in one transaction; each gets its own result or its own error."""
        return await self._answer(lambda: self._memories.append(requests))

    async def search(self, requests: Sequence[Search]) -> list[SearchResult | StoreError] | StoreError:
        """Search each user's index, caught up with the log first."""
        return await self._answer(lambda: self._memories.search(requests))

    async def delete(self, tenant: str, user_id: str, memory_id: str) -> int | StoreError:
        """Delete one memory. Returns the user's version after it."""
        return await self._answer(lambda: self._memories.delete(tenant, user_id, memory_id))

    async def ping(self) -> StoreError | None:
        """Read the log."""
        return await self._answer(self._memories.ping)

    def __del__(self) -> None:
        if hasattr(self, "_memories"):
            self._worker.submit(self._memories.close)
        self._worker.shutdown(wait=True)
