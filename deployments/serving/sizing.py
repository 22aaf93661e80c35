"""What the defaults of replicas and CPUs become on the machine or cluster that there is.

All replicas that may ever run fit into the CPUs together, with room for one more of each: a new version starts beside
the old one. A share of a CPU is what Ray reserves, not what a replica may use; an embedder computes with as many
threads as it has whole CPUs, at least one. On a CPU embedders of one thread do more than fewer of several.
"""

import math

from deployments.settings import EmbedderSettings, Settings

# Of a request of one short text an embedder takes about 1.9 ms of CPU time, a gateway 0.65, a store less.
CORES_PER_GATEWAY = 4
CORES_PER_STORE = 4
CORES_PER_OTHER = 8  # one of so many is left by the embedders to gateways, stores, HAProxy and Ray
GPU_SHARE = 0.33  # of an embedder: while the answers of one travel another computes, and a new version fits beside two


def fit(settings: Settings, cpus: int, gpus: int) -> Settings:
    """Fill in what the settings leave open: replicas, and an embedder's CPUs and GPU.

    Args:
        cpus: of the whole cluster.
        gpus: of the whole cluster.
    """
    gateway, store, embedder = settings.gateway, settings.store, settings.embedder
    gateways = gateway.max_replicas or max(gateway.min_replicas, 2, cpus // CORES_PER_GATEWAY)
    stores = store.max_replicas or max(store.min_replicas, 3, cpus // CORES_PER_STORE)
    room = cpus - (gateways + 1) * gateway.num_cpus - (stores + 1) * store.num_cpus
    return settings.model_copy(
        update={
            "gateway": gateway.model_copy(update={"max_replicas": gateways}),
            "store": store.model_copy(update={"max_replicas": stores}),
            "embedder": _fit_embedder(embedder, cpus, room, gpus if _wants_gpu(settings) else 0),
        }
    )


def _wants_gpu(settings: Settings) -> bool:
    return settings.model.provider == "local" and settings.model.device != "cpu"


def _fit_embedder(embedder: EmbedderSettings, cpus: int, room: float, gpus: int) -> EmbedderSettings:
    num_gpus = embedder.num_gpus if embedder.num_gpus is not None else (GPU_SHARE if gpus else 0.0)
    replicas = embedder.max_replicas
    if replicas is None:
        if num_gpus > 0:
            replicas = math.floor(gpus * math.floor(1 / num_gpus) if num_gpus < 1 else gpus / num_gpus) - 1
        else:
            replicas = max(2, cpus - max(1, cpus // CORES_PER_OTHER))
        if embedder.num_cpus is not None:
            replicas = min(replicas, math.floor(room / embedder.num_cpus + 1e-9) - 1)
        replicas = max(1, embedder.min_replicas, replicas)
    num_cpus = embedder.num_cpus
    if num_cpus is None:
        num_cpus = min(1.0, max(0.01, math.floor(100 * room / (replicas + 1) + 1e-9) / 100))
    return embedder.model_copy(update={"max_replicas": replicas, "num_cpus": num_cpus, "num_gpus": num_gpus})
