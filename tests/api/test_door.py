"""The door: requests that a web page may make through a browser on this machine are refused."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.api.build import build_api
from deployments.api.door import _MAX_HOSTS, Door
from deployments.errors import Forbidden
from tests.local_app import LocalApp

ADD = "/v1/users/ann/memories"


@pytest.fixture
async def browser(app: LocalApp) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the routes behind a door."""
    api = build_api(app.gateway, app.errors.append, loopback_only=True, cors_origins=["https://ours.example"])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://127.0.0.1:8000") as http:
        yield http


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "127.0.0.1", "127.1.2.3:1", "localhost:8000", "LOCALHOST", "app.localhost:8000", "[::1]:8000"],
)
async def test_a_loopback_host_is_admitted(browser: httpx.AsyncClient, host: str) -> None:
    assert (await browser.get("/health/live", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "evil.example#127.0.0.1",
        "localhost.evil.example",
        "evillocalhost",
        "10.0.0.1:8000",
        "0.0.0.0:8000",
        "[::]:8000",
        "",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_foreign_host_is_refused(app: LocalApp, browser: httpx.AsyncClient, method: str, host: str) -> None:
    """A page whose name was made to resolve to 127.0.0.1 sends its own name."""
    answer = await browser.request(method, ADD, headers={"host": host}, json={"text": "planted"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (403, "permission_error", "foreign_host")
    assert (await app.http.get(ADD)).json()["memories"] == []
    assert [type(one) for one in app.errors] == [Forbidden]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:3000"},
        {"origin": "http://evil.127.0.0.1:8000"},
        {"origin": "https://ours.example.evil.example"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
    ],
)
@pytest.mark.parametrize("method", ["POST", "DELETE", "PATCH", "PUT"])
async def test_a_write_from_a_page_of_another_origin_is_refused(
    app: LocalApp, browser: httpx.AsyncClient, method: str, headers: dict[str, str]
) -> None:
    answer = await browser.request(method, ADD, headers=headers, content=b'{"text": "planted"}')
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (403, "permission_error", "foreign_origin")
    assert (await app.http.get(ADD)).json()["memories"] == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"},
        {"origin": "https://ours.example", "sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "none"},
        {"content-type": "application/json; charset=utf-8"},
        {"content-type": "application/octet-stream"},
        {"content-type": "text"},
    ],
)
async def test_programs_and_pages_of_allowed_origins_may_write(
    browser: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    answer = await browser.post(ADD, headers=headers, content=b'{"text": "tea"}')
    assert answer.status_code == 201


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        ("text/plain", "text/plain"),
        ("text/plain;charset=UTF-8", "text/plain"),
        ("Text/Plain ; application/json", "text/plain"),
        ("application/x-www-form-urlencoded", "application/x-www-form-urlencoded"),
        ("multipart/form-data; boundary=x", "multipart/form-data"),
    ],
)
@pytest.mark.parametrize("origin", [None, "http://127.0.0.1:8000", "https://ours.example"])
async def test_a_body_that_a_page_may_send_without_asking_is_refused(
    app: LocalApp, browser: httpx.AsyncClient, origin: str | None, sent: str, kind: str
) -> None:
    headers = {"content-type": sent} if origin is None else {"content-type": sent, "origin": origin}
    for method in ("POST", "DELETE", "PATCH", "PUT"):
        answer = await browser.request(method, ADD, headers=headers, content=b'{"text": "planted"}')
        assert (answer.status_code, answer.json()["error"]) == (
            415,
            {
                "message": f"A body of type {kind} may come from a web page. Send the header 'content-type: "
                "application/json' (curl does so with --json in place of -d).",
                "type": "invalid_request_error",
                "param": None,
                "code": "unsupported_type",
            },
        )
        assert "accept-encoding" not in answer.headers
    assert (await app.http.get(ADD)).json()["memories"] == []
    assert (await browser.get(ADD, headers=headers)).status_code == 200


async def test_a_page_of_an_allowed_origin_alone_may_read_answers(browser: httpx.AsyncClient) -> None:
    for origin, allowed in (("https://ours.example", "https://ours.example"), ("https://evil.example", None)):
        asked = {"origin": origin, "access-control-request-method": "POST"}
        preflight = await browser.options(ADD, headers=asked)
        answer = await browser.get("/health/live", headers={"origin": origin})
        assert answer.status_code == 200
        assert [one.headers.get("access-control-allow-origin") for one in (preflight, answer)] == [allowed, allowed]


async def test_without_origins_no_answer_has_headers_for_other_pages(app: LocalApp) -> None:
    answer = await app.http.get("/health/live", headers={"origin": "https://evil.example"})
    assert [name for name in answer.headers if name.startswith("access-control")] == []


async def test_a_route_of_tei_is_refused_in_teis_shape(browser: httpx.AsyncClient) -> None:
    answer = await browser.post("/embed", headers={"origin": "null"}, json={"inputs": "tea"})
    assert (answer.status_code, answer.json()["code"]) == (403, "foreign_origin")
    assert set(answer.json()) == {"error", "error_type", "param", "code"}


async def test_an_open_server_has_no_door(app: LocalApp) -> None:
    answer = await app.http.post(ADD, headers={"host": "a.example", "origin": "null"}, json={"text": "tea"})
    assert answer.status_code == 201


def door() -> Door:
    async def app(*_: Any) -> None:
        raise AssertionError

    return Door(app, allowed=[], error_bodies={}, on_error=lambda _: None)


def scope(*headers: tuple[bytes, bytes], method: str = "POST") -> dict[str, Any]:
    return {"type": "http", "method": method, "path": "/", "headers": headers}


def test_a_request_without_a_host_is_not_from_a_browser() -> None:
    assert door()._refusal(scope()) is None


def test_each_of_several_hosts_must_be_a_loopback_name() -> None:
    refusal = door()._refusal(scope((b"host", b"localhost"), (b"host", b"evil.example")))
    assert refusal is not None and refusal.code == "foreign_host"


def test_hosts_are_remembered_up_to_a_bound() -> None:
    one = door()
    for n in range(2 * _MAX_HOSTS):
        assert one._refusal(scope((b"host", b"localhost:%d" % n))) is None
    assert len(one._loopback_hosts) == _MAX_HOSTS


@given(st.binary(max_size=40))
def test_no_host_makes_the_door_fail(host: bytes) -> None:
    refusal = door()._refusal(scope((b"host", host)))
    assert refusal is None or refusal.code == "foreign_host"


def test_the_door_takes_microseconds() -> None:
    one = door()
    request = scope((b"host", b"127.0.0.1:8000"), *((b"header-%d" % n, b"value") for n in range(10)))
    took_s = []
    for _ in range(20):
        began = time.thread_time()
        for _ in range(1_000):
            one._refusal(request)
        took_s.append((time.thread_time() - began) / 1_000)
    assert min(took_s) < 20e-6  # about 1.5 us
