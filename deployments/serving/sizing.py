"""How many replicas may run and what each reserves, on a machine or cluster of a given size.

All replicas that may run fit into the CPUs together, with room for one more of each deployment, because a new version
starts while the old one runs. A share of a CPU is reserved by Ray, but not enforced as a limit. An embedder computes
with as many threads as it has whole CPUs, and at least one. On a CPU several embedders of one thread embed more than
one of several threads.
"""

import math

from deployments.settings import EmbedderSettings, RerankerSettings, Settings

# A request of one short text takes about 1.9 ms of an embedder's CPU time, 0.65 ms of a gateway's, less of a store's.
CORES_PER_GATEWAY = 4
CORES_PER_STORE = 4
CORES_PER_RERANKER = 4
CORES_PER_OTHER = 8  # embedders leave one core of this many to gateways, stores, HAProxy and Ray
# Two embedders on a GPU, so that one computes while the other sends answers, and room for one of a new version. With a
# reranker on it, one embedder.
GPU_SHARE = 0.33


def fill_in(settings: Settings, cpus: int, gpus: int) -> Settings:
    """Settings with a value for every None among the replicas, and for the CPUs and GPU of embedders and rerankers.

    Args:
        cpus: the number in the whole cluster.
        gpus: the number in the whole cluster.
    """
    gateway, store, embedder = settings.gateway, settings.store, settings.embedder
    gateways = gateway.max_replicas or max(gateway.min_replicas, 2, cpus // CORES_PER_GATEWAY)
    stores = store.max_replicas or max(store.min_replicas, 3, cpus // CORES_PER_STORE)
    room = cpus - (gateways + 1) * gateway.num_cpus - (stores + 1) * store.num_cpus
    reranker = settings.reranker
    if reranker.model is not None:
        reranker = _fill_in_reranker(reranker, cpus, gpus if reranker.device != "cpu" else 0)
        assert reranker.max_replicas is not None
        room -= (reranker.max_replicas + 1) * (reranker.num_cpus or 0.0)
    embedder = _fill_in_embedder(embedder, cpus, room, gpus if _wants_gpu(settings) else 0, reranker)
    if reranker.num_cpus is None:
        reranker = reranker.model_copy(update={"num_cpus": embedder.num_cpus})
    return settings.model_copy(
        update={
            "gateway": gateway.model_copy(update={"max_replicas": gateways}),
            "store": store.model_copy(update={"max_replicas": stores}),
            "embedder": embedder,
            "reranker": reranker,
        }
    )


def _wants_gpu(settings: Settings) -> bool:
    return settings.model.provider == "local" and settings.model.device != "cpu"


def _fill_in_reranker(reranker: RerankerSettings, cpus: int, gpus: int) -> RerankerSettings:
    num_gpus = reranker.num_gpus if reranker.num_gpus is not None else (GPU_SHARE if gpus else 0.0)
    replicas = reranker.max_replicas
    if replicas is None:
        replicas = max(1, reranker.min_replicas, gpus if num_gpus > 0 else cpus // CORES_PER_RERANKER)
    return reranker.model_copy(update={"max_replicas": replicas, "num_gpus": num_gpus})


def _fill_in_embedder(
    embedder: EmbedderSettings, cpus: int, room: float, gpus: int, reranker: RerankerSettings
) -> EmbedderSettings:
    """The embedder's settings, beside rerankers that are filled in but for `num_cpus`, which may be the embedder's."""
    rerankers = 0 if reranker.model is None else (reranker.max_replicas or 0) + 1
    alike = rerankers if reranker.num_cpus is None else 0  # rerankers with an embedder's CPUs
    num_gpus = embedder.num_gpus if embedder.num_gpus is not None else (GPU_SHARE if gpus else 0.0)
    replicas = embedder.max_replicas
    if replicas is None:
        if num_gpus > 0:
            shares = math.floor(gpus * math.floor(1 / num_gpus) if num_gpus < 1 else gpus / num_gpus)
            replicas = shares - math.ceil(rerankers * (reranker.num_gpus or 0.0) / num_gpus) - 1
        else:
            replicas = max(2, cpus - max(1, cpus // CORES_PER_OTHER))
        if embedder.num_cpus is not None:
            replicas = min(replicas, math.floor(room / embedder.num_cpus + 1e-9) - 1 - alike)
        replicas = max(1, embedder.min_replicas, replicas)
    num_cpus = embedder.num_cpus
    if num_cpus is None:
        num_cpus = min(1.0, max(0.01, math.floor(100 * room / (replicas + 1 + alike) + 1e-9) / 100))
    return embedder.model_copy(update={"max_replicas": replicas, "num_cpus": num_cpus, "num_gpus": num_gpus})
