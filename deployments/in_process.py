"""memserve in one process: the service, an engine and a store, on one event loop. Uses neither Ray nor HTTP.

Guarantees:
- Calls are validated, batched, cached and answered by the code that the deployments run, so the results are the same.
- The log is the one that a server would write. A server or other processes may use it at the same time.
- A write is acknowledged only after the log has committed it. Calls that wait are lost with the process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Sequence
from types import SimpleNamespace
from typing import Any

from deployments.calls.embedder import EmbedderCalls
from deployments.calls.keys import KnownKeys
from deployments.calls.reranking import Reranking
from deployments.calls.store import StoreCalls
from deployments.calls.vectors import Vectors
from deployments.embedding.engine import EmbedRequest, Engine
from deployments.embedding.load import load_model, load_reranker
from deployments.embedding.model import Model, ModelInfo, TextToken
from deployments.embedding.outputs import EmbedResult
from deployments.limits import embedder_limits, reranker_limits, store_limits
from deployments.requests import arguments
from deployments.requests.origin import Origin
from deployments.requests.principal import ANYONE
from deployments.service import Memserve
from deployments.settings import Settings
from deployments.shapes import Fields
from deployments.store_worker import StoreWorker
from store import IndexOptions, Store


class Handle:
    """A handle to an object in this process, as far as the calls of the service use one: `method.remote(...)`."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def options(self, **_: Any) -> Handle:
        """The same handle: nothing is pickled and nothing is routed."""
        return self

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self._target, name))


class _Embedder:
    """The methods of the Embedder deployment."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def embed(self, requests: Sequence[EmbedRequest]) -> list[EmbedResult | Exception]:
        return await self._engine.embed(requests)

    async def info(self) -> ModelInfo:
        return self._engine.info

    async def split(
        self, texts: Sequence[str], add_special_tokens: bool, timeout_s: float | None
    ) -> list[list[TextToken]]:
        return await self._engine.split(texts, add_special_tokens=add_special_tokens, timeout_s=timeout_s)

    async def count_tokens(self, texts: Sequence[str], timeout_s: float | None) -> list[int]:
        return await self._engine.count_tokens(texts, timeout_s=timeout_s)

    async def decode(
        self, ids: Sequence[Sequence[int]], skip_special_tokens: bool, timeout_s: float | None
    ) -> list[str]:
        return await self._engine.decode(ids, skip_special_tokens=skip_special_tokens, timeout_s=timeout_s)


def _engine(model: Model, settings: Settings, max_batch_texts: int | None) -> Engine:
    queue = settings.queue
    return Engine(
        model,
        max_batch_tokens=queue.max_batch_tokens,
        max_batch_texts=max_batch_texts,
        forwards_in_flight=queue.forwards_in_flight,
        max_queued_tokens=queue.max_queued_tokens,
        max_wait_s=queue.max_wait_s,
        queue_enabled=queue.enabled,
    )


class InProcess(Memserve):
    """The service with its engine and its store. Made by `open`."""

    @classmethod
    async def open(cls, settings: Settings, *, max_batch_texts: int | None = None) -> InProcess:
        """Load the models and open the log.

        Args:
            settings: those of replicas and of HTTP have no effect.
            max_batch_texts: the most texts in one run of the model; None for no limit.

        Raises:
            ModelUnavailable: a model cannot be loaded.
            StoreError: the log cannot be opened.
        """
        options = settings.store
        model = await asyncio.to_thread(
            load_model,
            **settings.model.model_dump(exclude={"token_ids"}),
            num_threads=settings.embedder.num_threads,
        )
        engines = [_engine(model, settings, max_batch_texts)]
        worker = StoreWorker()
        try:
            if settings.reranker.model is not None:
                threads = settings.reranker.num_threads
                reranker = await asyncio.to_thread(load_reranker, **settings.reranker.of_model(), num_threads=threads)
                engines.append(_engine(reranker, settings, max_batch_texts))
            for engine in engines:
                await engine.warm_up()
            await worker.open(
                lambda: Store.open(
                    options.url,
                    dim=model.info.dim,
                    model=model.info.name,
                    synchronous=options.synchronous,
                    index=IndexOptions(
                        switch=options.exact_below, m=options.m, ef_construction=options.ef_construction, ef=options.ef
                    ),
                    index_budget_bytes=options.index_budget_bytes,
                    snapshot_dir=options.snapshot_dir,
                ),
                max_wait_s=settings.queue.max_wait_s,
            )
        except BaseException:
            for engine in engines:
                await engine.close()
            raise
        embedder = EmbedderCalls(Handle(_Embedder(engines[0])), **embedder_limits(settings))
        reranker_calls = None
        if len(engines) > 1:
            reranker_calls = EmbedderCalls(
                Handle(_Embedder(engines[1])), deployment="reranker", **reranker_limits(settings)
            )
        store = StoreCalls(Handle(worker), partitions=1, **store_limits(settings))
        self = cls(
            embedder,
            Vectors(embedder, settings.model.token_ids),
            store,
            KnownKeys(store.find_key),
            Reranking(reranker_calls),
            model_name=settings.model.name,
            probe_embedder=True,
            max_body_bytes=settings.gateway.max_body_bytes,
            max_import_line_bytes=settings.gateway.max_import_line_bytes,
        )
        self._engines, self._worker = engines, worker
        return self

    _engines: list[Engine]
    _worker: StoreWorker

    async def import_stream(self, user_id: str, chunks: AsyncIterable[bytes], origin: Origin) -> Fields:
        """Import NDJSON as it arrives, in chunks that may end anywhere. `{imported, unchanged, truncated?}`."""
        return await self.import_body(ANYONE, arguments.new_user(user_id), chunks, origin)

    async def close(self) -> None:
        """Finish what runs, and close the log and the models."""
        for engine in self._engines:
            await engine.close()
        await asyncio.to_thread(self._worker.close)
