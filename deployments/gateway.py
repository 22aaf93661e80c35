"""The Gateway deployment: Serve's hooks around the service (deployments/service.py).

Its methods are the handle API. Its HTTP routes (deployments/api/build.py) call the same methods.
"""

import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from deployments import metrics
from deployments.api.build import build_api
from deployments.calls.embedder import EmbedderCalls
from deployments.calls.keys import KnownKeys
from deployments.calls.reranking import Reranking
from deployments.calls.store import StoreCalls
from deployments.calls.vectors import Vectors
from deployments.limits import embedder_limits, reranker_limits, store_limits
from deployments.rate_limits import RateLimits
from deployments.service import Memserve
from deployments.serving import address, logs, node_metrics, protocol
from deployments.serving.autoscaling import WAITING_FOR_RERANKER, WAITING_TOKENS
from deployments.serving.garbage import collect_old_seldom
from deployments.serving.live_settings import LiveSettings
from deployments.serving.memory import return_freed_memory_regularly
from deployments.serving.ray_internals import haproxy_is_in_front, http_host, listen_for_calls_on_loopback
from deployments.settings import Settings


class Gateway(Memserve):
    """One replica of the ingress."""

    def __init__(
        self,
        settings: Settings,
        embedder: DeploymentHandle,
        store: DeploymentHandle,
        reranker: DeploymentHandle | None = None,
    ) -> None:
        logs.attach(settings.log_level)
        listen_for_calls_on_loopback()
        collect_old_seldom()
        return_freed_memory_regularly()
        self._live = LiveSettings(settings, "Gateway")
        calls = EmbedderCalls(embedder, **embedder_limits(settings))
        self._reranker: EmbedderCalls | None = None
        if reranker is not None:
            self._reranker = EmbedderCalls(reranker, deployment="reranker", **reranker_limits(settings))
        self._metrics = metrics.GatewayMetrics(calls.cache)
        self._lag = metrics.EventLoopLag()
        store_calls = StoreCalls(store, partitions=settings.store.partitions, **store_limits(settings))
        super().__init__(
            calls,
            Vectors(calls, settings.model.token_ids),
            store_calls,
            KnownKeys(store_calls.find_key),
            Reranking(self._reranker),
            model_name=settings.model.name,
            probe_embedder=settings.embedder.min_replicas > 0,
            max_body_bytes=settings.gateway.max_body_bytes,
            max_import_line_bytes=settings.gateway.max_import_line_bytes,
        )
        self.rate_limits = RateLimits(
            store_calls.lease,
            gateway=uuid.uuid4().hex,
            requests_per_minute=settings.limits.requests_per_minute,
            tokens_per_minute=settings.limits.tokens_per_minute,
        )

    # Serve runs a method that is not async in a thread, away from the event loop that the queues belong to.
    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Apply `user_config`. Serve calls this after the constructor and whenever `user_config` has changed."""
        self._lag.start()
        if self._live.take(user_config):
            settings = self._live.settings
            self._embedder.reconfigure(**embedder_limits(settings))
            self._store.reconfigure(**store_limits(settings))
            if self._reranker is not None:
                self._reranker.reconfigure(**reranker_limits(settings))
            self.limit_bodies(settings.gateway.max_body_bytes, settings.gateway.max_import_line_bytes)
            self.rate_limits.reconfigure(
                requests_per_minute=settings.limits.requests_per_minute,
                tokens_per_minute=settings.limits.tokens_per_minute,
            )

    # Serve calls this after the constructor and serves the application (ray.serve.ingress without an app).
    def __serve_build_asgi_app__(self) -> FastAPI:
        protocol.install()
        settings = self._live.settings
        # `memserve serve` has checked the address; `serve deploy` and `serve run` have not.
        if settings.auth.mode == "loopback" and address.is_reachable(host := http_host()):
            raise ValueError(address.refusal(host))
        return build_api(
            self,
            on_error=metrics.count_error,
            behind_haproxy=haproxy_is_in_front(),
            find_key=self.find_key if settings.auth.mode == "keys" else None,
            rate_limits=self.rate_limits,
            loopback_only=settings.auth.mode == "loopback",
            cors_origins=settings.auth.cors_origins,
            max_body_bytes_in_flight=settings.gateway.max_body_bytes_in_flight,
            read_metrics=node_metrics.read,
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The tokens that wait here, where most of a backlog waits. Serve reads them each second, for autoscaling."""
        waiting = self._vectors.queued_tokens
        self._metrics.state(waiting)
        return {WAITING_TOKENS: waiting, WAITING_FOR_RERANKER: self._reranking.queued_tokens}
