"""`build_app(args)`: makes the deployments and connects them. The only module that sets deployment options.

`import_path: deployments.app:build_app` in serve_config.yaml names this function, and Serve calls it with the `args:`
there. If they are wrong, `serve status` gives the reason in one line, and the version that runs is not changed.
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
from deployments.reranker import Reranker
from deployments.serving.ray_internals import CONSISTENT_HASH_OPTIONS, CONSISTENT_HASH_ROUTER, wrong_ray
from deployments.serving.sizing import fill_in
from deployments.settings import (
    EmbedderSettings,
    GatewaySettings,
    StoreSettings,
    absolute_log_url,
    first_problem,
    load,
)
from deployments.store import StoreReplica

APP_NAME = "memserve"

# High enough never to be the limit: requests are admitted by their tokens, in the gateway and in the engine.
MAX_ONGOING_REQUESTS = 4_096
CONSTRUCTOR_RETRIES = 2
HEALTH_CHECK_PERIOD_S = 1.0  # the time within which a killed replica is noticed
# A replica that is being stopped still accepts calls for this long, in which routers learn that it stops. A later call
# is refused, and its router sends it to another replica.
DRAIN_WAIT_S = 0.5
# Replicas report once a second; policies see the means of five seconds.
METRICS_INTERVAL_S = 1.0
LOOK_BACK_PERIOD_S = 5.0
# A new version starts while the old one runs, and an old replica stops when a new one is ready: up to ten replicas are
# replaced one at a time.
MAX_SURGE_PERCENT = 10


def build_app(args: dict[str, Any]) -> Application:
    """The application: Gateway (the ingress) in front of Embedder and Store and, if its model is set, Reranker.

    Raises:
        RayServeException: the reason in one line. Serve shows the message of this class alone, and does not retry.
    """
    if (reason := wrong_ray()) is not None:
        raise RayServeException(reason)
    try:
        settings = load(args)
    except ValidationError as error:
        raise RayServeException(first_problem(error)) from error
    url = absolute_log_url(settings.store.url, Path.cwd())
    settings = settings.model_copy(update={"store": settings.store.model_copy(update={"url": url})})
    cluster = ray.cluster_resources()
    settings = fill_in(settings, cpus=int(cluster.get("CPU", 1)), gpus=int(cluster.get("GPU", 0)))
    embedder = serve.deployment(Embedder, name="Embedder", **_options(settings.embedder)).bind(settings)
    reranker = None
    if settings.reranker.model is not None:
        reranker = serve.deployment(Reranker, name="Reranker", **_options(settings.reranker)).bind(settings)
    # Consistent hashing sends a partition of users to the replica that holds their indexes in memory.
    router = RequestRouterConfig(
        request_router_class=CONSISTENT_HASH_ROUTER, request_router_kwargs=CONSISTENT_HASH_OPTIONS
    )
    store = serve.deployment(StoreReplica, name="Store", request_router_config=router, **_options(settings.store)).bind(
        settings, embedder
    )
    gateway = serve.deployment(serve.ingress()(Gateway), name="Gateway", **_options(settings.gateway))
    return gateway.bind(settings, embedder, store, reranker)


def _options(replicas: EmbedderSettings | GatewaySettings | StoreSettings) -> dict[str, Any]:
    autoscaling: dict[str, Any]
    resources: dict[str, Any] = {"num_cpus": replicas.num_cpus, "num_gpus": 0.0}
    if isinstance(replicas, EmbedderSettings):
        resources["num_gpus"] = replicas.num_gpus
        if replicas.accelerator_type is not None:
            resources["accelerator_type"] = replicas.accelerator_type
        targets = {"target_drain_s": replicas.target_drain_s, "target_busy": replicas.target_busy}
        autoscaling = {"policy": _policy("EmbedderPolicy", targets)}
    elif isinstance(replicas, StoreSettings):
        autoscaling = {"policy": _policy("StorePolicy", {"target_busy": replicas.target_busy})}
    else:
        autoscaling = {"target_ongoing_requests": replicas.target_ongoing_requests}
    return {
        "ray_actor_options": resources,
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "max_constructor_retry_count": CONSTRUCTOR_RETRIES,
        "graceful_shutdown_timeout_s": 20.0,
        "graceful_shutdown_wait_loop_s": DRAIN_WAIT_S,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "max_surge_percent": MAX_SURGE_PERCENT,
        "user_config": {},  # without it `reconfigure` is not called when the config file drops its user_config
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
