"""Limits a minute over HTTP: what counts, what is refused, and what the headers tell."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.rate_limits import RateLimits, SharedBuckets
from tests.api.test_authentication import Caller, caller
from tests.local_app import LocalApp

Start = Callable[..., Awaitable[LocalApp]]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def start(tmp_path: Path, clock: Clock) -> AsyncIterator[Start]:
    """A function that starts an application that asks for keys, with limits that obey the test's clock."""
    async with AsyncExitStack() as stack:

        async def start_one(**limits: Any) -> LocalApp:
            app = await LocalApp.start(tmp_path, auth={"mode": "keys"}, limits=limits)
            stack.push_async_callback(app.stop)
            app.store.deployment._buckets = SharedBuckets(clock)
            app.gateway.rate_limits._clock = clock
            return app

        yield start_one


def limits(answer: httpx.Response) -> dict[str, str]:
    prefix = "x-ratelimit-"
    return {name.removeprefix(prefix): value for name, value in answer.headers.items() if name.startswith(prefix)}


async def embed(one: Caller, *texts: str) -> httpx.Response:
    return await one("POST", "/v1/embeddings", json={"input": list(texts)})


async def test_a_key_without_limits_is_told_of_none(start: Start) -> None:
    app = await start()
    answer = await (await caller(app, "acme"))("GET", "/v1/users")
    assert (answer.status_code, limits(answer)) == (200, {})
    assert "lease" not in [name for name, _ in app.store.calls]


async def test_requests_beyond_the_limit_are_refused(start: Start, clock: Clock) -> None:
    app = await start(requests_per_minute=2)
    one, other = [await caller(app, "acme") for _ in range(2)]
    answers = [await one("GET", "/v1/users") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [limits(answer) for answer in answers] == [
        {"limit-requests": "2", "remaining-requests": "1", "reset-requests": "30s"},
        {"limit-requests": "2", "remaining-requests": "0", "reset-requests": "1m0s"},
        {"limit-requests": "2", "remaining-requests": "0", "reset-requests": "1m0s"},
    ]
    assert answers[2].headers["retry-after"] == "30"
    assert answers[2].json()["error"] == {
        "message": "The key has used its limit of 2 requests a minute. Try again in 30 s.",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert (await other("GET", "/v1/users")).status_code == 200
    clock.now += 30
    assert [(await one("GET", "/v1/users")).status_code for _ in range(2)] == [200, 429]


async def test_the_limits_change_while_the_server_runs(start: Start) -> None:
    app = await start()
    one = await caller(app, "acme")
    assert limits(await one("GET", "/v1/users")) == {}
    await app.gateway.reconfigure({"limits": {"requests_per_minute": 1}})
    assert [(await one("GET", "/v1/users")).status_code for _ in range(2)] == [200, 429]
    await app.gateway.reconfigure({"limits": {"requests_per_minute": None}})
    assert (await one("GET", "/v1/users")).status_code == 200


async def test_a_refused_request_is_not_read(start: Start) -> None:
    app = await start(requests_per_minute=1)
    one = await caller(app, "acme")
    await one("GET", "/v1/users")

    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    answer = await one("POST", "/v1/users/ann/memories", content=body())
    assert answer.status_code == 429


async def test_a_key_has_limits_of_its_own(start: Start) -> None:
    app = await start(requests_per_minute=100)
    one = await caller(app, "acme", requests_per_minute=1, tokens_per_minute=7)
    answers = [await one("GET", "/v1/users") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert limits(answers[1])["limit-requests"] == "1"
    assert limits(answers[1])["limit-tokens"] == "7"


def own_limits(key: dict[str, Any]) -> tuple[int | None, int | None]:
    return key["requests_per_minute"], key["tokens_per_minute"]


async def test_an_admin_makes_no_key_with_higher_limits_than_its_own(start: Start) -> None:
    app = await start(requests_per_minute=100)
    admin = await caller(app, "acme", scopes=["admin"])
    lower = await caller(app, "acme", scopes=["admin"], requests_per_minute=10, tokens_per_minute=50)
    higher = await caller(app, "acme", scopes=["admin"], requests_per_minute=1000)

    async def make(one: Caller, **options: Any) -> httpx.Response:
        return await one("POST", "/v1/keys", json=options)

    for one, most in ((admin, 100), (lower, 10), (higher, 1000)):
        made = await make(one, requests_per_minute=most)
        assert (made.status_code, made.json()["requests_per_minute"]) == (201, most)
        refused = await make(one, requests_per_minute=most + 1)
        assert (refused.status_code, refused.json()["error"]) == (
            400,
            {
                "message": f"requests_per_minute: must be at most {most}, the limit of the key that asks",
                "type": "invalid_request_error",
                "param": "requests_per_minute",
                "code": None,
            },
        )
    assert (await make(lower, tokens_per_minute=51)).json()["error"]["param"] == "tokens_per_minute"
    assert own_limits((await make(lower)).json()) == (10, 50)
    assert own_limits((await make(lower, requests_per_minute=9, tokens_per_minute=None)).json()) == (9, 50)
    assert own_limits((await make(admin, tokens_per_minute=7)).json()) == (None, 7)
    assert own_limits((await make(admin, requests_per_minute=None)).json()) == (None, None)


async def test_without_limits_an_admin_gives_any(start: Start) -> None:
    admin = await caller(await start(), "acme", scopes=["admin"])
    made = await admin("POST", "/v1/keys", json={"requests_per_minute": 1_000_000_000})
    assert (made.status_code, own_limits(made.json())) == (201, (1_000_000_000, None))


async def test_admins_make_as_many_keys_as_their_tenant_may_have(start: Start) -> None:
    admin = await caller(await start(keys_per_tenant=2), "acme", scopes=["admin"])
    answers = [await admin("POST", "/v1/keys") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 403]
    assert answers[1].json()["error"]["code"] == "quota_exceeded"


async def test_tokens_are_charged_as_they_are_read(start: Start, clock: Clock) -> None:
    app = await start(tokens_per_minute=60)
    one = await caller(app, "acme")
    answer = await embed(one, 10 * "word ", 10 * "word ")
    used = answer.json()["usage"]["total_tokens"]
    assert limits(answer) == {
        "limit-tokens": "60",
        "remaining-tokens": str(60 - used),
        "reset-tokens": f"{used}s",
    }
    again = await embed(one, 10 * "word ", 10 * "word ")  # from the cache, and charged alike
    assert limits(again)["remaining-tokens"] == str(60 - 2 * used)


async def test_tokens_beyond_the_limit_are_refused_before_anything_is_queued(start: Start) -> None:
    app = await start(tokens_per_minute=30)
    one = await caller(app, "acme", scopes=["read", "write"])
    assert (await embed(one, 12 * "word ")).status_code == 200
    texts = len(app.model.texts)
    memory = {"text": 20 * "other "}
    for answer in (
        await embed(one, 20 * "other "),
        await one("POST", "/embed", json={"inputs": 20 * "other "}),
        await one("POST", "/v1/users/ann/memories", json=memory),
        await one("POST", "/v1/users/ann/memories/search", json={"query": 20 * "other "}),
        await one("POST", "/v1/users/ann/import", content=b'{"id": "1", "text": "' + 20 * b"other " + b'"}\n'),
    ):
        assert answer.status_code == 429
        assert "rate_limit" in answer.text and "tokens a minute" in answer.text
        assert int(answer.headers["retry-after"]) >= 1
    assert len(app.model.texts) == texts
    assert (await one("GET", "/v1/users/ann")).json()["memories"] == 0
    assert (await one("GET", "/v1/users")).status_code == 200  # embeds nothing


async def test_a_request_that_the_embedder_refuses_is_charged_no_tokens(start: Start) -> None:
    app = await start(tokens_per_minute=1000)
    one = await caller(app, "acme")
    answer = await one("POST", "/v1/embeddings", json={"input": ["word", 300 * "word "], "truncate": "none"})
    assert (answer.status_code, limits(answer)["remaining-tokens"]) == (400, "1000")


async def test_a_refused_request_is_in_the_audit(start: Start) -> None:
    app = await start()
    one = await caller(app, "acme", requests_per_minute=1)
    admin = await caller(app, "acme", scopes=["admin"])
    for _ in range(3):
        await one("GET", "/v1/users")
    events = (await admin("GET", "/v1/events")).json()["events"]
    assert [(e["status"], e["code"], e["count"]) for e in events if e["action"] == "request.refused"] == [
        (429, "rate_limit_exceeded", 2)
    ]


async def test_two_gateways_share_a_limit(start: Start, clock: Clock) -> None:
    app = await start(requests_per_minute=40)
    secret = await app.make_key("acme")
    other = RateLimits(
        app.gateway._store.lease, gateway="other", requests_per_minute=40, tokens_per_minute=None, clock=clock
    )
    one = Caller(app, secret)
    shared = other.of_key(secret.split("_")[1], None, None)
    assert shared is not None and shared.requests is not None
    for _ in range(20):
        await shared.requests.take(1)
    admitted = [(await one("GET", "/v1/users")).status_code for _ in range(30)].count(200)
    assert 18 <= admitted <= 20


async def test_limits_hold_if_the_store_is_away(start: Start) -> None:
    """Embeddings need no store, so a store that does not answer must not stop them."""
    app = await start(requests_per_minute=2)
    one = await caller(app, "acme")
    await one("GET", "/v1/models")
    app.gateway.rate_limits._buckets.clear()
    app.store.die_before += 10 * ["lease"]
    answers = [await embed(one, "text") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
