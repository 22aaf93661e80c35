"""`build_app(args)`: wraps, binds and wires the deployments. The only place with deployment options.

Named by `import_path: deployments.app:build_app` in serve_config.yaml, and called with its `args:`. Where they are
wrong, `serve status` says so in one line, and what ran before runs on.
"""

from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import RayServeException

from deployments.embedder import Embedder
from deployments.gateway import Gateway
from deployments.serving.sizing import fit
from deployments.settings import EmbedderSettings, GatewaySettings, StoreSettings, absolute_log_url, explain, load
from deployments.store import StoreReplica

APP_NAME = "memserve"

# A call is short and its replica must not be the limit: admission is by tokens, in the gateway and in the engine.
MAX_ONGOING_REQUESTS = 4_096
CONSTRUCTOR_RETRIES = 2
HEALTH_CHECK_PERIOD_S = 1.0  # a replica that was killed is missed within it
DRAIN_WAIT_S = 0.5  # what a router that is behind still sends is refused at the end, and goes to another replica
# Replicas report once a second, and policies see the means of five.
METRICS_INTERVAL_S = 1.0
LOOK_BACK_PERIOD_S = 5.0
# A new version starts beside the old one, whose replicas stop as the new ones are ready: of up to ten one at a time.
MAX_SURGE_PERCENT = 10


def build_app(args: dict[str, Any]) -> Application:
    """The application: Gateway (ingress) in front of Embedder and Store."""
    try:
        settings = load(args)
    except ValidationError as error:
        raise RayServeException(
            explain(error)
        ) from error  # of this one Serve shows the message, and does not try again
    url = absolute_log_url(settings.store.url, Path.cwd())
    settings = settings.model_copy(update={"store": settings.store.model_copy(update={"url": url})})
    there = ray.cluster_resources()
    settings = fit(settings, cpus=int(there.get("CPU", 1)), gpus=int(there.get("GPU", 0)))
    embedder = serve.deployment(Embedder, name="Embedder", **_options(settings.embedder)).bind(settings)
    # Consistent hashing keeps a partition of users on the replica whose indexes are warm for them.
    router = RequestRouterConfig(
        request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
        request_router_kwargs={"num_virtual_nodes": 100, "num_fallback_replicas": 2},
    )
    store = serve.deployment(StoreReplica, name="Store", request_router_config=router, **_options(settings.store)).bind(
        settings, embedder
    )
    gateway = serve.deployment(serve.ingress()(Gateway), name="Gateway", **_options(settings.gateway))
    return gateway.bind(settings, embedder, store)


def _options(replicas: EmbedderSettings | GatewaySettings | StoreSettings) -> dict[str, Any]:
    autoscaling: dict[str, Any]
    num_gpus: float | None = 0.0
    if isinstance(replicas, EmbedderSettings):
        num_gpus = replicas.num_gpus
        targets = {"target_drain_s": replicas.target_drain_s, "target_busy": replicas.target_busy}
        autoscaling = {"policy": _policy("EmbedderPolicy", targets)}
    elif isinstance(replicas, StoreSettings):
        autoscaling = {"policy": _policy("StorePolicy", {"target_busy": replicas.target_busy})}
    else:
        autoscaling = {"target_ongoing_requests": replicas.target_ongoing_requests}
    return {
        "ray_actor_options": {"num_cpus": replicas.num_cpus, "num_gpus": num_gpus},
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "max_constructor_retry_count": CONSTRUCTOR_RETRIES,
        "graceful_shutdown_timeout_s": 20.0,
        "graceful_shutdown_wait_loop_s": DRAIN_WAIT_S,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "max_surge_percent": MAX_SURGE_PERCENT,
        "user_config": {},  # so that `reconfigure` is called, too, when the config file has it no more
        "autoscaling_config": AutoscalingConfig(
            min_replicas=replicas.min_replicas,
            max_replicas=replicas.max_replicas,
            upscale_delay_s=replicas.upscale_delay_s,
            downscale_delay_s=replicas.downscale_delay_s,
            metrics_interval_s=METRICS_INTERVAL_S,
            look_back_period_s=LOOK_BACK_PERIOD_S,
            **autoscaling,
        ),
    }


def _policy(name: str, targets: dict[str, float]) -> AutoscalingPolicy:
    return AutoscalingPolicy(policy_function=f"deployments.serving.autoscaling:{name}", policy_kwargs=targets)
