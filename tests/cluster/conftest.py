"""One Serve for the whole suite: the real model in float32, two store replicas, so that any replica may answer."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster.elastic import Elastic
from tests.cluster.server import Server

# A driver that names a cluster's address must bring the token that the cluster asks for (~/.ray/auth_token).
os.environ.setdefault("RAY_AUTH_MODE", "token")

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
    server = Server(tmp_path_factory.mktemp("live"), LIVE_ARGS)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elastic]:
    """Another one, whose replicas come, go, change and die."""
    server = Elastic(tmp_path_factory.mktemp("elastic"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
