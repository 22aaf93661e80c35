"""kill -9 of a replica under load: no request fails, nothing is written twice, and another replica starts soon."""

import signal
import time

import httpx
import psutil
import pytest

from deployments.calls.readiness import KEPT_S
from tests.cluster.elastic import Elastic, Load, until

TRUTH_WITHIN_S = 2.5  # two seconds, and half a second for a busy machine
BACK_WITHIN_S = 30.0


def is_ready(http: httpx.Client) -> bool:
    """Whether /health/ready answers 200 in time. No answer counts as not ready."""
    try:
        return http.get("/health/ready", timeout=TRUTH_WITHIN_S).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("deployment", ["Embedder", "Store", "Gateway"])
def test_a_replica_that_is_killed_under_load(elastic: Elastic, deployment: str) -> None:
    (victim,) = elastic.replicas(deployment)
    with elastic.client() as http, Load(elastic, f"loss-{deployment}") as load:
        until(lambda: is_ready(http), BACK_WITHIN_S)
        psutil.Process(victim).send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        time.sleep(KEPT_S)  # until then a gateway may answer what it has found before
        ready = is_ready(http)
        # It must not claim to be ready, unless another replica has started meanwhile.
        assert not ready or elastic.replicas(deployment) - {victim}
        until(lambda: is_ready(http), BACK_WITHIN_S)
        assert time.monotonic() - killed_at < BACK_WITHIN_S
        answered = load.answers
        until(lambda: load.answers > answered + 20, BACK_WITHIN_S)
    assert victim not in elastic.replicas(deployment)
    # The calls of an embedder or a store are repeated by the gateway, the requests of a gateway by HAProxy.
    assert load.failures == []
    elastic.settle()
