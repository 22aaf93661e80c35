"""The Embedder deployment: one `@serve.batch` method in front of the engine.

`@serve.batch` is the intake: it collects the calls of one turn of the event loop and never waits for more unless it is
told to. The engine behind it owns batching: what arrives while the device is busy rides the next forward.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve

from deployments.embedding.engine import EmbedRequest, Engine
from deployments.embedding.load import load_model
from deployments.embedding.model import ModelInfo, TextToken
from deployments.embedding.outputs import EmbedResult
from deployments.errors import MemserveError
from deployments.metrics import EmbedderMetrics
from deployments.serving.autoscaling import BUSY, DRAIN_RATE, WAITING_TOKENS, BusyTime
from deployments.serving.garbage import collect_old_seldom
from deployments.serving.live_settings import LiveSettings
from deployments.settings import Settings

# What one call carries, and what it is answered: a result or an error for each request, in order.
EmbedCall = Sequence[EmbedRequest]
EmbedReply = list[EmbedResult | Exception]


class Embedder:
    """One replica: one model on one device."""

    # Serve awaits an async constructor; type checkers want it synchronous.
    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]
        collect_old_seldom()
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
        threads = settings.embedder.num_threads or max(1, round(cpus))
        self._metrics = EmbedderMetrics()
        self._busy = BusyTime()
        self._engine = Engine(
            load_model(**settings.model.model_dump(), num_threads=threads),
            max_batch_tokens=settings.queue.max_batch_tokens,
            forwards_in_flight=settings.queue.forwards_in_flight,
            max_queued_tokens=settings.queue.max_queued_tokens,
            queue_enabled=settings.queue.enabled,
            on_batch=self._metrics.batch,
        )
        await self._engine.warm_up()
        self._live = LiveSettings(settings, "Embedder")

    # Serve runs a method that is not async in a thread, away from the event loop that the queues belong to.
    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve calls this after the constructor and whenever `user_config` has changed."""
        if self._live.take(user_config):
            queue = self._live.settings.queue
            self._intake.set_max_batch_size(queue.max_batch_size)
            self._intake.set_batch_wait_timeout_s(queue.batch_wait_s)
            self._engine.reconfigure(
                max_batch_tokens=queue.max_batch_tokens,
                forwards_in_flight=queue.forwards_in_flight,
                max_queued_tokens=queue.max_queued_tokens,
            )

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """Embed the requests of one call; each gets its own result or its own error."""
        with self._busy.call():
            reply = await (await self._intake(call))
        self._metrics.call(reply)
        return reply

    # The intake hands out tasks instead of awaiting them: a short call is not held back by a long one beside it.
    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.0, max_concurrent_batches=64)
    async def _intake(self, calls: list[EmbedCall]) -> list[asyncio.Task[EmbedReply]]:
        return [asyncio.create_task(self._engine.embed(call)) for call in calls]

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve asks for each second, for deployments/serving/autoscaling.py."""
        stats, busy = self._engine.stats(), self._busy.share()
        self._metrics.state(stats, busy)
        return {WAITING_TOKENS: stats.queued_tokens, DRAIN_RATE: stats.drain_rate, BUSY: busy}

    async def info(self) -> ModelInfo:
        """What the model is."""
        return self._engine.info

    async def split(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[TextToken]] | MemserveError:
        """The tokens of each text with their places in it, or what is wrong with the request."""
        try:
            return await self._engine.split(texts, add_special_tokens=add_special_tokens)
        except MemserveError as error:
            return error

    async def decode(self, ids: Sequence[Sequence[int]]) -> list[str] | MemserveError:
        """The text of each list of token ids, or what is wrong with the request."""
        try:
            return await self._engine.decode(ids)
        except MemserveError as error:
            return error

    async def check_health(self) -> None:
        """Serve replaces a replica whose check raises: a CUDA context that is lost stays lost."""
        self._engine.check_health()

    async def __del__(self) -> None:
        await self._engine.close()
