"""A key that is revoked, or expires, in the middle of a request that lasts."""

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from deployments.calls.transfer import PIECE_LINES
from deployments.errors import Unauthorized
from tests.api.test_authentication import bearer
from tests.local_app import DIM, LocalApp

VECTOR = [1.0] * DIM
IMPORT = "/v1/users/ann/import"
MEMORIES = "/v1/users/ann/memories"
END_KEY = Callable[[], Awaitable[None]]


@pytest.fixture
async def keyed(tmp_path: Path) -> AsyncIterator[LocalApp]:
    """An application that asks for keys."""
    app = await LocalApp.start(tmp_path, auth={"mode": "keys"})
    yield app
    await app.stop()


@pytest.fixture
async def secret(keyed: LocalApp) -> str:
    return await keyed.make_key("acme", expires_at=datetime.now(UTC) + timedelta(hours=1))


@pytest.fixture(params=["revoked", "expired"])
def end_key(request: pytest.FixtureRequest, keyed: LocalApp, secret: str) -> END_KEY:
    """Ends the key, as if this was some seconds ago."""

    async def revoke() -> None:
        id = secret.split("_")[1]
        await keyed.store.deployment.run("revoke_key", ("test", False, None, 1), "acme", id)
        keyed.gateway._keys.forget(id)

    async def expire() -> None:
        keyed.gateway._keys._now = lambda: datetime.now(UTC) + timedelta(hours=2)

    return revoke if request.param == "revoked" else expire


def lines(first: int, count: int, **fields: Any) -> bytes:
    return b"".join(orjson.dumps({"id": str(n), "text": "tea", **fields}) + b"\n" for n in range(first, first + count))


async def stored(app: LocalApp) -> int:
    return (await app.gateway.user("ann", tenant="acme"))["memories"]


@pytest.mark.parametrize("fields", [{}, {"vector": VECTOR}])
async def test_an_import_ends_at_the_page_after_its_key_has_ended(
    keyed: LocalApp, secret: str, end_key: END_KEY, fields: dict[str, Any]
) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield lines(0, PIECE_LINES + 50, **fields)
        await end_key()
        yield lines(PIECE_LINES + 50, 350, **fields)

    answer = await keyed.http.post(IMPORT, content=body(), headers=bearer(secret))
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json()["error"] == {
        "message": f"lines.{PIECE_LINES}: This key is unknown here, was revoked or has expired.",
        "type": "authentication_error",
        "param": f"lines.{PIECE_LINES}",
        "code": "invalid_key",
    }
    assert await stored(keyed) == PIECE_LINES
    assert sum(len(texts) for texts in keyed.model.texts) in (0, PIECE_LINES * len("tea"))
    assert [key[1] for key in keyed.gateway.refused._counts] == ["acme"]


async def test_a_body_that_is_complete_after_its_key_has_ended_is_refused(
    keyed: LocalApp, secret: str, end_key: END_KEY
) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b'{"text": '
        await end_key()
        yield b'"tea"}'

    answer = await keyed.http.post(MEMORIES, content=body(), headers=bearer(secret))
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_key")
    assert await stored(keyed) == 0


async def test_an_export_breaks_off_at_the_page_after_its_key_has_ended(
    keyed: LocalApp, secret: str, end_key: END_KEY, monkeypatch: pytest.MonkeyPatch
) -> None:
    await keyed.gateway.import_lines("ann", lines(0, 500, vector=VECTOR).splitlines(), tenant="acme")
    export_page = keyed.gateway._store.export_page
    pages = []

    async def page(*args: Any) -> Any:
        pages.append(await export_page(*args))
        if len(pages) == 2:
            await end_key()
        return pages[-1]

    monkeypatch.setattr(keyed.gateway._store, "export_page", page)
    transport = httpx.ASGITransport(app=keyed.api)
    async with httpx.AsyncClient(transport=transport, base_url="http://memserve", headers=bearer(secret)) as http:
        with pytest.raises(RuntimeError) as broken:  # so the server closes the connection in the middle of the answer
            await http.get("/v1/users/ann/export")
    assert isinstance(broken.value.__cause__, Unauthorized)
    assert len(pages) == 2
