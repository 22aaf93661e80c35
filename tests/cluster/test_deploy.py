"""Replicas are added and removed, and a new version is rolled out, without a failed request. An invalid version changes
nothing.
"""

import time
from collections.abc import Iterator

import pytest

from tests.cluster.elastic import DEPLOYMENTS, Elastic, Load, until


@pytest.fixture(autouse=True)
def as_before(elastic: Elastic) -> Iterator[None]:
    """Restore the config that each test found."""
    yield
    elastic.deploy()
    elastic.settle()


def test_replicas_come_and_go_without_a_failed_request(elastic: Elastic) -> None:
    before = {name: elastic.replicas(name) for name in DEPLOYMENTS}
    with Load(elastic, "scale") as load:
        elastic.deploy(replicas={"Embedder": 2, "Store": 2, "Gateway": 2})
        elastic.settle()
        for name in DEPLOYMENTS:
            assert len(elastic.replicas(name)) == 2
            assert before[name] < elastic.replicas(name)
        answered = load.answers
        until(lambda: load.answers > answered + 40, 30.0)
        elastic.deploy()
        until(lambda: all(len(elastic.replicas(name)) == 1 for name in DEPLOYMENTS), 60.0)
    assert load.failures == []


def test_a_new_version_is_rolled_out_and_the_first_request_waits_for_an_embedder(elastic: Elastic) -> None:
    """The new version has no queue, and as many embedders as the load needs: none without a load."""
    before = {name: elastic.replicas(name) for name in DEPLOYMENTS}
    with Load(elastic, "roll") as load:
        new = {"queue": {"enabled": False}, "embedder": {"min_replicas": 0, "num_cpus": 0.15}}
        elastic.deploy(args=new, replicas={"Embedder": 0})
        until(lambda: elastic.status().status == "DEPLOYING", 10.0)
        elastic.settle()
        until(lambda: all(not before[name] & elastic.replicas(name) for name in DEPLOYMENTS), 30.0)
    assert load.failures == []
    until(lambda: elastic.replicas("Embedder") == set(), 40.0)
    with elastic.client() as http:
        assert http.get("/health/ready").status_code == 200
        assert elastic.replicas("Embedder") == set()  # a probe does not start one
        asked_at = time.monotonic()
        assert http.post("/v1/embeddings", json={"input": "first"}).status_code == 200
        assert time.monotonic() - asked_at < 30.0


def test_a_wrong_setting_leaves_the_old_version_and_is_named(elastic: Elastic) -> None:
    before = {name: elastic.replicas(name) for name in DEPLOYMENTS}
    with Load(elastic, "setting", clients=2) as load:
        elastic.deploy(args={"queue": {"max_batch_sizze": 8}})
        until(lambda: elastic.status().status == "DEPLOY_FAILED", 30.0)
        assert elastic.status().message.endswith("\nqueue.max_batch_sizze: unknown setting")
        answered = load.answers
        until(lambda: load.answers > answered + 10, 30.0)
    assert load.failures == []
    assert {name: elastic.replicas(name) for name in DEPLOYMENTS} == before


def test_a_model_that_does_not_load_leaves_the_old_one_and_is_named(elastic: Elastic) -> None:
    (before,) = elastic.replicas("Embedder")
    with Load(elastic, "model", clients=2) as load:
        elastic.deploy(args={"model": {"name": "/no/such/model"}})
        until(lambda: elastic.status().status == "DEPLOY_FAILED", 150.0)  # each attempt to start imports torch
        status, message = elastic.status().deployments["Embedder"]
        assert status == "DEPLOY_FAILED"
        assert "There is no model at '/no/such/model'" in message
        answered = load.answers
        until(lambda: load.answers > answered + 10, 30.0)
        assert before in elastic.replicas("Embedder")
    assert load.failures == []
