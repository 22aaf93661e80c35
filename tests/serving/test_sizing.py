"""The defaults follow the machine: all replicas fit, with room for one more of each deployment."""

from typing import Any

import pytest

from deployments.serving.sizing import fill_in
from deployments.settings import load

CPU: dict[str, Any] = {"model": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("cpus", "gpus", "embedder", "stores", "gateways"),
    [
        (1, 0, (2, 0.1, 0.0), 3, 2),
        (2, 0, (2, 0.43, 0.0), 3, 2),
        (4, 0, (3, 0.82, 0.0), 3, 2),
        (8, 0, (7, 0.91, 0.0), 3, 2),
        (16, 0, (14, 1.0, 0.0), 4, 4),
        (16, 1, (2, 1.0, 0.33), 4, 4),
        (64, 8, (23, 1.0, 0.33), 16, 16),
        (4, 4, (11, 0.27, 0.33), 3, 2),
    ],
)
def test_defaults_follow_the_machine(
    cpus: int, gpus: int, embedder: tuple[int, float, float], stores: int, gateways: int
) -> None:
    fitted = fill_in(load({}), cpus, gpus)
    one = fitted.embedder
    assert (one.max_replicas, one.num_cpus, one.num_gpus) == embedder
    assert (fitted.store.max_replicas, fitted.gateway.max_replicas) == (stores, gateways)


RERANKER: dict[str, Any] = {"reranker": {"model": "some/reranker"}}


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 6, 8, 12, 16, 32, 96, 192])
@pytest.mark.parametrize("gpus", [0, 1, 8])
@pytest.mark.parametrize("args", [{}, RERANKER], ids=["", "with a reranker"])
def test_all_replicas_and_one_more_of_each_fit(args: dict[str, Any], cpus: int, gpus: int) -> None:
    fitted = fill_in(load(args), cpus, gpus)
    reserved, embedder = 0.0, fitted.embedder
    for replicas in (embedder, fitted.store, fitted.gateway, *([fitted.reranker] if args else [])):
        assert replicas.max_replicas is not None and replicas.num_cpus is not None
        reserved += (replicas.max_replicas + 1) * replicas.num_cpus
    assert reserved <= cpus + 1e-9
    assert embedder.max_replicas is not None and embedder.num_gpus is not None
    if not args:
        assert (embedder.max_replicas + 1) * embedder.num_gpus <= gpus


@pytest.mark.parametrize(
    ("cpus", "gpus", "args", "embedder", "reranker"),
    [
        (2, 0, {}, (2, 0.26, 0.0), (1, 0.26, 0.0)),
        (16, 0, {}, (14, 0.75, 0.0), (4, 0.75, 0.0)),
        (16, 1, {}, (1, 1.0, 0.33), (1, 1.0, 0.33)),
        (64, 8, {}, (14, 1.0, 0.33), (8, 1.0, 0.33)),
        (16, 1, {"device": "cpu"}, (2, 1.0, 0.33), (4, 1.0, 0.0)),
        (16, 0, {"max_replicas": 2, "num_cpus": 2.0}, (14, 0.6, 0.0), (2, 2.0, 0.0)),
    ],
)
def test_a_reranker_has_its_share(
    cpus: int,
    gpus: int,
    args: dict[str, Any],
    embedder: tuple[int, float, float],
    reranker: tuple[int, float, float],
) -> None:
    fitted = fill_in(load({"reranker": {"model": "some/reranker", **args}}), cpus, gpus)
    found = [(one.max_replicas, one.num_cpus, one.num_gpus) for one in (fitted.embedder, fitted.reranker)]
    assert found == [embedder, reranker]
    assert fitted.reranker.min_replicas == 0


def test_no_gpu_is_reserved_for_a_model_that_does_not_use_one() -> None:
    assert fill_in(load(CPU), 16, 8).embedder.num_gpus == 0.0
    assert fill_in(load({"model": {"provider": "fake"}}), 16, 8).embedder.num_gpus == 0.0


def test_values_that_are_set_are_kept() -> None:
    fitted = fill_in(load({"embedder": {"num_cpus": 4.0}, "store": {"max_replicas": 1}}), 16, 0)
    assert (fitted.embedder.num_cpus, fitted.embedder.max_replicas) == (4.0, 2)
    assert fitted.store.max_replicas == 1
    fitted = fill_in(load({"embedder": {"max_replicas": 5, "num_gpus": 1.0}, "gateway": {"min_replicas": 6}}), 16, 8)
    assert (fitted.embedder.num_cpus, fitted.embedder.max_replicas, fitted.embedder.num_gpus) == (1.0, 5, 1.0)
    assert fitted.gateway.max_replicas == 6
    assert fill_in(load({"embedder": {"num_gpus": 1.0}}), 16, 8).embedder.max_replicas == 7
    assert fill_in(load({"embedder": {"num_gpus": 2.0, "min_replicas": 4}}), 16, 8).embedder.max_replicas == 4
    assert fill_in(load({"embedder": {"num_cpus": 0.6}}), 2, 0).embedder.max_replicas == 1
