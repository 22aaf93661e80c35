"""The handle API: the same methods, validation and errors as HTTP, as exceptions."""

import uuid
from collections.abc import Iterator

import numpy as np
import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.errors import InvalidRequest
from store import Conflict, NotFound
from tests.cluster.server import Server


@pytest.fixture(scope="module")
def handle(server: Server) -> Iterator[DeploymentHandle]:
    ray.init(address=server.ray_address(), namespace="serve", log_to_driver=False, logging_level="ERROR")
    yield serve.get_app_handle("memserve")
    ray.shutdown()


def test_embed(handle: DeploymentHandle, server: Server) -> None:
    vectors = handle.embed.remote(["one", "two", "three"]).result()
    assert (vectors.shape, vectors.dtype) == ((3, 384), np.float32)
    with server.client() as http:
        answer = http.post("/v1/embeddings", json={"input": ["one", "two", "three"]}).json()
    assert np.array_equal(vectors, np.array([entry["embedding"] for entry in answer["data"]], np.float32))


def test_add_search_delete(handle: DeploymentHandle) -> None:
    user = f"handle-{uuid.uuid4()}"
    texts = ["The dentist is on Monday.", {"text": "Milk is out.", "id": "milk", "metadata": {"list": "shopping"}}]
    added = handle.add.remote(user, texts).result()
    assert [entry["status"] for entry in added] == ["added", "added"]
    (best, other) = handle.search.remote(user, "What must I buy?", top_k=2).result()
    assert (best["id"], best["metadata"]) == ("milk", {"list": "shopping"})
    handle.delete.remote(user, "milk").result()
    (left,) = handle.search.remote(user, "What must I buy?").result()
    assert left["id"] == other["id"]


def test_errors_keep_their_class_and_their_param(handle: DeploymentHandle) -> None:
    user = f"handle-{uuid.uuid4()}"
    with pytest.raises(InvalidRequest) as invalid:
        handle.embed.remote(["fine", ""]).result()
    assert invalid.value.param == "input.1"
    with pytest.raises(InvalidRequest) as invalid:
        handle.search.remote(user, "x", top_k=0).result()
    assert invalid.value.param == "top_k"
    with pytest.raises(NotFound):
        handle.delete.remote(user, "none").result()
    handle.add.remote(user, [{"id": "1", "text": "a"}]).result()
    with pytest.raises(Conflict):
        handle.add.remote(user, [{"id": "1", "text": "b"}]).result()
