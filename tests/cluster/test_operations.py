"""Health, documentation, logs, and the one shape of every error."""

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.cluster.server import Server


def test_health(http: httpx.Client) -> None:
    assert http.get("/health/live").status_code == 200
    for path in ("/health/ready", "/health"):
        assert http.get(path).json() == {
            "status": "ready",
            "model": "all-MiniLM-L6-v2",
            "device": "cpu",
            "dtype": "float32",
        }


def test_docs_describe_the_routes_and_their_bodies(http: httpx.Client) -> None:
    assert "swagger" in http.get("/docs").text
    document = http.get("/openapi.json").json()
    body = document["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/EmbeddingsBody"}
    assert "input" in document["components"]["schemas"]["EmbeddingsBody"]["properties"]


def test_the_log_file_of_each_replica_holds_our_records(server: Server) -> None:
    """From the constructor on, and at once: Serve would keep up to 1,000 records in memory."""
    assert "all-MiniLM-L6-v2 runs on cpu (float32)" in server.log_of("Embedder")
    for deployment in ("Embedder", "Gateway", "Store"):
        assert "user_config applied: {}" in server.log_of(deployment)


def test_the_log_files_are_json_lines(server: Server) -> None:
    for deployment in ("Embedder", "Gateway", "Store"):
        records = [json.loads(line) for line in server.log_of(deployment).splitlines() if line]
        assert records and all({"levelname", "message", "asctime"} <= record.keys() for record in records)


@pytest.mark.parametrize(("given", "kept"), [("my-request.1", True), ("with space", False), ("x" * 129, False)])
def test_the_request_id_comes_back(http: httpx.Client, given: str, kept: bool) -> None:
    answer = http.get("/v1/models", headers={"x-request-id": given})
    assert (answer.headers["x-request-id"] == given) is kept
    assert 1 <= len(answer.headers["x-request-id"]) <= 128
    assert http.get("/v1/models").headers["x-request-id"] != http.get("/v1/models").headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nowhere", b"", 404),
        ("PUT", "/v1/models", b"", 405),
        ("POST", "/v1/embeddings", b"{", 400),
        ("POST", "/v1/embeddings", b'"text"', 400),
        ("POST", "/v1/users/%ff/memories", b'{"text": "a"}', 400),
        ("POST", "/v1/users/a%0Ab/memories", b'{"text": "a"}', 400),
        ("DELETE", "/v1/users/nobody/memories/none", b"", 404),
        ("POST", "/v1/embeddings", b" " * (16 * 1024 * 1024 + 1), 413),
    ],
)
def test_every_error_has_the_same_shape(http: httpx.Client, method: str, path: str, body: bytes, status: int) -> None:
    answer = http.request(method, path, content=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]


def test_an_unread_body_of_unknown_length_is_bounded(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(17):
            yield b" " * 1024 * 1024

    with server.client() as client:
        assert client.post("/v1/embeddings", content=endless()).status_code == 413


def test_what_haproxy_answers_itself_has_the_same_shape(server: Server) -> None:
    with server.client() as client:
        for size in (66_000, 100_000, 125_000):
            answer = client.get("/v1/models", headers={"x": "a" * size})
            assert (answer.status_code, answer.headers["content-type"]) == (431, "application/json")
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["code"] == "headers_too_large"
        assert client.get("/v1/models", headers={"x": "a" * 64_000}).status_code == 200
