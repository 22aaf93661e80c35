"""Keys over HTTP: who is let in, what each key reaches, and what a tenant learns of others, which is nothing."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request, Response

from deployments.api import audit, build, embeddings, keys, memories, tei, users
from deployments.api.build import DOCUMENTATION
from deployments.api.http import Routes
from deployments.errors import Unavailable
from deployments.fair_queue import caller_of_request
from deployments.service import Memserve
from tests.local_app import DIM, LocalApp

NOBODY = f"ms_0123456789abcdef_{64 * 'a'}"
GROUPS = (embeddings.routes, tei.routes, memories.routes, users.routes, keys.routes, audit.routes, build.operations)
SCOPES = {route: scope for group in GROUPS for route, scope in group.scopes().items()}


@pytest.fixture
async def keyed(tmp_path: Path) -> AsyncIterator[LocalApp]:
    """An application that asks for keys."""
    app = await LocalApp.start(tmp_path, auth={"mode": "keys"})
    yield app
    await app.stop()


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


class Caller:
    """Makes requests with one key."""

    def __init__(self, app: LocalApp, secret: str) -> None:
        self._app = app
        self._secret = secret

    async def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {**bearer(self._secret), **options.pop("headers", {})}
        return await self._app.http.request(method, path, headers=headers, **options)


async def caller(app: LocalApp, tenant: str, **options: Any) -> Caller:
    return Caller(app, await app.make_key(tenant, **options))


def path_of(path: str) -> str:
    return path.replace(":path", "").format(user_id="ann", memory_id="m", model_id="x", key_id="0123456789abcdef")


def refusals(answers: list[httpx.Response]) -> set[tuple[int, str]]:
    def code(answer: httpx.Response) -> str:
        body = answer.json()
        return str(body["code"] if "code" in body else body["error"]["code"])

    return {(answer.status_code, code(answer)) for answer in answers}


async def test_every_route_asks_for_a_key(keyed: LocalApp) -> None:
    for (method, path), scope in SCOPES.items():
        answer = await keyed.http.request(method, path_of(path))
        if scope is None:
            assert answer.status_code == 200, path
        else:
            assert refusals([answer]) == {(401, "missing_key")}, path
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_path_of_no_route_asks_for_a_key(keyed: LocalApp) -> None:
    asked = [
        ("GET", "/nowhere"),
        ("PUT", "/v1/users"),
        ("OPTIONS", "/v1/users"),
        ("GET", "/health/"),
        ("GET", "/docs/"),
    ]
    assert refusals([await keyed.http.request(*one) for one in asked]) == {(401, "missing_key")}
    assert refusals([await keyed.http.get("/%68ealth")]) == {(401, "missing_key")}


async def test_the_documentation_needs_no_key(keyed: LocalApp) -> None:
    assert {(await keyed.http.get(path)).status_code for path in DOCUMENTATION} == {200}


@pytest.mark.parametrize(
    "headers", [bearer(NOBODY), bearer("sk-1"), {"x-api-key": ""}, {"authorization": "Basic YTpi"}]
)
async def test_a_key_that_does_not_exist_is_refused(keyed: LocalApp, headers: dict[str, str]) -> None:
    answer = await keyed.http.get("/v1/users", headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json()["error"] == {
        "message": "This key is unknown here, was revoked or has expired.",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_key",
    }
    assert [type(error).__name__ for error in keyed.errors] == ["Unauthorized"]


async def test_the_body_of_a_refused_request_is_not_read(keyed: LocalApp) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError
        yield b""

    assert refusals([await keyed.http.post("/v1/embeddings", content=body())]) == {(401, "missing_key")}


async def test_each_header_carries_the_key(keyed: LocalApp) -> None:
    secret = await keyed.make_key("acme")
    for headers in (bearer(secret), {"authorization": f"Token {secret}"}, {"x-api-key": secret}):
        assert (await keyed.http.get("/v1/models", headers=headers)).status_code == 200
    assert [name for name, _ in keyed.store.calls if name == "find_keys"] == ["find_keys"]


async def test_a_key_is_refused_once_it_is_revoked(keyed: LocalApp) -> None:
    app, call = keyed, await caller(keyed, "acme")
    assert (await call("GET", "/v1/users")).status_code == 200
    (key,) = (await app.store.deployment.run("keys", ("test", False, None, 1), "acme")).keys
    await app.store.deployment.run("revoke_key", ("test", False, None, 1), "acme", key.id)
    app.gateway._keys.forget(key.id)  # as if five seconds had passed
    assert refusals([await call("GET", "/v1/users")]) == {(401, "invalid_key")}


async def test_a_page_that_may_call_the_server_needs_a_key_for_its_requests_alone(keyed: LocalApp) -> None:
    origin = {"origin": "https://ours.example"}
    api = build.build_api(
        keyed.gateway, keyed.errors.append, find_key=keyed.gateway.find_key, cors_origins=[origin["origin"]]
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://memserve") as browser:
        asked = {**origin, "access-control-request-method": "GET", "access-control-request-headers": "authorization"}
        preflight = await browser.options("/v1/users", headers=asked)
        answer = await browser.get("/v1/users", headers=origin)
    assert (preflight.status_code, answer.status_code) == (200, 401)
    assert {one.headers["access-control-allow-origin"] for one in (preflight, answer)} == {origin["origin"]}


async def test_without_the_store_unknown_keys_get_503(keyed: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    known = await caller(keyed, "acme")
    assert (await known("GET", "/v1/models")).status_code == 200

    async def away(*_: Any) -> Any:
        raise Unavailable("The store is not available; try again.")

    monkeypatch.setattr(keyed.gateway._keys, "_find", away)
    answer = await keyed.http.get("/v1/models", headers=bearer(NOBODY))
    assert (refusals([answer]), answer.headers["retry-after"]) == ({(503, "keys_unavailable")}, "1")
    assert (await known("POST", "/v1/embeddings", json={"input": "tea"})).status_code == 200


async def test_a_key_that_only_writes_gets_no_content_from_any_write(keyed: LocalApp) -> None:
    owner, writer = [await caller(keyed, "acme", scopes=scopes) for scopes in (("read", "write"), ("write",))]
    memory = {"id": "m", "text": "SECRET", "metadata": {"of": "SECRET"}, "thread": "SECRET"}
    later = {"happened_at": "2031-01-01T00:00:00Z", "expires_at": "2031-01-01T00:00:00Z"}
    writes = {(method, path_of(path)) for (method, path), scope in SCOPES.items() if scope == "write"}
    for method, path, options in ABOUT_ANN:
        if (method, path) in writes:
            await owner("DELETE", "/v1/users/ann")
            await owner("POST", "/v1/users/ann/memories", json={**memory, **later})
            answer = await writer(method, path, **options)
            assert answer.status_code != 403, path
            assert "SECRET" not in answer.text and "2031" not in answer.text


@pytest.mark.parametrize(
    "change", [{"metadata_merge": {}}, {"text": "tea"}, {"text": "coffee"}, {"vector": [1.0] * DIM}]
)
async def test_a_key_that_only_writes_gets_no_content_of_a_memory_that_it_changes(
    keyed: LocalApp, change: dict[str, Any]
) -> None:
    owner, writer = [await caller(keyed, "acme", scopes=scopes) for scopes in (("read", "write"), ("write",))]
    await owner("POST", "/v1/users/ann/memories", json={"id": "m", "text": "tea", "metadata": {"a": 1}, "thread": "t"})
    answer = await writer("PATCH", "/v1/users/ann/memories/m", json=change)
    found = (await owner("GET", "/v1/users/ann/memories/m")).json()
    assert answer.status_code == 200
    assert answer.json() == {name: found[name] for name in ("id", "user_id", "created_at", "updated_at", "version")}
    assert (await owner("PATCH", "/v1/users/ann/memories/m", json={"metadata_merge": {}})).json() == found


@pytest.mark.parametrize("scope", ["read", "write", "admin"])
async def test_a_key_is_admitted_to_the_routes_of_its_scopes(keyed: LocalApp, scope: str) -> None:
    call = await caller(keyed, "acme", scopes=(scope,))
    for (method, path), needed in SCOPES.items():
        answer = await call(method, path_of(path))
        refused = answer.status_code == 403
        assert refused is (needed not in (None, "any", scope)), path
        if refused:
            assert refusals([answer]) == {(403, "insufficient_scope")}
            assert f"`{needed}`" in str(answer.json())


def test_a_route_cannot_be_declared_without_its_scope() -> None:
    routes = Routes("test")

    async def handler(_: Memserve, __: Request) -> Response:
        raise AssertionError

    with pytest.raises(TypeError):
        routes.add("GET", "/new")(handler)  # type: ignore[call-arg]


def test_a_route_without_a_scope_has_no_parameters_and_reads() -> None:
    assert [route for route, scope in SCOPES.items() if scope is None and (route[0] != "GET" or "{" in route[1])] == []


def test_what_each_route_needs() -> None:
    """Every new route is put here by hand, so that its scope is decided, not copied."""
    assert sorted((path, method) for (method, path), scope in SCOPES.items() if scope == "write") == [
        ("/v1/memories", "POST"),
        ("/v1/users/{user_id}", "DELETE"),
        ("/v1/users/{user_id}/import", "POST"),
        ("/v1/users/{user_id}/memories", "DELETE"),
        ("/v1/users/{user_id}/memories", "POST"),
        ("/v1/users/{user_id}/memories/{memory_id}", "DELETE"),
        ("/v1/users/{user_id}/memories/{memory_id}", "PATCH"),
    ]
    assert sorted((path, method) for (method, path), scope in SCOPES.items() if scope == "admin") == [
        ("/metrics", "GET"),
        ("/v1/events", "GET"),
        ("/v1/keys", "GET"),
        ("/v1/keys", "POST"),
        ("/v1/keys/{key_id}", "DELETE"),
    ]
    assert [path for (_, path), scope in SCOPES.items() if scope == "any"] == ["/v1/keys/self"]
    assert sorted(path for (_, path), scope in SCOPES.items() if scope is None) == [
        "/health",
        "/health/live",
        "/health/ready",
        "/ping",
    ]


ADDED = {"memories": [{"id": "m", "text": "Ann drinks tea."}]}
ABOUT_ANN: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("POST", "/v1/users/ann/memories", {"json": {"id": "n", "text": "tea"}}),
    ("POST", "/v1/users/ann/memories/search", {"json": {"query": "tea"}}),
    ("POST", "/v1/users/ann/memories/search", {"json": {"vector": [1.0] * 32}}),
    ("POST", "/v1/users/ann/memories/get", {"json": {"ids": ["m"]}}),
    ("POST", "/v1/users/ann/memories/duplicates", {"json": {"score": 0.5}}),
    ("GET", "/v1/users/ann/memories", {}),
    ("DELETE", "/v1/users/ann/memories", {"json": {"filter": {}}}),
    ("DELETE", "/v1/users/ann/memories", {"json": {"ids": ["m"]}}),
    ("GET", "/v1/users/ann/memories/m", {}),
    ("GET", "/v1/users/ann/memories/none", {}),
    ("PATCH", "/v1/users/ann/memories/m", {"json": {"text": "coffee"}}),
    ("DELETE", "/v1/users/ann/memories/m", {}),
    ("GET", "/v1/users/ann/memories/m/history", {}),
    ("GET", "/v1/users/ann", {}),
    ("GET", "/v1/users/ann/export", {}),
    ("POST", "/v1/users/ann/import", {"content": b'{"id":"n","text":"tea"}'}),
    ("DELETE", "/v1/users/ann", {}),
)


def test_the_requests_above_are_of_every_route_about_one_user() -> None:
    about_one = {(method, path_of(path)) for method, path in SCOPES if "{user_id}" in path}
    assert about_one <= {(method, path) for method, path, _ in ABOUT_ANN}


async def test_a_key_of_one_user_reaches_no_other_and_learns_nothing_of_them(keyed: LocalApp) -> None:
    acme, bob = await caller(keyed, "acme"), await caller(keyed, "acme", user_id="bob")
    never = [await bob(*one[:2], **one[2]) for one in ABOUT_ANN]
    assert (await acme("POST", "/v1/users/ann/memories", json=ADDED)).status_code == 201
    calls = len(keyed.store.calls)
    there = [await bob(*one[:2], **one[2]) for one in ABOUT_ANN]
    assert len(keyed.store.calls) == calls  # the store is not asked, so it cannot matter whether the user exists
    assert [(one.status_code, one.content) for one in never] == [(one.status_code, one.content) for one in there]
    assert {one.status_code for one in there} == {404}
    assert {one.json()["error"]["message"] for one in there} == {"user_id: there is no user 'ann'"}
    assert (await acme("GET", "/v1/users/ann")).json()["memories"] == 1


async def test_the_404_of_another_user_is_that_of_a_user_who_never_was(keyed: LocalApp) -> None:
    acme, bob = await caller(keyed, "acme"), await caller(keyed, "acme", user_id="bob")
    for method, path in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("GET", "/history")):
        asked = method, f"/v1/users/ann/memories/m{path}"
        options = {"json": {"text": "tea"}} if method == "PATCH" else {}
        assert (await bob(*asked, **options)).content == (await acme(*asked, **options)).content


async def test_a_key_of_one_user_does_all_with_that_user(keyed: LocalApp) -> None:
    ann = await caller(keyed, "acme", user_id="ann")
    assert (await ann("POST", "/v1/users/ann/memories", json=ADDED)).status_code == 201
    assert {(await ann(*one[:2], **one[2])).status_code // 100 for one in ABOUT_ANN[:5]} == {2}
    assert (await ann("POST", "/v1/embeddings", json={"input": "tea"})).status_code == 200


async def test_a_key_of_one_user_reaches_nothing_of_the_whole_tenant(keyed: LocalApp) -> None:
    ann = await caller(keyed, "acme", user_id="ann")
    memory = {"user_id": "ann", "text": "tea"}
    answers = [await ann("GET", "/v1/users"), await ann("POST", "/v1/memories", json={"memories": [memory]})]
    assert refusals(answers) == {(403, "insufficient_scope")}
    assert (await ann("GET", "/v1/users/ann")).json()["memories"] == 0


async def test_two_tenants_have_users_and_memories_of_the_same_names(keyed: LocalApp) -> None:
    one, other = await caller(keyed, "one"), await caller(keyed, "other")
    for call, text in ((one, "Ann drinks tea."), (other, "Ann plays chess.")):
        added = await call("POST", "/v1/users/ann/memories", json={"id": "m", "text": text})
        assert added.json() == {"memories": [{"id": "m", "status": "added", "version": 1}], "version": 1}
    for call, text in ((one, "Ann drinks tea."), (other, "Ann plays chess.")):
        assert (await call("GET", "/v1/users/ann/memories/m")).json()["text"] == text
        found = await call("POST", "/v1/users/ann/memories/search", json={"query": text})
        assert [memory["text"] for memory in found.json()["results"]] == [text]
        assert [user["memories"] for user in (await call("GET", "/v1/users")).json()["users"]] == [1]
    assert (await one("DELETE", "/v1/users/ann")).json()["deleted"] == 1
    assert (await other("GET", "/v1/users/ann")).json()["memories"] == 1


async def test_a_cursor_of_one_tenant_is_refused_by_another(keyed: LocalApp) -> None:
    one, other = await caller(keyed, "one"), await caller(keyed, "other")
    for call in (one, other):
        many = [{"user_id": user, "id": id, "text": f"{id} tea"} for user in ("ann", "bob") for id in ("m", "n")]
        assert (await call("POST", "/v1/memories", json={"memories": many})).status_code == 201
    for path in ("/v1/users", "/v1/users/ann/memories", "/v1/users/ann/memories/m/history"):
        if path.endswith("history"):
            assert (await one("PATCH", path.removesuffix("/history"), json={"text": "coffee"})).status_code == 200
        cursor = (await one("GET", f"{path}?limit=1")).json()["next_cursor"]
        assert (await one("GET", f"{path}?limit=1&cursor={cursor}")).status_code == 200
        refused = await other("GET", f"{path}?limit=1&cursor={cursor}")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "cursor")


async def test_a_handle_call_names_its_tenant(keyed: LocalApp) -> None:
    call, handle = await caller(keyed, "acme"), keyed.gateway
    await handle.add("ann", [{"id": "m", "text": "Ann drinks tea."}], tenant="acme")
    await handle.add("ann", [{"id": "m", "text": "Ann plays chess."}])
    assert (await call("GET", "/v1/users/ann/memories/m")).json()["text"] == "Ann drinks tea."
    assert [(await handle.get("ann", "m", **of))["text"] for of in ({}, {"tenant": "acme"})] == [
        "Ann plays chess.",
        "Ann drinks tea.",
    ]
    assert [user["user_id"] for user in (await handle.users(tenant="other"))["users"]] == []


async def test_an_idempotency_key_is_known_to_those_alone_who_reach_the_same(keyed: LocalApp) -> None:
    callers = [
        await caller(keyed, "one"),
        await caller(keyed, "other"),
        await caller(keyed, "one", user_id="ann"),
        await caller(keyed, "other", user_id="ann"),
    ]
    body, headers = {"text": "tea"}, {"idempotency-key": "k"}
    answers = [await call("POST", "/v1/users/ann/memories", json=body, headers=headers) for call in callers]
    ids = [answer.json()["memories"][0]["id"] for answer in answers]
    assert len(set(ids)) == 4
    again = [await call("POST", "/v1/users/ann/memories", json=body, headers=headers) for call in callers]
    assert [answer.json() for answer in again] == [answer.json() for answer in answers]
    replacement = await caller(keyed, "one")  # a client that gets a new key may send its write again
    repeated = await replacement("POST", "/v1/users/ann/memories", json=body, headers=headers)
    assert repeated.json() == answers[0].json()


@pytest.mark.parametrize("bound", [{}, {"user_id": "ann"}])
async def test_vectors_are_cached_for_those_alone_who_reach_the_same(keyed: LocalApp, bound: dict[str, str]) -> None:
    one, same, other = [await caller(keyed, tenant, **bound) for tenant in ("one", "one", "other")]
    for path, body in (
        ("/v1/embeddings", {"input": "tea"}),
        ("/embed", {"inputs": "coffee"}),
        ("/v1/users/ann/memories/search", {"query": "chess"}),
    ):
        before, embedded = len(keyed.model.texts), []
        for call in (one, same, other, other):
            assert (await call("POST", path, json=body)).status_code == 200
            embedded.append(len(keyed.model.texts) - before)
        assert embedded == [1, 1, 2, 2], path


async def test_a_key_bound_to_a_user_learns_nothing_of_what_its_tenant_has_cached(keyed: LocalApp) -> None:
    tenant, ann = await caller(keyed, "one"), await caller(keyed, "one", user_id="ann")
    for call in (tenant, ann):
        assert (await call("POST", "/v1/embeddings", json={"input": "tea"})).status_code == 200
    assert keyed.model.texts == ["tea", "tea"]


async def test_the_work_of_a_request_counts_as_its_keys(keyed: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    callers: list[str | None] = []
    export_page = keyed.gateway._store.export_page

    async def noted(*args: Any) -> Any:
        callers.append(caller_of_request.get())
        return await export_page(*args)

    monkeypatch.setattr(keyed.gateway._store, "export_page", noted)
    secret = await keyed.make_key("acme")
    assert (await Caller(keyed, secret)("GET", "/v1/users/ann/export")).status_code == 200
    assert callers == [f"key:{secret.split('_')[1]}"]
    assert caller_of_request.get() is None
