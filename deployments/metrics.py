"""All metrics. Ray exports them to Prometheus with the prefix `ray_` and labels for deployment and replica.

Recording a value takes microseconds, and is done once for each batch or request, not for each text.
"""

import asyncio
import time
from collections.abc import Callable
from functools import cache

from ray.serve.metrics import Counter, Gauge, Histogram

from deployments.embedding.cache import VectorCache
from deployments.embedding.engine import BatchStats, EngineStats
from deployments.embedding.outputs import EmbedResult

_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
_TEXTS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
_TOKENS = [16, 64, 256, 512, 1024, 2048, 4096, 16384, 65536]
_LOOKS_PER_S = 20  # at the lag of an event loop
_SHARE = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75]


class EmbedderMetrics:
    """The metrics of one embedder."""

    def __init__(self) -> None:
        self._queued = Gauge("memserve_queued_tokens", "Tokens that wait for the device.")
        self._drain_rate = Gauge(
            "memserve_drain_tokens_per_s", "Tokens per second that the device embeds while it is busy."
        )
        self._busy = Gauge(
            "memserve_busy_share", "Share of the last second, from 0 to 1, in which a call was in progress."
        )
        self._batch_texts = Histogram("memserve_batch_texts", "Texts in one run of the model.", boundaries=_TEXTS)
        self._batch_tokens = Histogram(
            "memserve_batch_tokens", "Tokens in one run of the model, without padding.", boundaries=_TOKENS
        )
        self._padding = Histogram(
            "memserve_padding_share", "Share of the tokens in one run of the model that is padding.", boundaries=_SHARE
        )
        self._seconds = Histogram(
            "memserve_embed_seconds",
            "Seconds that a call spends in a stage: queue, tokenize or forward.",
            boundaries=_SECONDS,
            tag_keys=("stage",),
        )
        self._errors = Counter(
            "memserve_embed_errors", "Embedding requests that failed, by class of error.", tag_keys=("kind",)
        )

    def batch(self, stats: BatchStats) -> None:
        """Record one run of the model."""
        self._batch_texts.observe(stats.texts)
        self._batch_tokens.observe(stats.tokens)
        self._padding.observe(1.0 - stats.tokens / stats.padded_tokens)
        self._seconds.observe(stats.seconds, {"stage": "forward"})

    def state(self, stats: EngineStats, busy: float) -> None:
        """Record the queue and the load, once a second."""
        self._queued.set(stats.queued_tokens)
        self._drain_rate.set(stats.drain_rate)
        self._busy.set(busy)

    def call(self, reply: list[EmbedResult | Exception]) -> None:
        """Record one call."""
        done = [answer.timings for answer in reply if isinstance(answer, EmbedResult)]
        if done:
            self._seconds.observe(max(timings.queue_s for timings in done), {"stage": "queue"})
            self._seconds.observe(max(timings.tokenize_s for timings in done), {"stage": "tokenize"})
        for answer in reply:
            if isinstance(answer, Exception):
                self._errors.inc(tags={"kind": type(answer).__name__})


class GatewayMetrics:
    """The metrics of one gateway. Requests, latencies and status codes by route are Serve's own metrics."""

    def __init__(self, cache: VectorCache) -> None:
        self._cache = cache
        self._seen = (0, 0)
        self._queued = Gauge(
            "memserve_gateway_queued_tokens", "Tokens, as estimated, that wait to be sent to an embedder."
        )
        self._hits = Counter(
            "memserve_cache_hits", "Inputs whose vector was in the cache or was being computed already."
        )
        self._misses = Counter("memserve_cache_misses", "Inputs that had to be embedded.")
        self._bytes = Gauge("memserve_cache_bytes", "Bytes of vectors in the cache.")

    def state(self, queued_tokens: int) -> None:
        """Record the queue and the cache, once a second."""
        self._queued.set(queued_tokens)
        hits, misses = self._cache.hits, self._cache.misses
        if hits > self._seen[0]:
            self._hits.inc(hits - self._seen[0])
        if misses > self._seen[1]:
            self._misses.inc(misses - self._seen[1])
        self._seen = (hits, misses)
        self._bytes.set(self._cache.bytes)


class EventLoopLag:
    """The lag of a replica's event loop: how late it runs what is due, since it is busy with something else.

    While it lags, no request of the replica makes progress, and its health is not answered.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._gauge = Gauge(
            "memserve_event_loop_lag_seconds", "The longest time in the last second by which the event loop was late."
        )

    def start(self) -> None:
        """Measure the running event loop, from the first call on."""
        if self._task is None:
            self._task = asyncio.create_task(self._measure())

    async def _measure(self) -> None:
        pause_s = 1 / _LOOKS_PER_S
        while True:
            lag_s = 0.0
            for _ in range(_LOOKS_PER_S):
                due = self._clock() + pause_s
                await asyncio.sleep(pause_s)
                lag_s = max(lag_s, self._clock() - due)
            self._gauge.set(lag_s)


def count_error(error: Exception) -> None:
    """Record one HTTP request that failed, by the class of its error."""
    _http_errors().inc(tags={"kind": type(error).__name__})


@cache
def _http_errors() -> Counter:
    return Counter("memserve_errors", "HTTP requests that failed, by class of error.", tag_keys=("kind",))
