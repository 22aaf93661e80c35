"""Paths, queries and bodies as they arrive, and the common shape of errors, in this process."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import orjson
import pytest
from jsonschema import ValidationError
from starlette.routing import Match, Route

from deployments.api import docs
from deployments.api.build import build_api
from deployments.api.http import json_response, json_rows
from deployments.errors import InvalidRequest
from store import DEFAULT_TENANT, Append, InvalidInput, NewMemory
from tests.documented import Document
from tests.local_app import DIM, LocalApp

AWKWARD = ["a/b", "100%25", "a?b#c&d=e", "ü 茶 🍵", "...", "%2F", "+", "a;b", "\u2028", "x" * 256]


@pytest.mark.parametrize("name", AWKWARD)
async def test_any_id_can_be_used_in_a_path(api: httpx.AsyncClient, name: str) -> None:
    segment = quote(name, safe="").replace(".", "%2E")
    user = f"/v1/users/{segment}"
    assert (await api.post(f"{user}/memories", json={"text": "tea", "id": name})).status_code == 201
    found = (await api.get(f"{user}/memories/{segment}")).json()
    assert (found["id"], found["user_id"]) == (name, name)
    assert (await api.get(user)).json()["user_id"] == name
    assert [one["user_id"] for one in (await api.get("/v1/users")).json()["users"]] == [name]
    assert (await api.delete(f"{user}/memories/{segment}")).status_code == 204


@pytest.mark.parametrize("dots", [".", ".."])
async def test_ids_that_clients_remove_from_a_path_are_refused(app: LocalApp, dots: str) -> None:
    api, gateway, message = app.http, app.gateway, "must not be . or .., which clients remove from a path"
    segment = dots.replace(".", "%2E")
    for path, body, param in [
        ("/v1/users/ann/memories", {"text": "tea", "id": dots}, "id"),
        ("/v1/users/ann/memories", {"memories": [{"text": "tea"}, {"text": "tea", "id": dots}]}, "memories.1.id"),
        (f"/v1/users/{segment}/memories", {"text": "tea"}, "user_id"),
        ("/v1/memories", {"memories": [{"user_id": dots, "text": "tea"}]}, "memories.0.user_id"),
        (f"/v1/users/{segment}/import", {"id": "1", "text": "tea"}, "user_id"),
    ]:
        refused = await api.post(path, json=body)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["message"], error["param"]) == (f"{param}: {message}", param)
    line = {"id": dots, "text": "tea"}
    assert (await api.post("/v1/users/ann/import", json=line)).json()["error"]["param"] == "lines.0.id"
    for call, param in (
        (gateway.add(dots, ["tea"]), "user_id"),
        (gateway.import_lines(dots, [line]), "user_id"),
        (gateway.import_lines("ann", [line]), "lines.0.id"),
    ):
        with pytest.raises((InvalidRequest, InvalidInput)) as caught:
            await call
        assert caught.value.param == param
    assert app.model.texts == []
    assert (await api.get("/v1/users")).json()["users"] == []


async def test_ids_that_are_refused_today_can_be_read_and_deleted(
    app: LocalApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, user = app.http, "/v1/users/%2E%2E"
    with monkeypatch.context() as before:
        before.setattr("store.log.appending.check_new_id", lambda *_: None)
        before.setattr("store.log.rows.check_new_id", lambda *_: None)
        new = NewMemory(id="..", text="tea", vector=np.ones(DIM, np.float32))
        await app.store.deployment.run(
            "append_together", ("a caller", False, None, 1), [[Append(DEFAULT_TENANT, "..", (new,))]]
        )
    found = (await api.get(f"{user}/memories/%2E%2E")).json()
    assert (found["user_id"], found["id"], found["text"]) == ("..", "..", "tea")
    assert (await api.get(f"{user}/memories")).json()["memories"] == [found]
    assert (await app.gateway.list(".."))["memories"] == [await app.gateway.get("..", "..")]
    assert [event["event"] for event in (await api.get(f"{user}/memories/%2E%2E/history")).json()["events"]] == [
        "added"
    ]
    assert len((await api.post(f"{user}/memories/search", json={"query": "tea"})).json()["results"]) == 1
    assert (await api.get(user)).json()["memories"] == 1
    assert orjson.loads((await api.get(f"{user}/export")).content)["id"] == ".."
    assert (await api.delete(f"{user}/memories/%2E%2E")).status_code == 204
    assert (await api.get(f"{user}/memories")).json()["memories"] == []
    assert (await api.delete(user)).status_code == 200


@pytest.mark.parametrize(
    ("segment", "param"),
    [("%ff", "user_id"), ("a%0Ab", "user_id"), ("%C2%85", "user_id"), ("x" * 257, "user_id"), ("a%00", "user_id")],
)
async def test_a_wrong_id_in_a_path_is_named(api: httpx.AsyncClient, segment: str, param: str) -> None:
    for method, path in [
        ("POST", f"/v1/users/{segment}/memories"),
        ("GET", f"/v1/users/{segment}/memories"),
        ("DELETE", f"/v1/users/{segment}/memories"),
        ("GET", f"/v1/users/{segment}/memories/1"),
        ("GET", f"/v1/users/{segment}"),
        ("DELETE", f"/v1/users/{segment}"),
        ("GET", f"/v1/users/{segment}/export"),
        ("POST", f"/v1/users/{segment}/import"),
    ]:
        answer = await api.request(method, path)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), (method, path)
    for method in ("GET", "PATCH", "DELETE"):
        answer = await api.request(method, f"/v1/users/ann/memories/{segment}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "memory_id")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=1&limit=2", "limit"),
        ("filter=%ff", None),
        ("&".join(f"a{n}=1" for n in range(40)), None),
        ("Limit=1", "Limit"),
        ("filter=%7B%22a%22%3A%7B%22near%22%3A1%7D%7D", "filter.a.near"),
        ("cursor=WyJ1c2VycyIsImEiXQ", "cursor"),
    ],
)
async def test_a_wrong_query_is_refused(api: httpx.AsyncClient, query: str, param: str | None) -> None:
    answer = await api.get(f"/v1/users/ann/memories?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/users/ann"),
        ("DELETE", "/v1/users/ann"),
        ("GET", "/v1/users/ann/export"),
        ("POST", "/v1/users/ann/import"),
        ("POST", "/v1/memories"),
        ("POST", "/v1/users/ann/memories"),
        ("POST", "/v1/users/ann/memories/search"),
        ("PATCH", "/v1/users/ann/memories/1"),
        ("DELETE", "/v1/users/ann/memories/1"),
        ("GET", "/v1/users/ann/memories/1/history"),
    ],
)
async def test_a_parameter_that_a_route_does_not_know_is_named(api: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await api.request(method, f'{path}?filter={{"a":1}}')
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "filter")


async def test_bodies_are_bounded_before_they_are_parsed(tmp_path: Any) -> None:
    app = await LocalApp.start(tmp_path, gateway={"max_body_bytes": 2000})
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 500
            yield b" " * 500

    for path in ("/v1/embeddings", "/v1/memories", "/v1/users/ann/memories", "/v1/users/ann/memories/search"):
        declared = await app.http.post(path, content=b" " * 2001)
        assert (declared.status_code, declared.json()["error"]["code"]) == (413, "body_too_large")
        sent = 0
        assert (await app.http.post(path, content=endless())).status_code == 413
        assert sent <= 3000
        exact = await app.http.post(path, content=b"{" + b" " * 1999)
        assert exact.status_code == 400
    await app.stop()


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/users/ann/memories", "/v1/users/ann/import"])
async def test_a_client_that_disconnects_is_not_a_failure_of_the_server(
    app: LocalApp, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    failed: list[Exception] = []
    arrives = iter([{"type": "http.request", "body": b'{"text"', "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(arrives)

    async def send(_: Any) -> None:
        """Nobody receives the answer."""

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    await build_api(app.gateway, on_error=failed.append)({**scope, "headers": []}, receive, send)
    assert failed == []
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nowhere", 404, "not_found_error"),
        ("PUT", "/v1/users", 405, "invalid_request_error"),
        ("GET", "/v1/models/none", 404, "not_found_error"),
        ("GET", "/v1/users/ann/memories/none", 404, "not_found_error"),
        ("GET", "/v1/users/ann/memories/none/history", 404, "not_found_error"),
        ("DELETE", "/v1/users/ann/memories/none", 404, "not_found_error"),
    ],
)
async def test_every_error_has_the_same_shape(app: LocalApp, method: str, path: str, status: int, kind: str) -> None:
    answer = await app.http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["type"] == kind
    assert len(app.errors) == 1


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/users/ann/memories", "DELETE, GET, HEAD, POST"),
        ("/v1/users/ann/memories/1", "DELETE, GET, HEAD, PATCH"),
        ("/v1/embeddings", "POST"),
        ("/docs", "GET, HEAD"),
    ],
)
async def test_the_answer_to_a_wrong_method_lists_the_allowed_ones(
    api: httpx.AsyncClient, path: str, allowed: str
) -> None:
    for method in ("PUT", "OPTIONS"):
        answer = await api.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)  # RFC 9110, 15.5.6


async def test_an_unexpected_error_reveals_nothing(app: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("a secret of the house")

    monkeypatch.setattr(app.gateway, "users_body", broken)
    answer = await app.http.get("/v1/users")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text


async def test_many_vectors_are_written_in_slices_with_the_same_bytes() -> None:
    vectors = np.random.default_rng(1).standard_normal((300, 1024), np.float32)
    writing = asyncio.create_task(json_rows(vectors))
    turns = 0
    while not writing.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns == 3  # 131,072 numbers in each
    assert json_response({"data": await writing}).body == json_response({"data": vectors}).body
    integers = vectors[:2].astype(np.int8)
    assert json_response(await json_rows(integers)).body == json_response(integers).body


async def test_each_route_is_registered_once_and_documented(app: LocalApp) -> None:
    api = build_api(app.gateway, on_error=app.errors.append)
    served = [(route.path, method) for route in api.routes for method in route.methods]  # type: ignore[attr-defined]
    assert len(served) == len(set(served))
    documented = {
        (path, method.upper()) for path, operations in api.openapi()["paths"].items() for method in operations
    }
    of_the_page = docs.PATHS | {"/openapi.json"}
    assert documented == {
        (path.replace(":path", ""), method) for path, method in served if method != "HEAD" and path not in of_the_page
    }


async def test_a_route_matches_the_paths_that_starlette_says(app: LocalApp) -> None:
    routes = [route for route in app.api.routes if type(route).__name__ == "_QuickRoute"]
    assert len(routes) > 30
    parts = ["v1", "users", "ann", "memories", "search", "a%2Fb", "", "é", "models", "org", "embeddings", ".."]
    chance = random.Random(1)
    paths = ["/" + "/".join(chance.choices(parts, k=chance.randrange(7))) for _ in range(1_000)]
    paths += [route.path.replace("{", "").replace("}", "") + more for route in routes for more in ("", "/", "/x")]
    matched = 0
    for path in paths:
        for method in ("GET", "POST", "HEAD", "OPTIONS"):
            for root_path in ("", "/v1"):
                scope = {"type": "http", "method": method, "path": path, "root_path": root_path}
                for route in routes:
                    found, child = route.matches(scope)
                    assert (found, child) == Route.matches(route, scope)
                    matched += found is Match.FULL
    assert matched > 100


async def test_the_document_describes_bodies_and_queries(api: httpx.AsyncClient) -> None:
    document = (await api.get("/openapi.json")).json()
    paths, components = document["paths"], document["components"]["schemas"]
    for path, method, model in [
        ("/v1/embeddings", "post", "EmbeddingsBody"),
        ("/v1/memories", "post", "AddManyBody"),
        ("/v1/users/{user_id}/memories", "post", "AddBody"),
        ("/v1/users/{user_id}/memories/{memory_id}", "patch", "UpdateBody"),
    ]:
        body = paths[path][method]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{model}"}
        assert model in components
    names = [one["name"] for one in paths["/v1/users/{user_id}/memories"]["get"]["parameters"]]
    assert sorted(names) == ["cursor", "filter", "limit", "order", "user_id", "x-request-timeout-ms"]


OF_EVERY_ROUTE = {"400", "401", "403", "404", "408", "429", "431", "500", "502", "503", "504"}


async def test_the_document_describes_every_answer_and_the_idempotency_key(api: httpx.AsyncClient) -> None:
    document = (await api.get("/openapi.json")).json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            status, *errors = operation["responses"]
            assert status < "300" and all(error >= "400" for error in errors), path
            of_bodies = set() if method == "get" else {"413", "415"}
            assert OF_EVERY_ROUTE | of_bodies <= set(errors) <= OF_EVERY_ROUTE | of_bodies | {"409", "413"}, path
            name = "TeiErrorAnswer" if operation["tags"] == ["TEI"] else "ErrorAnswer"
            for error in errors:
                described = operation["responses"][error]
                if "$ref" in described:
                    shape = "ErrorAnswer" if error in ("408", "431") else name  # HAProxy does not know TEI's shape
                    assert described == {"$ref": f"#/components/responses/{shape}{error}"}
                    described = document["components"]["responses"][f"{shape}{error}"]
                schema = described["content"]["application/json"]["schema"]
                assert schema == {"$ref": f"#/components/schemas/{shape if error in ('408', '431') else name}"}
            contents = operation["responses"][status].get("content", {}).values()
            assert (status == "204") is not any(content["schema"] for content in contents), path
            named = "Idempotency-Key" in {one["name"] for one in operation.get("parameters", ())}
            reads = method == "get" or path.startswith(
                ("/v1/embeddings", "/embed", "/similarity", "/tokenize", "/decode")
            )
            reads = reads or path == "/"
            repeatable_anyway = path.endswith(("/search", "/import", "/get", "/duplicates", "/rerank"))
            reads = reads or path.startswith("/v1/keys")  # the secret of a key is kept nowhere, so it is answered once
            assert named is not (reads or repeatable_anyway), path
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "user_id":
                    assert parameter["schema"]["maxLength"] == 256
    assert "HTTPValidationError" not in document["components"]["schemas"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/users/ann/memories", {"text": "a", "memories": None, "id": None, "expires_at": None, "vector": None}),
        ("/v1/users/ann/memories", {"text": None, "memories": [{"text": "a"}]}),
        ("/v1/users/ann/memories/search", {"query": "q", "vector": None, "filter": None, "min_score": None}),
        ("/v1/users/ann/memories", {"text": "a", "metadata": None, "on_duplicate": None, "upsert": None}),
        ("/v1/users/ann/memories", {"memories": [{"text": "a", "metadata": None}], "metadata": None}),
        ("/v1/memories", {"memories": [{"text": "a", "user_id": "ann", "metadata": None}], "upsert": None}),
        ("/v1/users/ann/memories/search", {"query": None, "vector": [1.0] * DIM}),
        ("/v1/users/ann/memories/search", {"query": "q", "top_k": None, "include_vectors": None}),
        ("/v1/embeddings", {"input": "a", "model": None, "dimensions": None, "user": None, "input_type": None}),
        ("/v1/embeddings", {"input": "a", "encoding_format": None, "truncate": None, "output_dtype": None}),
        ("/embed", {"inputs": "a", "normalize": None, "truncate": None, "truncation_direction": None}),
        ("/tokenize", {"inputs": "a", "add_special_tokens": None}),
    ],
)
async def test_the_document_allows_null_for_a_field_that_may_be_left_out(app: LocalApp, path: str, body: Any) -> None:
    assert (await app.http.post(path, json=body)).is_success  # the client checks the body against the document


async def test_the_check_of_bodies_finds_one_that_is_not_as_described(api: httpx.AsyncClient) -> None:
    document = Document((await api.get("/openapi.json")).json())
    found = httpx.Response(200, json={"results": [], "index": "exact", "version": 0})
    for body, fine in [({"query": "q"}, True), ({"query": None}, False), ({"query": "q", "vector": [1]}, False)]:
        request = httpx.Request("POST", "http://memserve/v1/users/ann/memories/search", json=body)
        with contextlib.nullcontext() if fine else pytest.raises(ValidationError):
            document.check(request, found)


async def test_the_check_of_answers_finds_one_that_is_not_as_described(api: httpx.AsyncClient) -> None:
    document = Document((await api.get("/openapi.json")).json())
    request = httpx.Request("GET", "http://memserve/v1/users/ann%2Fbob/memories/1/history")
    events = [{"event": "added", "at": "2026-01-02T03:04:05Z", "version": 1, "text": "a"}]
    fine: dict[str, Any] = {"events": events, "next_cursor": None}
    document.check(request, httpx.Response(200, json=fine))
    document.check(
        request, httpx.Response(404, json={"error": {"message": "", "type": "", "param": None, "code": None}})
    )
    for status, wrong in [
        (200, {**fine, "events": [{**events[0], "vector": [1.0]}]}),
        (200, {**fine, "events": [{"event": "added", "version": 1}]}),
        (200, {**fine, "events": "none"}),
        (200, {"events": events}),
        (201, fine),
        (404, {"detail": "Not Found"}),
    ]:
        with pytest.raises((AssertionError, ValidationError)):
            document.check(request, httpx.Response(status, json=wrong))
