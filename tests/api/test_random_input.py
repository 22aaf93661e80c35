"""Filters, cursors, imports and keys of any content: each is answered, or refused by the name of the field."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.local_app import LocalApp
from tests.repetitions import repetitions

ONE_SERVER = settings(
    max_examples=repetitions(200, quick=30),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MEMORIES = "/v1/users/ann/memories"

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6)
OPERATORS = st.sampled_from(
    ["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin", "contains", "icontains", "exists", "near", ""]
)
NAMES = st.sampled_from(
    ["topic", "a.b", "created_at", "updated_at", "id", "metadata.id", "AND", "OR", "NOT", ""]
) | st.text(max_size=4)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(OPERATORS, SCALARS | st.lists(SCALARS), max_size=2)
FILTERS = st.recursive(
    st.dictionaries(NAMES, VALUES, max_size=3),
    lambda inner: st.dictionaries(
        st.sampled_from(["AND", "OR", "NOT", "topic"]), inner | st.lists(inner, max_size=3), max_size=2
    ),
    max_leaves=12,
)


def refused(answer: httpx.Response, field: str) -> bool:
    """Whether a request was refused because of a field, and not answered."""
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200:
        return False
    param = answer.json()["error"]["param"]
    assert param is not None and param.split(".")[0] == field, answer.text
    return True


@ONE_SERVER
@given(FILTERS)
async def test_any_filter_is_answered_or_refused(app: LocalApp, given_filter: dict[str, Any]) -> None:
    """By all routes alike, whether it is in a body or in a query."""
    await app.gateway.add(
        "ann", [{"id": "m", "text": "tea", "metadata": {"topic": "drinks", "a": {"b": 1}}}], upsert=True
    )
    text = json.dumps(given_filter)
    listed = refused(await app.http.get(MEMORIES, params={"filter": text}), "filter")
    body = {"query": "tea", "filter": given_filter}
    content = json.dumps(body)
    assert refused(await app.http.post(f"{MEMORIES}/search", content=content), "filter") is listed
    deleted = await app.http.request("DELETE", MEMORIES, content=json.dumps({"filter": given_filter}))
    assert refused(deleted, "filter") is listed


PAGED = ["/v1/users", MEMORIES, f"{MEMORIES}/m/history"]


@pytest.fixture
async def cursors(app: LocalApp) -> dict[str, str]:
    """A cursor of the server for each path in pages."""
    for user in ("ann", "bob"):
        await app.gateway.add(user, [{"id": "m", "text": f"tea of {user}"}, {"id": "n", "text": "coffee"}])
    await app.gateway.update("ann", "m", text="cocoa")
    return {path: (await app.http.get(path, params={"limit": 1})).json()["next_cursor"] for path in PAGED}


@pytest.mark.parametrize("path", PAGED)
@ONE_SERVER
@given(text=st.text(max_size=40) | st.binary(max_size=30).map(lambda raw: raw.decode("latin-1")))
async def test_a_cursor_of_another_origin_is_refused(
    app: LocalApp, cursors: dict[str, str], path: str, text: str
) -> None:
    for cursor in (text, *(cursors[other] for other in PAGED if other != path)):
        assert refused(await app.http.get(path, params={"cursor": cursor}), "cursor")


@pytest.mark.parametrize("path", PAGED)
@ONE_SERVER
@given(data=st.data())
async def test_a_cursor_that_was_changed_is_refused_or_a_place_of_its_own(
    app: LocalApp, cursors: dict[str, str], path: str, data: st.DataObject
) -> None:
    cursor = cursors[path]
    at = data.draw(st.integers(0, len(cursor) - 1))
    replaced = cursor[:at] + data.draw(st.sampled_from("abcXYZ019_-")) + cursor[at + 1 :]
    for changed in (cursor[:at], cursor[at + 1 :] or cursor[:-1], replaced):
        answer = await app.http.get(path, params={"cursor": changed})
        assert refused(answer, "cursor") or set(answer.json()) > {"next_cursor"}


LINES = st.dictionaries(
    st.sampled_from(
        ["id", "text", "metadata", "created_at", "updated_at", "version", "event", "history", "vector", "x"]
    ),
    SCALARS | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2) | st.lists(SCALARS, max_size=3),
).map(lambda line: json.dumps(line).encode())


@ONE_SERVER
@given(st.lists(LINES | st.binary(max_size=30), max_size=4).map(b"\n".join))
async def test_any_import_is_answered_or_refused_by_its_line(app: LocalApp, lines: bytes) -> None:
    answer = await app.http.post("/v1/users/ann/import", content=lines)
    if not refused(answer, "lines"):
        assert set(answer.json()) == {"imported", "unchanged"}


def right(key: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {key}"), ("authorization", f"Token {key}"), ("x-api-key", key)]


@pytest.fixture
async def keyed(tmp_path: Path) -> AsyncIterator[tuple[LocalApp, str]]:
    app = await LocalApp.start(tmp_path, auth={"mode": "keys"})
    yield app, await app.make_key("t")
    await app.stop()


HEADER = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=60)


@ONE_SERVER
@given(data=st.data())
async def test_any_other_key_is_refused(keyed: tuple[LocalApp, str], data: st.DataObject) -> None:
    app, key = keyed
    at = data.draw(st.integers(0, len(key) - 1))
    changed = key[:at] + data.draw(st.sampled_from("0123456789abcdefgM_ ")) + key[at + 1 :]
    value = data.draw(HEADER | st.sampled_from([key[:at], key[at:], key + key, key.upper()]) | st.just(changed))
    name, shown = data.draw(st.sampled_from(right(value)))
    answer = await app.http.get(MEMORIES, headers={name: shown.encode("latin-1")})
    assert (answer.status_code == 200) is (value.strip(" ") == key)
    if answer.status_code != 200:
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_key")
        assert answer.headers["www-authenticate"] == "Bearer"
