"""The routes of users: list, describe, export, import and delete, in this process."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import orjson
import pytest

from deployments.calls.store import partition_of
from deployments.calls.transfer import PIECE_LINES
from deployments.errors import DeadlineExceeded, InvalidRequest
from deployments.requests import deadlines
from deployments.requests.origin import Origin
from deployments.requests.principal import ANYONE
from store import Conflict
from store.log import space
from tests.local_app import DIM, LocalApp

VECTOR = [1.0] * DIM


async def fill(api: httpx.AsyncClient, user: str, count: int) -> None:
    memories = [{"id": str(n), "text": f"text {n}", "metadata": {"n": n}} for n in range(count)]
    for start in range(0, count, 500):
        answer = await api.post(f"/v1/users/{user}/memories", json={"memories": memories[start : start + 500]})
        assert answer.status_code == 201


async def import_into(api: httpx.AsyncClient, user: str, data: Any) -> httpx.Response:
    return await api.post(f"/v1/users/{user}/import", content=data)


def lines_of(data: bytes) -> list[Any]:
    return [orjson.loads(line) for line in data.splitlines()]


async def test_a_user_is_described(api: httpx.AsyncClient) -> None:
    nothing = {"user_id": "ann", "memories": 0, "version": 0, "bytes": 0, "index": None, "resident": False}
    assert (await api.get("/v1/users/ann")).json() == nothing
    await api.post("/v1/users/ann/memories", json={"text": "tea", "metadata": {"n": 1}})
    kept = {**nothing, "memories": 1, "version": 1, "bytes": len("tea") + len('{"n":1}') + 4 * DIM}
    assert (await api.get("/v1/users/ann")).json() == kept
    await api.post("/v1/users/ann/memories/search", json={"query": "tea"})
    assert (await api.get("/v1/users/ann")).json() == {**kept, "index": "exact", "resident": True}


async def test_users_are_listed_by_id_in_pages(api: httpx.AsyncClient) -> None:
    names = ["Zoe", "ann", "anna", "bob", "ä", "茶"]
    memories = [{"user_id": name, "text": "tea"} for name in reversed(names)]
    await api.post("/v1/memories", json={"memories": memories})
    page = (await api.get("/v1/users")).json()
    assert page["users"][0] == {"user_id": "Zoe", "memories": 1, "version": 1, "bytes": 5 + 4 * DIM}
    assert ([user["user_id"] for user in page["users"]], page["next_cursor"]) == (names, None)
    seen, params = [], {"limit": "4"}
    while True:
        page = (await api.get("/v1/users", params=params)).json()
        seen.append([user["user_id"] for user in page["users"]])
        if page["next_cursor"] is None:
            break
        params["cursor"] = page["next_cursor"]
    assert seen == [names[:4], names[4:]]
    found = (await api.get("/v1/users", params={"prefix": "ann"})).json()["users"]
    assert [user["user_id"] for user in found] == ["ann", "anna"]


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("cursor=*", "cursor"), ("cursor=abcd", "cursor"), ("prefix=%00", "prefix"), ("q=1", "q")],
)
async def test_a_wrong_query_is_named(api: httpx.AsyncClient, query: str, param: str) -> None:
    answer = await api.get(f"/v1/users?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_nothing_is_left_of_a_deleted_user(api: httpx.AsyncClient) -> None:
    await fill(api, "ann", 3)
    await fill(api, "bob", 1)
    refused = await api.request("DELETE", "/v1/users/ann", json={"filter": {"n": 1}})
    assert refused.status_code == 400
    assert (await api.delete("/v1/users/ann")).json() == {"deleted": 3, "version": 4}
    assert (await api.delete("/v1/users/ann")).json() == {"deleted": 0, "version": 5}
    assert (await api.get("/v1/users/ann/memories")).json()["memories"] == []
    assert (await api.get("/v1/users/ann/export")).content == b""
    assert (await api.get("/v1/users/ann/memories/1/history")).status_code == 404
    assert [user["user_id"] for user in (await api.get("/v1/users")).json()["users"]] == ["bob"]


async def test_export_import_export_is_the_same_byte_for_byte(app: LocalApp, api: httpx.AsyncClient) -> None:
    count = 2 * PIECE_LINES + 30
    await fill(api, "ann", count)
    for n in range(0, count, 9):
        await api.patch(f"/v1/users/ann/memories/{n}", json={"text": f"changed {n}", "metadata": {}})
        await api.delete(f"/v1/users/ann/memories/{n + 1}")
    export = await api.get("/v1/users/ann/export")
    assert export.headers["content-type"] == "application/x-ndjson"
    first = export.content
    assert len(lines_of(first)) == (await api.get("/v1/users/ann")).json()["memories"]
    embedded = len(app.model.texts)
    for _ in range(2):
        app.store.die_after += ["import_page", "export_page"]
        done = (await import_into(api, "bob", first)).json()
        assert sum(done.values()) == len(lines_of(first))
        assert (await api.get("/v1/users/bob/export")).content == first
    assert done == {"imported": 0, "unchanged": len(lines_of(first))}
    assert len(app.model.texts) == embedded
    assert (await api.get("/v1/users/nobody/export")).content == b""


async def test_an_export_holds_each_memory_once_while_others_write(app: LocalApp, api: httpx.AsyncClient) -> None:
    await fill(api, "ann", 500)
    pieces = app.gateway.export("ann")
    given = await anext(pieces)
    for n in (3, 250, 499):
        await api.patch(f"/v1/users/ann/memories/{n}", json={"metadata": {"late": True}})
    await api.post("/v1/users/ann/memories", json={"text": "late"})
    given += b"".join([piece async for piece in pieces])
    assert sorted(int(line["id"]) for line in lines_of(given)) == list(range(500))
    late = {line["id"] for line in lines_of(given) if line["metadata"] == {"late": True}}
    assert late == {"250", "499"}
    assert (await import_into(api, "bob", given)).json() == {"imported": 500, "unchanged": 0}
    assert (await api.get("/v1/users/bob/export")).content == given


async def test_an_export_fails_if_its_user_is_erased_meanwhile(app: LocalApp, api: httpx.AsyncClient) -> None:
    await fill(api, "ann", 500)
    pieces = app.gateway.export("ann")
    await anext(pieces)
    await api.delete("/v1/users/ann")
    with pytest.raises(Conflict):
        await anext(pieces)


async def test_the_later_pages_of_an_export_have_its_deadline(
    app: LocalApp, api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(api, "ann", 450)
    replica, left = app.store.deployment, []
    run = replica.run

    async def recorded(method: str, sent: Any, *args: Any) -> Any:
        left.append(sent[2])
        return await run(method, sent, *args)

    monkeypatch.setattr(replica, "run", recorded)
    whole = (await api.get("/v1/users/ann/export", headers={"x-request-timeout-ms": "60000"})).content
    assert len(lines_of(whole)) == 450
    assert len(left) == 3 and 60 >= left[0] > left[1] > left[2] > 0
    pieces = app.gateway.export("ann")
    with deadlines.within(60):
        assert len(lines_of(await anext(pieces))) == 200
    now = time.monotonic() + 60
    monkeypatch.setattr("deployments.calls.store.time", SimpleNamespace(monotonic=lambda: now))
    with pytest.raises(DeadlineExceeded):
        await anext(pieces)


async def test_lines_without_a_vector_are_embedded(app: LocalApp, api: httpx.AsyncClient) -> None:
    await fill(api, "ann", 3)
    lines = lines_of((await api.get("/v1/users/ann/export")).content)
    bare = b"".join(orjson.dumps({**line, "vector": None, "model": "of long ago"}) + b"\n" for line in lines)
    assert (await import_into(api, "bob", bare)).json() == {"imported": 3, "unchanged": 0}
    assert lines_of((await api.get("/v1/users/bob/export")).content) == lines


async def test_a_piece_is_imported_before_the_next_one_arrives(api: httpx.AsyncClient) -> None:
    seen: list[int] = []

    async def slowly() -> AsyncIterator[bytes]:
        for n in range(PIECE_LINES + 1):
            yield orjson.dumps({"id": str(n), "text": "tea", "vector": VECTOR}) + b"\n"
        seen.append((await api.get("/v1/users/ann")).json()["memories"])
        yield b'{"id": "last", "text": "without a newline"}'

    assert (await import_into(api, "ann", slowly())).json() == {"imported": PIECE_LINES + 2, "unchanged": 0}
    assert seen == [PIECE_LINES]


async def test_an_import_goes_on_after_the_log_has_forgotten_a_deletion(
    app: LocalApp, api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "TOMBSTONES_US", 0)

    async def with_deletions() -> AsyncIterator[bytes]:
        for n in range(PIECE_LINES):
            yield orjson.dumps({"id": str(n), "text": "tea", "vector": VECTOR}) + b"\n"
        assert (await api.delete("/v1/users/ann/memories/0")).status_code == 204
        replica = app.store.deployment
        while await replica._in_worker(replica._store.background_step):
            pass
        yield b'{"id": "last", "text": "milk"}'

    assert (await import_into(api, "ann", with_deletions())).json() == {"imported": PIECE_LINES + 1, "unchanged": 0}
    assert (await api.get("/v1/users/ann")).json()["memories"] == PIECE_LINES


async def test_an_import_that_failed_at_a_bad_line_can_be_sent_again(api: httpx.AsyncClient) -> None:
    good = [orjson.dumps({"id": str(n), "text": f"text {n}", "vector": VECTOR}) + b"\n" for n in range(450)]
    for at, bad, param in [
        (7, b'{"id": "x", "text": ""}\n', "lines.7.text"),
        (207, b'{"id": "x", "text": "tea", "vector": [1]}\n', "lines.207.vector"),
        (410, b'{"id": "3", "text": "other", "vector": [%s]}\n' % b",".join([b"1"] * DIM), "lines.410.id"),
        (411, b'{"text": "no id"}\n', "lines.411.id"),
        (412, b'{"id": "x", "text": "tea", "created_at": "now"}\n', "lines.412.created_at"),
    ]:
        answer = await import_into(api, "ann", b"".join([*good[:at], bad, *good[at:]]))
        assert (answer.status_code in (400, 409), answer.json()["error"]["param"]) == (True, param)
        there = (await api.get("/v1/users/ann")).json()["memories"]
        assert there == at // PIECE_LINES * PIECE_LINES
    assert (await import_into(api, "ann", b"".join(good))).json() == {"imported": 50, "unchanged": 400}


async def test_a_line_that_is_too_long_is_refused(tmp_path: Any) -> None:
    app = await LocalApp.start(tmp_path, gateway={"max_import_line_bytes": 2000})
    lines = [orjson.dumps({"id": str(n), "text": "x" * 1000}) + b"\n" for n in range(10)]
    assert (await import_into(app.http, "ann", b"".join(lines))).json() == {"imported": 10, "unchanged": 0}
    answer = await import_into(app.http, "ann", lines[0] + b"x" * 2001)
    assert (answer.status_code, answer.json()["error"]["param"]) == (413, "lines.1")
    await app.stop()


async def test_everything_that_is_exported_can_be_imported(tmp_path: Any) -> None:
    """A memory that filled the body, and was changed 14 times to another as large."""
    app = await LocalApp.start(tmp_path, gateway={"max_body_bytes": 20_000})
    texts = [f"{n} " + "ä\\n" * 3900 for n in range(15)]
    assert (await app.http.post("/v1/users/ann/memories", json={"id": "1", "text": texts[0]})).status_code == 201
    for text in texts[1:]:
        assert (await app.http.patch("/v1/users/ann/memories/1", json={"text": text})).status_code == 200
    exported = (await app.http.get("/v1/users/ann/export")).content
    assert len(exported) > 15 * 19_000
    assert (await import_into(app.http, "bob", exported)).json() == {"imported": 1, "unchanged": 0}
    assert (await app.http.get("/v1/users/bob/export")).content == exported
    await app.stop()


async def test_an_import_that_breaks_off_writes_no_half_line(app: LocalApp) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b'{"id": "1", "text": "tea"}\n{"id": "2", "te'
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await app.gateway.import_body(ANYONE, "ann", broken(), Origin.fresh())
    assert (await app.gateway.user("ann"))["memories"] == 0


async def test_an_erasure_wins_over_an_import_that_was_on_its_way(api: httpx.AsyncClient) -> None:
    async def slowly() -> AsyncIterator[bytes]:
        for n in range(2 * PIECE_LINES):
            if n == PIECE_LINES + 3:
                await asyncio.sleep(0)
                assert (await api.delete("/v1/users/ann")).json()["deleted"] == PIECE_LINES
            yield orjson.dumps({"id": str(n), "text": "tea", "vector": VECTOR}) + b"\n"

    answer = await import_into(api, "ann", slowly())
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "erased")
    assert (await api.get("/v1/users/ann")).json()["memories"] == 0


async def test_the_handle_imports_lines_and_mappings(app: LocalApp) -> None:
    lines: list[Any] = ['{"id": "1", "text": "tea"}', b'{"id": "2", "text": "milk"}\n', {"id": "3", "text": "rain"}]
    assert await app.gateway.import_lines("ann", lines) == {"imported": 3, "unchanged": 0}
    for bad in ({"id": "4", "text": object()}, '"\ud800"', "{}\n{}", 5):
        with pytest.raises(InvalidRequest) as refused:
            await app.gateway.import_lines("ann", [*lines, bad])
        assert refused.value.param == "lines.3"
    with pytest.raises(InvalidRequest) as refused:
        await app.gateway.import_lines("a\nb", lines)
    assert refused.value.param == "user_id"


async def test_reads_of_a_user_go_to_its_warm_replica_and_writes_to_any(app: LocalApp, api: httpx.AsyncClient) -> None:
    await fill(api, "ann", 1)
    for method, path in [
        ("GET", "ann/memories"),
        ("GET", "ann/memories/0"),
        ("GET", "ann/memories/0/history"),
        ("GET", "ann"),
        ("GET", "ann/export"),
        ("DELETE", "ann"),
        ("GET", "bob"),
    ]:
        assert (await api.request(method, f"/v1/users/{path}")).status_code == 200
    warm, other = (f"partition-{partition_of('default', user, 16)}" for user in ("ann", "bob"))
    assert app.store.calls == [
        ("append_together", None),
        ("list", warm),
        ("get", warm),
        ("history_page", warm),
        ("user", warm),
        ("export_page", warm),
        ("erase_user", None),
        ("user", other),
    ]


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**63) - 1])
async def test_an_integer_beyond_64_bits_is_refused_in_adds_and_imports(api: httpx.AsyncClient, number: int) -> None:
    memory = {"id": "1", "text": "tea", "metadata": {"k": number}}
    answers = [
        await api.post("/v1/users/ann/memories", json=memory),
        await import_into(api, "ann", json.dumps(memory)),
        await import_into(api, "ann", json.dumps({**memory, "vector": VECTOR})),
    ]
    refused = [(answer.status_code, answer.json()["error"]["param"]) for answer in answers]
    assert refused == [(400, "metadata"), (400, "lines.0.metadata.k"), (400, "lines.0.metadata.k")]
    assert (await api.get("/v1/users/ann")).json()["memories"] == 0


@pytest.mark.parametrize("vector", ["", f', "vector": {[1.0] * DIM}'])
async def test_an_imported_number_that_is_not_finite_is_named(api: httpx.AsyncClient, vector: str) -> None:
    line = '{"id": "1", "text": "a", "metadata": {"k": 1e999}' + vector + "}"
    error = (await api.post("/v1/users/ann/import", content=line)).json()["error"]
    assert (error["param"], error["code"]) == ("lines.0.metadata.k", None)
    assert "not finite" in error["message"]
