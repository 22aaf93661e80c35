"""The Embedder deployment: one `@serve.batch` method in front of the engine.

`@serve.batch` is the intake: it collects the calls that arrive in one iteration of the event loop, and waits for more
only if `queue.batch_wait_s` says so. The engine behind it makes the batches: texts that arrive while the device is busy
are batched into its next run. A replica keeps no state: when it dies, its calls fail or are repeated elsewhere.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve

from deployments.embedding.engine import EmbedRequest, Engine
from deployments.embedding.load import load_model
from deployments.embedding.model import Model, ModelInfo, TextToken
from deployments.embedding.outputs import EmbedResult
from deployments.errors import MemserveError
from deployments.metrics import EmbedderMetrics, EventLoopLag
from deployments.serving import logs
from deployments.serving.autoscaling import BUSY, DRAIN_RATE, WAITING_TOKENS, BusyTime
from deployments.serving.garbage import collect_old_seldom
from deployments.serving.live_settings import LiveSettings
from deployments.serving.memory import return_freed_memory_regularly
from deployments.serving.ray_internals import listen_for_calls_on_loopback
from deployments.settings import EmbedderSettings, Settings

logger = logging.getLogger("memserve.embedder")

# One call carries many requests; its reply holds a result or an error for each, in order.
EmbedCall = Sequence[EmbedRequest]
EmbedReply = list[EmbedResult | Exception]


class Embedder:
    """One replica: one model on one device."""

    deployment = "Embedder"

    # Serve awaits an async constructor; type checkers want it synchronous.
    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]
        logs.attach(settings.log_level)
        listen_for_calls_on_loopback()
        collect_old_seldom()
        return_freed_memory_regularly()
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
        threads = self._replicas(settings).num_threads or max(1, round(cpus))
        self._metrics = EmbedderMetrics()
        self._lag = EventLoopLag()
        self._busy = BusyTime()
        self._engine = Engine(
            self._load(settings, threads),
            max_batch_tokens=settings.queue.max_batch_tokens,
            forwards_in_flight=settings.queue.forwards_in_flight,
            max_queued_tokens=settings.queue.max_queued_tokens,
            max_wait_s=settings.queue.max_wait_s,
            queue_enabled=settings.queue.enabled,
            on_batch=self._metrics.batch,
        )
        await self._engine.warm_up()
        info = self._engine.info
        logger.info("%s runs on %s (%s)", info.name, info.device, info.dtype)
        self._live = LiveSettings(settings, self.deployment)

    def _replicas(self, settings: Settings) -> EmbedderSettings:
        return settings.embedder

    def _load(self, settings: Settings, num_threads: int) -> Model:
        return load_model(**settings.model.model_dump(exclude={"token_ids"}), num_threads=num_threads)

    # Must be async: Serve runs other methods in a thread, and the queues belong to the event loop.
    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Apply `user_config`. Serve calls this after the constructor and whenever `user_config` has changed."""
        self._lag.start()
        if self._live.take(user_config):
            queue = self._live.settings.queue
            self._intake.set_max_batch_size(queue.max_batch_size)
            self._intake.set_batch_wait_timeout_s(queue.batch_wait_s)
            self._engine.reconfigure(
                max_batch_tokens=queue.max_batch_tokens,
                forwards_in_flight=queue.forwards_in_flight,
                max_queued_tokens=queue.max_queued_tokens,
                max_wait_s=queue.max_wait_s,
            )

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """Embed the requests of one call; each gets its own result or its own error."""
        with self._busy.call():
            reply = await (await self._intake(call))
        self._metrics.call(reply)
        return reply

    # The intake returns tasks instead of awaiting them, so that a short call need not wait for a long one in its batch.
    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.0, max_concurrent_batches=64)
    async def _intake(self, calls: list[EmbedCall]) -> list[asyncio.Task[EmbedReply]]:
        return [asyncio.create_task(self._engine.embed(call)) for call in calls]

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Figures for deployments/serving/autoscaling.py. Serve calls this each second."""
        stats, busy = self._engine.stats(), self._busy.share()
        self._metrics.state(stats, busy)
        return {WAITING_TOKENS: stats.queued_tokens, DRAIN_RATE: stats.drain_rate, BUSY: busy}

    async def info(self) -> ModelInfo:
        """The model's name, dimension, limits and device."""
        return self._engine.info

    async def split(
        self, texts: Sequence[str], add_special_tokens: bool, timeout_s: float | None = None
    ) -> list[list[TextToken]] | MemserveError:
        """The tokens of each text with their positions in it. An error of the request is returned, not raised."""
        try:
            return await self._engine.split(texts, add_special_tokens=add_special_tokens, timeout_s=timeout_s)
        except MemserveError as error:
            return error

    async def count_tokens(self, texts: Sequence[str], timeout_s: float | None = None) -> list[int] | MemserveError:
        """The number of tokens of each text, without special tokens. An error of the request is returned."""
        try:
            return await self._engine.count_tokens(texts, timeout_s=timeout_s)
        except MemserveError as error:
            return error

    async def decode(
        self, ids: Sequence[Sequence[int]], skip_special_tokens: bool = True, timeout_s: float | None = None
    ) -> list[str] | MemserveError:
        """The text of each list of token ids. An error of the request is returned, not raised."""
        try:
            return await self._engine.decode(ids, skip_special_tokens=skip_special_tokens, timeout_s=timeout_s)
        except MemserveError as error:
            return error

    async def check_health(self) -> None:
        """Raise if the device has failed. Serve then replaces this replica: a lost CUDA context does not recover."""
        self._engine.check_health()

    async def __del__(self) -> None:
        await self._engine.close()
