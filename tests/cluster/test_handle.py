"""The handle API: the same methods, validation and errors as over HTTP; errors are exceptions.

The driver is a process of its own, as a user's would be, because Serve's router threads outlive `ray.shutdown`.
"""

import multiprocessing
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import ray
from ray import serve

from deployments.errors import InvalidRequest
from store import Conflict, NotFound
from tests.cluster.server import Server

Call = Callable[..., Any]


def _connect(address: str) -> None:
    ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="ERROR")


def _call(method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    try:
        return getattr(serve.get_app_handle("memserve"), method).remote(*args, **options).result()
    except ray.exceptions.RayTaskError as error:
        assert isinstance(error, type(error.cause))  # a caller's `except Conflict` relies on it
        raise error.cause from None


def _stream(method: str, args: tuple[Any, ...]) -> list[Any]:
    return list(getattr(serve.get_app_handle("memserve").options(stream=True), method).remote(*args))


@pytest.fixture(scope="module")
def driver(server: Server) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=_connect, initargs=(server.ray_address(),)
    ) as executor:
        yield executor


@pytest.fixture
def call(driver: ProcessPoolExecutor) -> Call:
    return lambda method, *args, **options: driver.submit(_call, method, args, options).result(timeout=60)


def _metrics_of_this_node() -> str:
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return answer.read().decode()


def test_metrics_are_exported(server: Server, driver: ProcessPoolExecutor) -> None:
    with server.client() as http:
        for _ in range(2):
            assert http.post("/v1/embeddings", json={"input": ["a metric", "another"]}).status_code == 200
        assert http.post("/v1/embeddings", json={"input": ""}).status_code == 400
    wanted = {
        f"ray_memserve_{name}"
        for name in (
            *("queued_tokens", "drain_tokens_per_s", "gateway_queued_tokens", "cache_bytes"),
            *("batch_texts_sum", "batch_tokens_sum", "padding_share_count"),
            *("cache_hits_total", "cache_misses_total", "errors_total"),
            *(f'embed_seconds_count stage="{stage}"' for stage in ("queue", "tokenize", "forward")),
        )
    }
    wanted |= {
        f'ray_serve_num_http_requests_total route="/v1/embeddings" status_code="{status}"' for status in (200, 400)
    }
    deadline = time.monotonic() + 60  # processes report every few seconds
    missing = wanted
    while missing and time.monotonic() < deadline:
        lines = driver.submit(_metrics_of_this_node).result(timeout=60).splitlines()
        missing = {name for name in wanted if not any(all(part in line for part in name.split()) for line in lines)}
        time.sleep(0.5)
    assert not missing


def test_embed(call: Call, server: Server) -> None:
    vectors = call("embed", ["one", "two", "three"])
    assert (vectors.shape, vectors.dtype) == ((3, 384), np.float32)
    with server.client() as http:
        answer = http.post("/v1/embeddings", json={"input": ["one", "two", "three"]}).json()
    assert np.array_equal(vectors, np.array([entry["embedding"] for entry in answer["data"]], np.float32))


def test_add_search_delete(call: Call) -> None:
    user = f"handle-{uuid.uuid4()}"
    texts = ["The dentist is on Monday.", {"text": "Milk is out.", "id": "milk", "metadata": {"list": "shopping"}}]
    assert [entry["status"] for entry in call("add", user, texts)] == ["added", "added"]
    best, other = call("search", user, "What must I buy?", top_k=2)
    assert (best["id"], best["metadata"]) == ("milk", {"list": "shopping"})
    call("delete", user, "milk")
    (left,) = call("search", user, "What must I buy?")
    assert left["id"] == other["id"]


def test_errors_keep_their_class_and_their_param(call: Call) -> None:
    user = f"handle-{uuid.uuid4()}"
    with pytest.raises(InvalidRequest) as invalid:
        call("embed", ["fine", ""])
    assert invalid.value.param == "input.1"
    with pytest.raises(InvalidRequest) as invalid:
        call("search", user, "x", top_k=0)
    assert invalid.value.param == "top_k"
    with pytest.raises(NotFound):
        call("delete", user, "none")
    call("add", user, [{"id": "1", "text": "a"}])
    with pytest.raises(Conflict):
        call("add", user, [{"id": "1", "text": "b"}])


def test_the_other_methods_have_the_names_of_the_routes(call: Call, driver: ProcessPoolExecutor) -> None:
    user, copy = f"handle-{uuid.uuid4()}", f"handle-{uuid.uuid4()}"
    call("add", user, [{"id": str(n), "text": f"note {n}", "metadata": {"n": n}} for n in range(5)])
    changed = call("update", user, "3", text="changed", if_version=4)
    assert call("get", user, "3") == changed
    assert call("get", user, "3", include_vectors=True)["vector"].shape == (384,)
    assert [event["event"] for event in call("history", user, "3")["events"]] == ["added", "updated"]
    page = call("list", user, limit=2, order="created_at", filter={"n": {"gt": 0}})
    assert [memory["id"] for memory in page["memories"]] == ["1", "2"]
    page = call("list", user, limit=3, order="created_at", cursor=page["next_cursor"])
    assert ([memory["id"] for memory in page["memories"]], page["next_cursor"]) == (["3", "4"], None)
    lines = driver.submit(_stream, "export", (user,)).result(timeout=60)
    assert call("import_lines", copy, b"".join(lines).splitlines()) == {"imported": 5, "unchanged": 0}
    assert driver.submit(_stream, "export", (copy,)).result(timeout=60) == lines
    assert call("delete_where", user, {"n": {"in": [0, 1]}}) == 2
    assert call("user", user)["memories"] == 3
    assert [found["memories"] for found in call("users", prefix=user)["users"]] == [3]
    assert call("delete_user", user)["deleted"] == 3
    with pytest.raises(Conflict):
        call("update", copy, "3", text="x", if_version=1)
    with pytest.raises(InvalidRequest) as invalid:
        call("list", user, limit=0)
    assert invalid.value.param == "limit"
