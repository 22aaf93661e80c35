"""Servers that are shared by the tests of this folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deployments.serving.ray_internals import ON_LOOPBACK
from tests.cluster.elastic import Elastic
from tests.cluster.server import Server

# A driver that connects to a cluster by its address must authenticate with the cluster's token (~/.ray/auth_token).
os.environ.setdefault("RAY_AUTH_MODE", "token")
# Ray would look for a cluster on 127.0.0.1 at the machine's other address.
os.environ |= ON_LOOPBACK

LIVE_ARGS = {
    "log_level": "INFO",
    "model": {"dtype": "float32"},
    "embedder": {"num_cpus": 0.6},
    "store": {"min_replicas": 2, "max_replicas": 2, "num_cpus": 0.2},
    "gateway": {"num_cpus": 0.2},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the real model in float32, and two store replicas, either of which may answer."""
    server = Server(tmp_path_factory.mktemp("live"), LIVE_ARGS)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elastic]:
    """A server with the fake model, whose replicas are added, removed, replaced and killed."""
    server = Elastic(tmp_path_factory.mktemp("elastic"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
