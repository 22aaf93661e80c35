"""The routes of keys: an admin manages the keys of its own tenant, and those alone."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.errors import InvalidRequest
from store import NotFound
from tests.local_app import LocalApp


@pytest.fixture
async def keyed(tmp_path: Path) -> AsyncIterator[LocalApp]:
    """An application that asks for keys."""
    app = await LocalApp.start(tmp_path, auth={"mode": "keys"})
    yield app
    await app.stop()


async def admin(app: LocalApp, tenant: str) -> dict[str, str]:
    """The headers of an admin of a tenant."""
    return {"x-api-key": await app.make_key(tenant, scopes=("admin",))}


def error_of(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


async def test_an_admin_makes_a_key_that_works_at_once(keyed: LocalApp) -> None:
    headers, http = await admin(keyed, "acme"), keyed.http
    made = await http.post("/v1/keys", headers=headers, json={"user_id": "ann", "label": "phone"})
    assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
    key = made.json()
    assert {name: key[name] for name in ("tenant", "user_id", "scopes", "label", "expires_at", "revoked_at")} == {
        "tenant": "acme",
        "user_id": "ann",
        "scopes": ["read", "write"],
        "label": "phone",
        "expires_at": None,
        "revoked_at": None,
    }
    own = {"authorization": f"Bearer {key['key']}"}
    assert (await http.get("/v1/users/ann", headers=own)).status_code == 200
    assert (await http.get("/v1/users/bob", headers=own)).status_code == 404
    assert (await http.get("/v1/keys/self", headers=own)).json() == {
        "id": key["id"],
        "tenant": "acme",
        "user_id": "ann",
        "scopes": ["read", "write"],
        "label": "phone",
        "expires_at": None,
    }


async def test_the_body_may_be_left_out(keyed: LocalApp) -> None:
    made = (await keyed.http.post("/v1/keys", headers=await admin(keyed, "acme"))).json()
    assert (made["user_id"], made["scopes"], made["label"]) == (None, ["read", "write"], None)


async def test_a_key_is_shown_once(keyed: LocalApp) -> None:
    headers, http = await admin(keyed, "acme"), keyed.http
    made = (await http.post("/v1/keys", headers=headers)).json()
    secret = made.pop("key")
    listed = await http.get("/v1/keys", headers=headers)
    assert listed.json()["keys"][0] == made
    revoked = await http.delete(f"/v1/keys/{made['id']}", headers=headers)
    assert not any(secret[-64:] in answer.text for answer in (listed, revoked))


async def test_a_revoked_key_is_refused_at_once_by_the_gateway_that_revoked_it(keyed: LocalApp) -> None:
    headers, http = await admin(keyed, "acme"), keyed.http
    made = (await http.post("/v1/keys", headers=headers)).json()
    own = {"x-api-key": made["key"]}
    assert (await http.get("/v1/models", headers=own)).status_code == 200
    revoked = (await http.delete(f"/v1/keys/{made['id']}", headers=headers)).json()
    assert revoked["revoked_at"] is not None
    assert error_of(await http.get("/v1/models", headers=own)) == (401, "invalid_key", None)
    again = await http.delete(f"/v1/keys/{made['id']}", headers=headers)
    assert (again.status_code, again.json()["revoked_at"]) == (200, revoked["revoked_at"])
    assert [key["revoked_at"] for key in (await http.get("/v1/keys", headers=headers)).json()["keys"]] == [
        revoked["revoked_at"],
        None,
    ]


async def test_an_admin_sees_and_revokes_the_keys_of_its_own_tenant_alone(keyed: LocalApp) -> None:
    one, other, http = await admin(keyed, "one"), await admin(keyed, "other"), keyed.http
    made = (await http.post("/v1/keys", headers=one)).json()
    assert [key["tenant"] for key in (await http.get("/v1/keys", headers=other)).json()["keys"]] == ["other"]
    foreign = await http.delete(f"/v1/keys/{made['id']}", headers=other)
    never = await http.delete("/v1/keys/0123456789abcdef", headers=other)
    assert foreign.status_code == never.status_code == 404
    assert foreign.text.replace(made["id"], "ID") == never.text.replace("0123456789abcdef", "ID")
    assert (await http.get("/v1/models", headers={"x-api-key": made["key"]})).status_code == 200


async def test_keys_are_listed_in_pages_the_newest_first(keyed: LocalApp) -> None:
    headers, http = await admin(keyed, "acme"), keyed.http
    for label in ("a", "b"):
        await http.post("/v1/keys", headers=headers, json={"label": label})
    first = (await http.get("/v1/keys?limit=2", headers=headers)).json()
    second = (await http.get(f"/v1/keys?limit=2&cursor={first['next_cursor']}", headers=headers)).json()
    assert [key["label"] for page in (first, second) for key in page["keys"]] == ["b", "a", None]
    assert second["next_cursor"] is None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"user_id": ""}, "user_id"),
        ({"user_id": ".."}, "user_id"),
        ({"user_id": "ann", "scopes": ["admin"]}, "scopes"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["delete"]}, "scopes.0"),
        ({"scopes": "read"}, "scopes"),
        ({"label": ""}, "label"),
        ({"label": "a\nb"}, "label"),
        ({"label": "x" * 201}, "label"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"tenant": "other"}, "tenant"),
    ],
)
async def test_a_wrong_field_is_named(keyed: LocalApp, body: dict[str, Any], field: str) -> None:
    answer = await keyed.http.post("/v1/keys", headers=await admin(keyed, "acme"), json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


async def test_without_keys_a_request_is_described_too(app: LocalApp) -> None:
    assert (await app.http.get("/v1/keys/self")).json() == {
        "id": None,
        "tenant": "default",
        "user_id": None,
        "scopes": ["read", "write", "admin"],
        "label": None,
        "expires_at": None,
    }


async def test_the_handle_manages_the_keys_of_the_tenant_that_it_names(keyed: LocalApp) -> None:
    handle = keyed.gateway
    made = await handle.create_key(tenant="acme", label="robot", scopes=["read"])
    assert (await keyed.http.get("/v1/models", headers={"x-api-key": made["key"]})).status_code == 200
    assert [key["label"] for key in (await handle.keys(tenant="acme"))["keys"]] == ["robot"]
    assert (await handle.keys())["keys"] == []
    with pytest.raises(NotFound):
        await handle.revoke_key(made["id"])
    assert (await handle.revoke_key(made["id"], tenant="acme"))["id"] == made["id"]
    for wrong in ("", 5, None):
        with pytest.raises(InvalidRequest) as refused:
            await handle.revoke_key(wrong)  # type: ignore[arg-type]
        assert refused.value.field == "key_id"
