"""`build_app(settings)`: wraps, binds and wires the deployments. The only place with deployment options.

Named by `import_path: deployments.app:build_app` in serve_config.yaml; Serve makes the Settings from `args:`.
"""

# No `from __future__ import annotations` here: Serve reads the builder's annotation to turn `args:` into Settings, and
# hands a raw dict to a builder whose annotation is a string.

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from deployments.embedder import Embedder
from deployments.gateway import Gateway
from deployments.settings import Replicas, Settings, absolute_log_url
from deployments.store import Store

APP_NAME = "memserve"

# A call is short and its replica must not be the limit: admission is by tokens, in the gateway and in the engine.
MAX_ONGOING_REQUESTS = 4_096
CONSTRUCTOR_RETRIES = 2


def build_app(settings: Settings) -> Application:
    """The application: Gateway (ingress) in front of Embedder and Store."""
    url = absolute_log_url(settings.store.url, Path.cwd())
    settings = settings.model_copy(update={"store": settings.store.model_copy(update={"url": url})})
    embedder = serve.deployment(Embedder, name="Embedder", **_options(settings.embedder)).bind(settings)
    # Consistent hashing keeps a partition of users on the replica whose indexes are warm for them.
    router = RequestRouterConfig(
        request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
        request_router_kwargs={"num_virtual_nodes": 100, "num_fallback_replicas": 2},
    )
    store = serve.deployment(Store, name="Store", request_router_config=router, **_options(settings.store)).bind(
        settings, embedder
    )
    gateway = serve.deployment(serve.ingress()(Gateway), name="Gateway", **_options(settings.gateway))
    return gateway.bind(settings, embedder, store)


def _options(replicas: Replicas) -> dict[str, Any]:
    return {
        "ray_actor_options": {"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "max_constructor_retry_count": CONSTRUCTOR_RETRIES,
        "graceful_shutdown_timeout_s": 20.0,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=replicas.min_replicas,
            max_replicas=replicas.max_replicas,
            target_ongoing_requests=replicas.target_ongoing_requests,
            upscale_delay_s=replicas.upscale_delay_s,
            downscale_delay_s=replicas.downscale_delay_s,
        ),
    }
