"""The audit over HTTP: what keys did, and what they were refused."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from deployments.calls.refusals import MAX_KINDS, RefusedRequests
from deployments.errors import HttpError
from store import LogUnavailable, Refusals
from tests.api.test_authentication import Caller, caller
from tests.local_app import LocalApp

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
NOBODY = f"ms_0123456789abcdef_{64 * 'a'}"


@pytest.fixture
async def keyed(tmp_path: Path) -> AsyncIterator[LocalApp]:
    """An application that asks for keys."""
    app = await LocalApp.start(tmp_path, auth={"mode": "keys"})
    app.gateway.refused._now = lambda: NOW
    yield app
    await app.stop()


async def recorded(admin: Caller) -> list[dict[str, Any]]:
    """The events of the caller's tenant, without those of keys."""
    answer = await admin("GET", "/v1/events", params={"limit": 1000})
    assert answer.status_code == 200
    return [event for event in answer.json()["events"] if not event["action"].startswith("key.")]


async def test_writes_over_http_leave_events(keyed: LocalApp) -> None:
    admin = await caller(keyed, "acme", scopes=["admin"])
    writer = await caller(keyed, "acme", scopes=["read", "write"])
    memories = "/v1/users/ann/memories"
    await writer("POST", memories, json={"memories": [{"text": "SECRET one", "id": "1"}, {"text": "two", "id": "2"}]})
    await writer("POST", "/v1/memories", json={"memories": [{"user_id": "bob", "text": "one", "id": "1"}]})
    await writer("PATCH", f"{memories}/1", json={"text": "SECRET changed"})
    await writer("DELETE", f"{memories}/1")
    await writer("DELETE", memories, json={"filter": {"created_at": {"gt": "2020-01-01T00:00:00Z"}}})
    await writer("POST", "/v1/users/eve/import", content=b'{"id": "7", "text": "SECRET import"}\n')
    await writer("DELETE", "/v1/users/bob")
    events = await recorded(admin)
    assert [(event["action"], event["user_id"], event["ids"], event["count"]) for event in events] == [
        ("memories.added", "ann", ["1", "2"], 2),
        ("memories.added", None, [], 1),
        ("memories.updated", "ann", ["1"], 1),
        ("memories.deleted", "ann", ["1"], 1),
        ("memories.deleted", "ann", ["2"], 1),
        ("memories.imported", "eve", ["7"], 1),
        ("user.deleted", None, [], 1),
    ]
    assert len({event["key_id"] for event in events}) == 1 and events[0]["key_id"] is not None
    assert "SECRET" not in str(events)


async def test_refused_requests_are_counted(keyed: LocalApp) -> None:
    admin = await caller(keyed, "acme", scopes=["admin"])
    reader = await caller(keyed, "acme", scopes=["read"])
    for _ in range(3):
        assert (await reader("DELETE", "/v1/users/ann")).status_code == 403
    assert (await Caller(keyed, NOBODY)("GET", "/v1/users")).status_code == 401
    (event,) = await recorded(admin)
    assert (event["action"], event["count"], event["status"], event["code"]) == (
        "request.refused",
        3,
        403,
        "insufficient_scope",
    )
    assert (event["user_id"], event["ids"]) == (None, [])


async def test_a_revoked_key_that_is_tried_is_told_to_its_tenant(keyed: LocalApp) -> None:
    admin = await caller(keyed, "acme", scopes=["admin"])
    secret = await keyed.make_key("acme")
    id = secret.split("_")[1]
    await keyed.store.deployment.run("revoke_key", ("test", False, None, 1), "acme", id)
    assert (await Caller(keyed, secret)("GET", "/v1/users")).status_code == 401
    assert await recorded(admin) == []  # the gateway does not know whose key it was
    keyed.gateway.refused._now = lambda: NOW + timedelta(minutes=1)
    (event,) = await recorded(admin)
    assert (event["key_id"], event["status"], event["code"], event["count"]) == (id, 401, "invalid_key", 1)


async def test_a_tenant_reads_its_own_events(keyed: LocalApp) -> None:
    admin, other = [await caller(keyed, tenant, scopes=["admin", "write"]) for tenant in ("acme", "other")]
    await other("POST", "/v1/users/ann/memories", json={"text": "theirs"})
    await other("GET", "/v1/users")  # without the scope
    assert await recorded(admin) == []
    assert [event["action"] for event in await recorded(other)] == ["memories.added", "request.refused"]


async def test_only_admins_of_the_whole_tenant_read_events(keyed: LocalApp) -> None:
    bound = await caller(keyed, "acme", user_id="ann", scopes=["read", "write"])
    reader = await caller(keyed, "acme", scopes=["read", "write"])
    for one in (bound, reader):
        answer = await one("GET", "/v1/events")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_scope")


async def test_pages_follow_each_other(keyed: LocalApp) -> None:
    admin = await caller(keyed, "acme", scopes=["admin", "write"])
    for n in range(3):
        await admin("POST", "/v1/users/ann/memories", json={"text": "text", "id": str(n)})
    first = (await admin("GET", "/v1/events", params={"limit": 2})).json()
    rest = (await admin("GET", "/v1/events", params={"after": first["next_cursor"]})).json()
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert [event["ids"] for event in first["events"] + rest["events"]][1:] == [["0"], ["1"], ["2"]]
    none = (await admin("GET", "/v1/events", params={"after": rest["next_cursor"]})).json()
    assert none == {"events": [], "next_cursor": rest["next_cursor"], "has_more": False}
    wrong = await admin("GET", "/v1/events", params={"after": "nonsense"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "after")


async def test_a_server_without_keys_records_nothing(app: LocalApp) -> None:
    await app.http.post("/v1/users/ann/memories", json={"text": "text"})
    answer = await app.http.get("/v1/events")
    assert answer.json() == {"events": [], "next_cursor": None, "has_more": False}


def refused(status: int, code: str = "code") -> HttpError:
    return HttpError(status, "type", "message", None, code, None)


class Written:
    """The audit of a test. Attributes: rows that were written; the error to raise."""

    def __init__(self) -> None:
        self.rows: list[Refusals] = []
        self.error: Exception | None = None

    async def __call__(self, refusals: Any) -> None:
        if self.error is not None:
            raise self.error
        self.rows += refusals


async def test_equal_refusals_are_one_row() -> None:
    written = Written()
    requests = RefusedRequests(written, now=lambda: NOW)
    for status in (403, 403, 429, 404, 500, 401):
        requests.count("acme", "key", refused(status))
    await requests.flush_past()
    assert written.rows == []
    requests._now = lambda: NOW + timedelta(minutes=1)
    await requests.flush_past()
    await requests.flush_past()
    assert [(row.tenant, row.key_id, row.status, row.count) for row in written.rows] == [
        ("acme", "key", 403, 2),
        ("acme", "key", 429, 1),
        ("acme", "key", 401, 1),
    ]


async def test_invented_keys_take_a_bounded_number_of_rows() -> None:
    written = Written()
    requests = RefusedRequests(written, now=lambda: NOW)
    for n in range(3 * MAX_KINDS):
        requests.count(None, str(n), refused(401))
    requests._now = lambda: NOW + timedelta(minutes=1)
    await requests.flush_past()
    assert len(written.rows) == MAX_KINDS + 1
    assert sum(row.count for row in written.rows) == 3 * MAX_KINDS


async def test_refusals_are_kept_while_the_log_is_away() -> None:
    written = Written()
    requests = RefusedRequests(written, now=lambda: NOW)
    requests.count("acme", "key", refused(403))
    written.error = LogUnavailable("away")
    with pytest.raises(LogUnavailable):
        await requests.flush("acme")
    requests.count("acme", "key", refused(403))
    written.error = None
    await requests.flush("acme")
    assert [row.count for row in written.rows] == [2]


class Stalled(Written):
    """An audit whose writes wait. Attributes: begun, go_on: events."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, refusals: Any) -> None:
        self.begun.set()
        await self.go_on.wait()
        await super().__call__(refusals)


@pytest.mark.parametrize("tenant", ["acme", None])
@pytest.mark.parametrize("away", [False, True])
async def test_a_reader_that_is_cancelled_loses_no_refusal(tenant: str | None, away: bool) -> None:
    written = Stalled()
    requests = RefusedRequests(written, now=lambda: NOW)
    requests.count(tenant, "key", refused(403))
    requests._now = lambda: NOW + timedelta(minutes=1)
    reader = asyncio.create_task(requests.flush("acme"))
    await written.begun.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    if away:
        written.error = LogUnavailable("away")
    written.go_on.set()
    await asyncio.wait(set(requests._writing))
    written.error = None
    await requests.flush_past()
    assert [(row.tenant, row.count) for row in written.rows] == [(tenant, 1)]


async def test_a_write_that_is_cancelled_loses_no_refusal() -> None:
    written = Stalled()
    requests = RefusedRequests(written, now=lambda: NOW)
    requests.count("acme", "key", refused(403))
    reader = asyncio.create_task(requests.flush("acme"))
    await written.begun.wait()
    for writing in requests._writing:
        writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    written.go_on.set()
    await requests.flush("acme")
    assert [row.count for row in written.rows] == [1]


async def test_a_tenant_that_reads_its_audit_writes_nothing_of_another() -> None:
    written = Written()
    requests = RefusedRequests(written, now=lambda: NOW)
    requests.count("other", "key", refused(403))
    requests._now = lambda: NOW + timedelta(minutes=1)
    await requests.flush("acme")
    assert written.rows == []
    await requests.flush_past()
    assert [row.tenant for row in written.rows] == ["other"]


async def test_refusals_that_could_not_be_written_are_tried_again_later() -> None:
    written = Written()
    written.error = LogUnavailable("away")
    requests = RefusedRequests(written, now=lambda: NOW)
    requests.count("acme", "key", refused(403))
    assert requests._later is not None
    requests._later.cancel()
    requests._later = None
    with pytest.raises(LogUnavailable):
        await requests.flush("acme")
    assert requests._later is not None


async def test_a_write_beyond_the_quota_is_refused(tmp_path: Path) -> None:
    app = await LocalApp.start(tmp_path, auth={"mode": "keys"}, limits={"memories_per_tenant": 1})
    try:
        writer = await caller(app, "acme", scopes=["read", "write"])
        first, second = [await writer("POST", "/v1/users/ann/memories", json={"text": text}) for text in ("one", "two")]
        assert (first.status_code, second.status_code) == (201, 403)
        assert second.json()["error"] == {
            "message": "This would exceed a tenant's quota of memories, which is 1: delete some memories first.",
            "type": "permission_error",
            "param": None,
            "code": "quota_exceeded",
        }
        assert (await (await caller(app, "other"))("POST", "/v1/users/ann/memories", json={"text": "one"})).is_success
    finally:
        await app.stop()


@pytest.mark.parametrize("limits", [{"memories_per_tenant": 3}, {"bytes_per_tenant": 600}])
async def test_the_quota_tells_a_user_nothing_of_the_size_of_the_others(tmp_path: Path, limits: dict[str, int]) -> None:
    app = await LocalApp.start(tmp_path, auth={"mode": "keys"}, limits=limits)
    try:
        ann = await caller(app, "acme", user_id="ann")
        four = {"memories": [{"text": f"text {n}" * 20} for n in range(4)]}
        answers = [await ann("POST", "/v1/users/ann/memories", json=four)]
        await (await caller(app, "acme"))("POST", "/v1/users/bob/memories", json={"text": "of bob"})
        answers.append(await ann("POST", "/v1/users/ann/memories", json=four))
        assert [answer.json()["error"]["code"] for answer in answers] == ["quota_exceeded"] * 2
        assert answers[0].content == answers[1].content
    finally:
        await app.stop()


async def test_a_server_without_an_audit_keeps_no_events(tmp_path: Path) -> None:
    app = await LocalApp.start(tmp_path, auth={"mode": "keys"}, audit={"days": 0})
    try:
        admin = await caller(app, "acme", scopes=["admin", "write"])
        await admin("POST", "/v1/users/ann/memories", json={"text": "one"})
        await admin("GET", "/v1/users")
        assert await recorded(admin) == []
    finally:
        await app.stop()


async def test_a_tenant_that_reads_its_audit_changes_no_row_of_another() -> None:
    written = Written()
    requests = RefusedRequests(written, now=lambda: NOW)
    for tenant in ("acme", "other"):
        requests.count(tenant, "key", refused(403))
    await requests.flush("other")
    requests.count("acme", "key", refused(403))
    await requests.flush("acme")
    assert [(row.tenant, row.count) for row in written.rows] == [("other", 1), ("acme", 2)]
