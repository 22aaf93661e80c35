"""The routes of memories, on a fake model and a real store, in this process."""

import asyncio
import json
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from deployments.errors import InvalidRequest
from store import Conflict
from tests.local_app import DIM, LocalApp

ANN = "/v1/users/ann/memories"


async def add(api: httpx.AsyncClient, *memories: dict[str, Any], user: str = "ann", **options: Any) -> dict[str, Any]:
    answer = await api.post(f"/v1/users/{user}/memories", json={"memories": memories, **options})
    assert answer.status_code == 201, answer.text
    content: dict[str, Any] = answer.json()
    return content


async def ids(api: httpx.AsyncClient, **params: Any) -> list[str]:
    answer = await api.get(ANN, params={"order": "created_at", **params})
    assert answer.status_code == 200, answer.text
    return [memory["id"] for memory in answer.json()["memories"]]


def refused(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["code"]


async def turns(count: int = 50) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_each_input_type_is_cut_to_its_own_length(app: LocalApp) -> None:
    model = app.model.model
    model.info = replace(model.info, max_tokens_of={"query": 2, "document": 3})
    for input_type, tokens in ((None, 4), ("query", 2), ("document", 3)):
        body = {"input": [[1, 2, 3, 4]], "input_type": input_type}
        usage = (await app.http.post("/v1/embeddings", json=body)).json()["usage"]
        assert usage == {"prompt_tokens": tokens, "total_tokens": tokens, "truncated_inputs": int(tokens < 4)}
        if tokens < 4:
            answer = await app.http.post("/v1/embeddings", json={**body, "truncate": "none"})
            assert refused(answer) == (400, "input.0", "context_length_exceeded")
    await add(app.http, {"id": "1", "text": "one two three four"})
    vector = (await app.http.get(f"{ANN}/1?include_vectors=true")).json()["vector"]
    cut = (await app.http.post("/v1/embeddings", json={"input": "one two three"})).json()["data"][0]["embedding"]
    assert vector == cut


async def test_texts_that_are_cut_are_told(app: LocalApp) -> None:
    model, api = app.model.model, app.http
    model.info = replace(model.info, max_tokens_of={"query": 4, "document": 20})  # with the prompt of a query
    long, short = " ".join(["word"] * 21), " ".join(["word"] * 20)
    axis = np.eye(DIM)[0].tolist()
    added = await add(api, {"id": "1", "text": long}, {"id": "2", "text": short}, {"text": long, "vector": axis})
    assert [one.get("truncated") for one in added["memories"]] == [True, None, None]
    single = await api.post(ANN, json={"id": "4", "text": long})
    assert single.json() == {
        "memories": [{"id": "4", "status": "added", "version": 4, "truncated": True}],
        "version": 4,
    }
    mixed = [{"user_id": user, "text": text} for user, text in (("bob", short), ("ann", long), ("bob", long))]
    many = (await api.post("/v1/memories", json={"memories": mixed})).json()["memories"]
    assert [one.get("truncated") for one in many] == [None, True, True]
    again = await add(api, {"id": "1", "text": long}, {"id": "2", "text": short})
    assert [(one["status"], one.get("truncated")) for one in again["memories"]] == [
        ("unchanged", True),
        ("unchanged", None),
    ]

    assert "truncated" not in (await api.get(f"{ANN}/1")).json()
    headers = {"Idempotency-Key": "k"}
    changed = await api.patch(f"{ANN}/2", json={"text": long}, headers=headers)
    assert changed.json()["truncated"] is True
    assert (await api.patch(f"{ANN}/2", json={"text": long}, headers=headers)).content == changed.content
    assert (await api.patch(f"{ANN}/2", json={"text": long})).json() == changed.json()
    assert "truncated" not in (await api.patch(f"{ANN}/2", json={"metadata": {"n": 1}})).json()
    assert "truncated" not in (await api.patch(f"{ANN}/2", json={"text": short})).json()

    for query, cut in (("a b c", None), ("a b c d", True)):
        assert (await api.post(f"{ANN}/search", json={"query": query})).json().get("truncated") is cut
    lines = b"".join(
        json.dumps({"id": str(n), "text": text}).encode() + b"\n" for n, text in enumerate([long, short, long])
    )
    imported = await api.post("/v1/users/eve/import", content=lines)
    assert imported.json() == {"imported": 3, "unchanged": 0, "truncated": 2}
    again = await api.post("/v1/users/eve/import", content=lines.splitlines()[1])
    assert again.json() == {"imported": 0, "unchanged": 1}


async def test_a_memory_has_the_fields_that_it_was_added_with(api: httpx.AsyncClient) -> None:
    expires_at = (datetime.now(UTC) + timedelta(days=1)).isoformat().replace("+00:00", "Z")
    await add(api, {"id": "1", "text": "green tea", "metadata": {"n": 1, "a": [None]}, "expires_at": expires_at})
    memory = (await api.get(f"{ANN}/1")).json()
    at = memory["created_at"]
    assert memory == {
        "id": "1",
        "user_id": "ann",
        "text": "green tea",
        "metadata": {"n": 1, "a": [None]},
        "created_at": at,
        "updated_at": at,
        "expires_at": expires_at,
        "version": 1,
    }
    vector = (await api.get(f"{ANN}/1?include_vectors=true")).json()["vector"]
    embedded = (await api.post("/v1/embeddings", json={"input": "green tea"})).json()["data"][0]["embedding"]
    assert vector == embedded
    assert refused(await api.get("/v1/users/bob/memories/1")) == (404, "user_id", None)
    await add(api, {"text": "x"}, user="bob")
    assert refused(await api.get("/v1/users/bob/memories/1")) == (404, "id", None)


@pytest.mark.parametrize("text", ["", " "])
async def test_the_message_of_an_error_begins_with_the_path(api: httpx.AsyncClient, text: str) -> None:
    answer = await api.post(ANN, json={"memories": [{"text": "a"}, {"text": text}]})
    assert answer.json()["error"] == {
        "message": "memories.1.text: must not be empty",
        "type": "invalid_request_error",
        "param": "memories.1.text",
        "code": None,
    }
    with_vector = {"text": "a", "vector": [1.0]}
    for body, path in (({"memories": [{"text": "a"}, with_vector]}, "memories.1.vector"), (with_vector, "vector")):
        message = (await api.post(ANN, json=body)).json()["error"]["message"]
        assert message == f"{path}: has 1 dimensions; the model has {DIM}"


async def test_pages_continue_while_others_write(api: httpx.AsyncClient) -> None:
    await add(api, *({"id": str(n), "text": f"text {n}", "metadata": {"n": n}} for n in range(10)))
    seen: list[str] = []
    params: dict[str, Any] = {"limit": 3, "order": "created_at", "filter": json.dumps({"n": {"gte": 2}})}
    while True:
        page = (await api.get(ANN, params=params)).json()
        seen += [memory["id"] for memory in page["memories"]]
        await api.delete(f"{ANN}/{seen[0]}")  # deleting what was listed does not disturb the next page
        await add(api, {"text": "new", "metadata": {"n": 0}})
        if page["next_cursor"] is None:
            break
        params["cursor"] = page["next_cursor"]
    assert seen == [str(n) for n in range(2, 10)]
    newest = (await api.get(ANN, params={"limit": 1})).json()["memories"]
    assert newest[0]["text"] == "new"
    assert (await api.get("/v1/users/nobody/memories")).json() == {"memories": [], "next_cursor": None}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"app": "mail"}, ["0", "2"]),
        ({"app": {"ne": "mail"}}, ["1", "3"]),
        ({"n": {"gt": 0, "lte": 2}}, ["1", "2"]),
        ({"n": {"in": [0, 3]}}, ["0", "3"]),
        ({"n": {"nin": [0, 3]}}, ["1", "2"]),
        ({"tags": {"contains": "old"}}, ["1"]),
        ({"source.kind": {"icontains": "WEB"}}, ["3"]),
        ({"tags": {"exists": False}}, ["0", "2", "3"]),
        ({"OR": [{"n": 0}, {"AND": [{"n": {"gte": 2}}, {"NOT": {"app": "mail"}}]}]}, ["0", "3"]),
        ({"created_at": {"gte": "2020-01-01T00:00:00Z"}}, ["0", "1", "2", "3"]),
        ({"updated_at": {"lt": "2020-01-01T00:00:00Z"}}, []),
        ({"id": {"in": ["0", "3"]}}, ["0", "3"]),
        ({"user_id": "ann", "text": {"icontains": "TEXT 1"}}, ["1"]),
        ({"version": {"gte": 3}, "expires_at": None}, ["2", "3"]),
        ({"gen_ai.system": {"ne": "openai"}}, ["0", "1", "2"]),
        ({"k8s.io/app": "web"}, ["2"]),
        ({"source.k8s\\.io/app": "web"}, ["3"]),
        ({"tags": {"in": ["new", "old"]}}, ["1"]),
        ({"metadata.id": "7"}, ["0"]),
    ],
)
async def test_filters_mean_the_same_in_list_search_and_delete(
    api: httpx.AsyncClient, given: dict[str, Any], found: list[str]
) -> None:
    data = [
        {"app": "mail", "n": 0, "id": "7"},
        {"app": "chat", "n": 1, "tags": ["old"]},
        {"app": "mail", "n": 2, "k8s.io/app": "web"},
        {"app": "web", "n": 3, "source": {"kind": "Website", "k8s.io/app": "web"}, "gen_ai.system": "openai"},
    ]
    await add(api, *({"id": str(n), "text": f"text {n}", "metadata": each} for n, each in enumerate(data)))
    assert await ids(api, filter=json.dumps(given)) == found
    results = (await api.post(f"{ANN}/search", json={"query": "text", "filter": given})).json()["results"]
    assert sorted(memory["id"] for memory in results) == found
    assert (await api.request("DELETE", ANN, json={"filter": given})).json() == {"deleted": len(found)}
    assert await ids(api) == [id for id in "0123" if id not in found]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"age": {"near": 3}}, "filter.age.near"),
        ({"AND": [{"a": 1}, {"age": {"near": 3}}]}, "filter.AND.1.age.near"),
        ({"NOT": {"OR": [{"age": {"near": 3}}]}}, "filter.NOT.OR.0.age.near"),
        ({"NOT": {"id": {"gt": "a"}}}, "filter.NOT.id.gt"),
        ({"version": "3"}, "filter.version"),
        ({}, "filter"),
    ],
)
async def test_a_wrong_filter_is_named_in_every_route(
    api: httpx.AsyncClient, given: dict[str, Any], param: str
) -> None:
    await add(api, {"text": "tea"})
    answers = [
        await api.get(ANN, params={"filter": json.dumps(given)}),
        await api.post(f"{ANN}/search", json={"query": "tea", "filter": given}),
        await api.request("DELETE", ANN, json={"filter": given}),
        await api.delete(ANN, params={"filter": json.dumps(given)}),
    ]
    assert [refused(answer)[:2] for answer in answers] == [(400, param)] * 4


async def test_deleting_all_but_one_id_spares_it(api: httpx.AsyncClient) -> None:
    await add(api, {"id": "keep", "text": "tea"}, {"id": "a", "text": "milk"}, {"id": "b", "text": "rain"})
    given = {"filter": {"NOT": {"id": "keep"}}}
    assert (await api.request("DELETE", ANN, json=given)).json() == {"deleted": 2}
    assert await ids(api) == ["keep"]


async def test_deleting_by_filter_needs_one_filter(api: httpx.AsyncClient) -> None:
    await add(api, {"text": "tea", "metadata": {"n": 1}}, {"text": "milk"})
    body = {"filter": {"n": 1}}
    for answer in [
        await api.delete(ANN),
        await api.request("DELETE", ANN, json={}),
        await api.request("DELETE", ANN, json={"filter": None}),
        await api.request("DELETE", ANN, json=body, params={"filter": '{"n":1}'}),
    ]:
        assert refused(answer)[:2] == (400, "filter")
    assert refused(await api.request("DELETE", ANN, json={**body, "all": True}))[:2] == (400, "all")
    assert len(await ids(api)) == 2
    assert (await api.delete(ANN, params={"filter": '{"n":1}'})).json() == {"deleted": 1}
    assert (await api.delete(ANN, params={"filter": '{"n":1}'})).json() == {"deleted": 0}
    assert (await api.delete("/v1/users/nobody/memories", params={"filter": '{"n":1}'})).json() == {"deleted": 0}


async def test_memories_are_got_by_their_ids(app: LocalApp, api: httpx.AsyncClient) -> None:
    await add(api, {"id": "1", "text": "tea"}, {"id": "a/b", "text": "milk"}, {"id": "3", "text": "rain"})
    one, other = (await api.get(f"{ANN}/1")).json(), (await api.get(f"{ANN}/a%2Fb")).json()
    answer = await api.post(f"{ANN}/get", json={"ids": ["none", "a/b", "1", "a/b", "none"]})
    assert answer.json() == {"memories": [other, one], "missing": ["none"]}
    assert await app.gateway.get_many("ann", ("1", "x")) == {"memories": [_parsed(one)], "missing": ["x"]}
    vectors = (await api.post(f"{ANN}/get", json={"ids": ["1"], "include_vectors": True})).json()["memories"]
    assert vectors == [{**one, "vector": await stored_vector(api)}]
    nobody = await api.post("/v1/users/nobody/memories/get", json={"ids": ["1"]})
    assert nobody.json() == {"memories": [], "missing": ["1"]}
    assert (await api.post("/v1/users/bob/memories", json={"text": "x"})).is_success
    assert (await api.post("/v1/users/bob/memories/get", json={"ids": ["1"]})).json()["missing"] == ["1"]
    for wrong, param in (
        ({}, "ids"),
        ({"ids": []}, "ids"),
        ({"ids": ["1"] * 1001}, "ids"),
        ({"ids": ["1", ""]}, "ids.1"),
        ({"ids": ["1", 2]}, "ids.1"),
        ({"ids": "1"}, "ids"),
    ):
        assert refused(await api.post(f"{ANN}/get", json=wrong))[:2] == (400, param)
        assert refused(await api.request("DELETE", ANN, json=wrong or {"ids": None}))[:2] == (
            400,
            param if wrong else "filter",
        )
    assert len((await api.post(f"{ANN}/get", json={"ids": [str(n) for n in range(1000)]})).json()["missing"]) == 998


def _parsed(memory: dict[str, Any]) -> dict[str, Any]:
    """A memory as a handle gets it, from the one that a route answers."""
    times = {name: datetime.fromisoformat(memory[name]) for name in ("created_at", "updated_at")}
    return {**memory, **times}


async def test_memories_are_deleted_by_their_ids(app: LocalApp, api: httpx.AsyncClient) -> None:
    await add(api, *({"id": str(n), "text": f"text {n}"} for n in range(5)))
    answer = await api.request("DELETE", ANN, json={"ids": ["none", "3", "1", "3"]})
    assert answer.json() == {"deleted": 2, "missing": ["none"]}
    assert await ids(api) == ["0", "2", "4"]
    assert await app.gateway.delete_many("ann", ["3", "4"]) == {"deleted": 1, "missing": ["3"]}
    assert (await api.request("DELETE", ANN, json={"ids": ["4"]})).json() == {"deleted": 0, "missing": ["4"]}
    both = await api.request("DELETE", ANN, json={"ids": ["0"], "filter": {"id": "0"}})
    assert refused(both)[:2] == (400, "ids")
    query = await api.request("DELETE", ANN, json={"ids": ["0"]}, params={"filter": '{"id":"0"}'})
    assert refused(query)[:2] == (400, "filter")
    nobody = await api.request("DELETE", "/v1/users/nobody/memories", json={"ids": ["1"]})
    assert nobody.json() == {"deleted": 0, "missing": ["1"]}
    assert (await api.get("/v1/users")).json()["users"][0]["memories"] == 2
    assert await ids(api) == ["0", "2"]


async def test_a_new_text_is_embedded_and_found(app: LocalApp, api: httpx.AsyncClient) -> None:
    await add(api, {"id": "1", "text": "green tea", "metadata": {"n": 1}}, {"id": "2", "text": "a train"})
    changed = (await api.patch(f"{ANN}/1", json={"text": "a red bicycle"})).json()
    assert (changed["text"], changed["metadata"], changed["version"]) == ("a red bicycle", {"n": 1}, 3)
    (best,) = (await api.post(f"{ANN}/search", json={"query": "red bicycle", "top_k": 1})).json()["results"]
    assert best == {**changed, "score": best["score"]}
    assert app.model.texts.count("a red bicycle") == 1

    await api.patch(f"{ANN}/1", json={"metadata": {"m": 2}})
    again = (await api.patch(f"{ANN}/1", json={"text": "a red bicycle"})).json()
    assert (again["metadata"], again["version"]) == ({"m": 2}, 4)
    assert app.model.texts.count("a red bicycle") == 1


async def test_an_unchanged_text_keeps_the_vector_that_was_given(api: httpx.AsyncClient) -> None:
    axis = np.eye(DIM)[3].tolist()
    await add(api, {"id": "1", "text": "three", "vector": axis})
    changed = await api.patch(f"{ANN}/1", json={"text": "three", "metadata": {"a": 1}})
    assert changed.json()["version"] == 2
    assert (await api.get(f"{ANN}/1?include_vectors=true")).json()["vector"] == axis


async def stored_vector(api: httpx.AsyncClient, id: str = "1") -> list[float]:
    vector: list[float] = (await api.get(f"{ANN}/{id}?include_vectors=true")).json()["vector"]
    return vector


@pytest.mark.parametrize("how", ["single", "list", "upsert", "users", "import"])
async def test_a_given_vector_replaces_the_one_of_the_same_content(api: httpx.AsyncClient, how: str) -> None:
    axes = np.eye(DIM)
    await api.post(ANN, json={"id": "1", "text": "tea", "metadata": {"n": 1}})
    embedded = await stored_vector(api)

    async def send(vector: list[float] | None) -> tuple[str, int]:
        memory: dict[str, Any] = {"id": "1", "text": "tea", "metadata": {"n": 1}}
        if vector is not None:
            memory["vector"] = vector
        if how == "import":
            answer = await api.post("/v1/users/ann/import", content=json.dumps(memory))
            return {1: "updated", 0: "unchanged"}[answer.json()["imported"]], answer.status_code
        if how == "users":
            answer = await api.post("/v1/memories", json={"memories": [{"user_id": "ann", **memory}]})
        else:
            body = memory if how == "single" else {"memories": [memory], "upsert": how == "upsert"}
            answer = await api.post(ANN, json=body)
        return answer.json()["memories"][0]["status"], answer.status_code

    status = 200 if how == "import" else 201
    assert await send(None) == ("unchanged", status)
    assert await send(axes[3].tolist()) == ("updated", status)
    assert await stored_vector(api) == axes[3].tolist() != embedded
    assert await send(axes[3].tolist()) == ("unchanged", status)
    assert await send(None) == ("unchanged", status)
    assert await stored_vector(api) == axes[3].tolist()
    found = (await api.post(f"{ANN}/search", json={"vector": axes[3].tolist()})).json()["results"]
    assert [(memory["id"], memory["version"], memory["score"]) for memory in found] == [("1", 2, 1.0)]


async def test_a_skipped_duplicate_does_not_expire_before_the_new_memory_would(api: httpx.AsyncClient) -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=60)).isoformat()
    await add(api, {"id": "1", "text": "tea", "expires_at": soon}, {"id": "2", "text": "rain"})
    again = await add(
        api, {"text": "tea", "expires_at": soon}, {"text": "rain", "expires_at": soon}, on_duplicate="skip"
    )
    assert [(one["id"], one["status"]) for one in again["memories"]] == [("1", "unchanged"), ("2", "unchanged")]
    for_ever = await add(api, {"text": "tea"}, on_duplicate="skip")
    assert for_ever == {"memories": [{"id": "1", "status": "updated", "version": 3}], "version": 3}
    assert "expires_at" not in (await api.get(f"{ANN}/1")).json()


async def test_a_memory_may_bring_the_time_of_its_making(app: LocalApp, api: httpx.AsyncClient) -> None:
    then = "2001-02-03T04:05:06+01:00"
    await api.post(ANN, json={"id": "1", "text": "tea", "created_at": then})
    memory = (await api.get(f"{ANN}/1")).json()
    assert memory["created_at"] == "2001-02-03T03:05:06Z"
    assert memory["updated_at"] > "2026"
    await app.gateway.add("ann", [{"id": "2", "text": "milk", "created_at": datetime(1999, 1, 1, tzinfo=UTC)}])
    assert await ids(api) == ["2", "1"]
    future = (datetime.now(UTC) + timedelta(minutes=2)).isoformat()
    for wrong in ("yesterday", "2001-02-03T04:05:06", future, 5):
        answer = await api.post(ANN, json={"memories": [{"text": "a"}, {"text": "b", "created_at": wrong}]})
        assert refused(answer)[:2] == (400, "memories.1.created_at")
        assert refused(await api.post(ANN, json={"text": "b", "created_at": wrong}))[:2] == (400, "created_at")
    assert len(await ids(api)) == 2


async def test_an_update_takes_a_vector_with_or_without_a_text(app: LocalApp, api: httpx.AsyncClient) -> None:
    axes = np.eye(DIM)
    await add(api, {"id": "1", "text": "tea", "metadata": {"n": 1}})
    changed = (await api.patch(f"{ANN}/1", json={"vector": axes[3].tolist()})).json()
    assert (changed["text"], changed["metadata"], changed["version"]) == ("tea", {"n": 1}, 2)
    assert await stored_vector(api) == axes[3].tolist()
    again = await api.patch(f"{ANN}/1", json={"vector": axes[3].tolist(), "text": "tea"})
    assert again.json()["version"] == 2
    changed = (await api.patch(f"{ANN}/1", json={"text": "milk", "vector": axes[4].tolist(), "if_version": 2})).json()
    assert (changed["text"], changed["version"]) == ("milk", 3)
    assert await stored_vector(api) == axes[4].tolist()
    assert "milk" not in app.model.texts
    (best,) = (await api.post(f"{ANN}/search", json={"vector": axes[4].tolist()})).json()["results"]
    assert (best["id"], best["score"]) == ("1", 1.0)
    assert refused(await api.patch(f"{ANN}/1", json={"vector": [1.0]})) == (400, "vector", "wrong_dimension")
    assert refused(await api.patch(f"{ANN}/1", json={"vector": [0.0] * DIM})) == (400, "vector", "invalid_vector")


async def test_metadata_is_merged_at_the_top_level(api: httpx.AsyncClient) -> None:
    await add(api, {"id": "1", "text": "tea", "metadata": {"a": 1, "b": {"x": 1}, "c": None}})
    merge = {"b": {"y": None}, "a": None, "d": [2], "none": None}
    changed = (await api.patch(f"{ANN}/1", json={"metadata_merge": merge})).json()
    assert changed["metadata"] == {"b": {"y": None}, "c": None, "d": [2]}
    assert changed["version"] == 2
    assert (await api.patch(f"{ANN}/1", json={"metadata_merge": {"d": [2], "a": None}})).json() == changed
    assert (await api.patch(f"{ANN}/1", json={"metadata_merge": {}})).json() == changed
    text = (await api.patch(f"{ANN}/1", json={"metadata_merge": {"d": None}, "text": "milk"})).json()
    assert (text["text"], text["metadata"]) == ("milk", {"b": {"y": None}, "c": None})
    both = await api.patch(f"{ANN}/1", json={"metadata_merge": {"a": 1}, "metadata": {}})
    assert refused(both)[:2] == (400, "metadata_merge")
    assert refused(await api.patch(f"{ANN}/1", json={"metadata_merge": {"a": 2**63}}))[:2] == (400, "metadata_merge")
    assert refused(await api.patch(f"{ANN}/none", json={"metadata_merge": {"a": 1}}))[:2] == (404, "id")


async def test_concurrent_merges_do_not_undo_each_other(api: httpx.AsyncClient) -> None:
    await add(api, {"id": "1", "text": "tea"})
    keys = [str(n) for n in range(20)]
    answers = await asyncio.gather(*(api.patch(f"{ANN}/1", json={"metadata_merge": {key: True}}) for key in keys))
    assert {answer.status_code for answer in answers} == {200}
    assert (await api.get(f"{ANN}/1")).json()["metadata"] == dict.fromkeys(keys, True)


async def test_null_in_an_update_changes_nothing_but_the_expiry(api: httpx.AsyncClient) -> None:
    memory = {"id": "1", "text": "tea", "metadata": {"k": 1}, "expires_at": "2099-01-01T00:00:00Z"}
    await api.post(ANN, json=memory)
    names = ("text", "vector", "metadata", "metadata_merge", "expires_at", "if_version")
    nulls = dict.fromkeys(names)
    changed = (await api.patch(f"{ANN}/1", json=nulls)).json()
    assert (changed["text"], changed["metadata"], "expires_at" in changed) == ("tea", {"k": 1}, False)
    refused = await api.patch(f"{ANN}/1", json={"text": None, "metadata": None})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == (
        "Give at least one of text, vector, metadata, metadata_merge, expires_at, happened_at and thread."
    )


async def test_an_update_of_another_version_is_a_conflict(api: httpx.AsyncClient) -> None:
    await add(api, {"id": "1", "text": "tea"})
    assert (await api.patch(f"{ANN}/1", json={"metadata": {"n": 1}, "if_version": 1})).json()["version"] == 2
    for body in ({"metadata": {"n": 2}}, {"text": "tea"}, {"text": "milk"}, {"expires_at": None}):
        answer = await api.patch(f"{ANN}/1", json={**body, "if_version": 1})
        assert refused(answer) == (409, "if_version", "version_mismatch")
    assert (await api.get(f"{ANN}/1")).json()["version"] == 2
    assert refused(await api.patch(f"{ANN}/none", json={"text": "tea"}))[:2] == (404, "id")


async def test_an_expiry_can_be_set_and_removed(api: httpx.AsyncClient) -> None:
    await add(api, {"id": "1", "text": "tea"})
    past = {"expires_at": "2020-01-01T00:00:00Z"}
    assert refused(await api.patch(f"{ANN}/1", json=past))[:2] == (400, "expires_at")
    assert (await api.patch(f"{ANN}/1", json={"expires_at": "2100-01-01T00:00:00Z"})).json()["version"] == 2
    assert "expires_at" not in (await api.patch(f"{ANN}/1", json={"expires_at": None})).json()


async def test_a_thread_and_a_time_are_set_answered_and_removed(api: httpx.AsyncClient) -> None:
    spring = "2025-04-01T09:00:00Z"
    await add(api, {"id": "1", "text": "tea", "thread": "trip", "happened_at": spring}, {"id": "2", "text": "rain"})
    placed = {"happened_at": spring, "thread": "trip"}
    assert (await api.get(f"{ANN}/1")).json().items() >= placed.items()
    assert not (await api.get(f"{ANN}/2")).json().keys() & placed.keys()
    assert (await api.patch(f"{ANN}/2", json=placed)).json().items() >= placed.items()
    listed = await api.get(ANN, params={"filter": '{"thread": "trip", "happened_at": {"lt": "2026-01-01T00:00:00Z"}}'})
    assert [memory["id"] for memory in listed.json()["memories"]] == ["2", "1"]
    changed = (await api.patch(f"{ANN}/2", json={"happened_at": None, "thread": None})).json()
    assert changed["version"] == 4 and not changed.keys() & placed.keys()
    status = (await api.post(ANN, json={"id": "1", "text": "tea", "thread": "work"})).json()["memories"][0]["status"]
    assert status == "updated"
    many = {"memories": [{"user_id": "bob", "text": "a"}, {"user_id": "ann", "text": "b", "thread": "a\nb"}]}
    assert refused(await api.post("/v1/memories", json=many))[:2] == (400, "memories.1.thread")
    assert refused(await api.patch(f"{ANN}/1", json={"happened_at": "noon"}))[:2] == (400, "happened_at")


async def test_a_memory_that_has_expired_already_is_refused(api: httpx.AsyncClient) -> None:
    past = {"text": "tea", "expires_at": "2020-01-01T00:00:00Z"}
    assert refused(await api.post(ANN, json=past))[:2] == (400, "expires_at")
    assert refused(await api.post(ANN, json={"memories": [{"text": "a"}, past]}))[:2] == (400, "memories.1.expires_at")
    many = {"memories": [{"user_id": "bob", "text": "a"}, {"user_id": "ann", **past}, {"user_id": "bob", "text": "b"}]}
    assert refused(await api.post("/v1/memories", json=many))[:2] == (400, "memories.1.expires_at")
    assert (await api.get("/v1/users")).json()["users"] == []


async def test_an_expiry_that_is_sent_again_after_it_has_passed_gets_the_first_answer(
    app: LocalApp, api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = datetime(2019, 1, 1, tzinfo=UTC)
    end, headers = {"expires_at": "2020-01-01T00:00:00Z"}, {"Idempotency-Key": "k"}
    with monkeypatch.context() as patched:
        patched.setattr(app.store.deployment._store, "_now", lambda: then)
        await add(api, {"id": "1", "text": "tea"})
        sent = {"x-memserve-request": f"{int(then.timestamp() * 1e6) + 1}-a"}
        first = await api.patch(f"{ANN}/1", json=end, headers=headers | sent)
        assert first.status_code == 200
        assert (await api.patch(f"{ANN}/1", json={"expires_at": None})).status_code == 200
    assert refused(await api.patch(f"{ANN}/1", json=end))[:2] == (400, "expires_at")
    again = await api.patch(f"{ANN}/1", json=end, headers=headers)
    assert (again.status_code, again.content) == (200, first.content)


async def test_a_history_comes_in_pages(app: LocalApp, api: httpx.AsyncClient) -> None:
    await add(api, {"id": "1", "text": "tea"})
    for n in range(120):
        await app.gateway.update("ann", "1", metadata={"n": n})
    first = (await api.get(f"{ANN}/1/history")).json()
    assert [event["version"] for event in first["events"]] == list(range(1, 101))
    params = {"cursor": first["next_cursor"], "limit": "1000"}
    rest = (await api.get(f"{ANN}/1/history", params=params)).json()
    assert [event["version"] for event in rest["events"]] == list(range(101, 122))
    assert rest["next_cursor"] is None
    page = await app.gateway.history("ann", "1", limit=1)
    assert ([event["text"] for event in page["events"]], page["next_cursor"] is None) == (["tea"], False)
    for params, param in (({"limit": "0"}, "limit"), ({"cursor": "x!"}, "cursor"), ({"page": "1"}, "page")):
        assert refused(await api.get(f"{ANN}/1/history", params=params))[:2] == (400, param)


async def test_history_has_every_state_until_the_memory_is_deleted(api: httpx.AsyncClient) -> None:
    await add(api, {"id": "1", "text": "tea"})
    await api.patch(f"{ANN}/1", json={"text": "milk", "metadata": {"n": 1}})
    events = (await api.get(f"{ANN}/1/history")).json()["events"]
    assert [{name: event[name] for name in event if name != "at"} for event in events] == [
        {"event": "added", "version": 1, "text": "tea", "metadata": {}},
        {"event": "updated", "version": 2, "text": "milk", "metadata": {"n": 1}},
    ]
    assert (await api.delete(f"{ANN}/1")).status_code == 204
    events = (await api.get(f"{ANN}/1/history")).json()["events"]
    assert [{name: event[name] for name in event if name != "at"} for event in events] == [
        {"event": "added", "version": 1},
        {"event": "updated", "version": 2},
        {"event": "deleted", "version": 3},
    ]
    assert (await api.get("/v1/users/bob/memories/1/history")).status_code == 404


async def test_a_call_for_many_users_is_written_whole_or_not_at_all(api: httpx.AsyncClient) -> None:
    await add(api, {"id": "1", "text": "tea"}, user="bob")

    def memory(user: str, id: str, text: str = "x") -> dict[str, str]:
        return {"user_id": user, "id": id, "text": text}

    mixed = [memory("ann", "1"), memory("bob", "2"), memory("eve", "1"), memory("bob", "1"), memory("ann", "2")]
    answer = await api.post("/v1/memories", json={"memories": mixed})
    assert refused(answer) == (409, "memories.3.id", "id_conflict")
    twice = [memory("eve", "1"), memory("ann", "1"), memory("eve", "1")]
    assert refused(await api.post("/v1/memories", json={"memories": twice})) == (409, "memories.2.id", "duplicate_id")
    poisoned = [memory("eve", "1"), memory("ann", "1", "a poison text"), memory("eve", "2")]
    assert refused(await api.post("/v1/memories", json={"memories": poisoned}))[:2] == (500, "memories.1.text")
    assert [user["user_id"] for user in (await api.get("/v1/users")).json()["users"]] == ["bob"]

    del mixed[3]
    answer = await api.post("/v1/memories", json={"memories": mixed})
    assert answer.status_code == 201
    assert answer.json() == {
        "memories": [
            {"user_id": "ann", "id": "1", "status": "added", "version": 1},
            {"user_id": "bob", "id": "2", "status": "added", "version": 2},
            {"user_id": "eve", "id": "1", "status": "added", "version": 1},
            {"user_id": "ann", "id": "2", "status": "added", "version": 2},
        ]
    }


async def test_the_handle_adds_for_many_users(app: LocalApp) -> None:
    rows = await app.gateway.add_many([{"user_id": "ann", "text": "a", "id": "1"}, {"user_id": "bob", "text": "b"}])
    assert rows[0] == {"user_id": "ann", "id": "1", "status": "added", "version": 1}
    assert rows[1]["user_id"] == "bob"
    with pytest.raises(Conflict) as conflict:
        await app.gateway.add_many([{"user_id": "eve", "text": "a"}, {"user_id": "ann", "text": "b", "id": "1"}])
    assert conflict.value.param == "memories.1.id"
    with pytest.raises(InvalidRequest) as invalid:
        await app.gateway.add_many([{"text": "a"}])
    assert invalid.value.param == "memories.0.user_id"


@pytest.mark.parametrize("single", ["tea", b"tea", {"text": "tea"}, {"tea"}, 5, None, iter(["tea"])])
async def test_the_handle_takes_only_lists(app: LocalApp, single: Any) -> None:
    gateway = app.gateway
    for call, param in (
        (gateway.add("ann", single), "memories"),
        (gateway.add_many(single), "memories"),
        (gateway.embed(single), "input"),
        (gateway.import_lines("ann", single), "lines"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            await call
        assert (str(refused.value), refused.value.param) == (f"{param}: must be a list", param)
    assert (await gateway.users())["users"] == []


async def test_the_handle_names_an_item_that_is_not_a_memory(app: LocalApp) -> None:
    for item in (5, None, b"tea", ["tea"], [["text", "tea"]]):
        for call in (
            app.gateway.add("ann", ["tea", item]),
            app.gateway.add_many([{"user_id": "a", "text": "b"}, item]),
        ):
            with pytest.raises(InvalidRequest) as refused:
                await call
            assert refused.value.param == "memories.1"
    assert len(await app.gateway.add("ann", ("tea", {"text": "milk"}))) == 2


async def test_a_conflict_has_the_path_of_the_memory_in_the_request(api: httpx.AsyncClient) -> None:
    await add(api, {"id": "1", "text": "tea"})
    single = await api.post(ANN, json={"id": "1", "text": "milk"})
    assert refused(single) == (409, "id", "id_conflict")
    listed = await api.post(ANN, json={"memories": [{"text": "a"}, {"id": "1", "text": "milk"}]})
    assert refused(listed) == (409, "memories.1.id", "id_conflict")


@pytest.mark.parametrize("many", [False, True])
async def test_an_erasure_wins_over_a_write_that_was_on_its_way(
    app: LocalApp, api: httpx.AsyncClient, many: bool
) -> None:
    await add(api, {"id": "1", "text": "tea"}, {"id": "2", "text": "milk"})
    app.model.gate.clear()
    memory = {"text": "written late"}
    if many:
        body = {"memories": [{"user_id": "bob", **memory}, {"user_id": "ann", **memory}]}
        late = asyncio.create_task(api.post("/v1/memories", json=body))
    else:
        late = asyncio.create_task(api.post(ANN, json=memory))
    update = asyncio.create_task(api.patch(f"{ANN}/2", json={"text": "changed late"}))
    await turns()
    assert (await api.delete("/v1/users/ann")).json() == {"deleted": 2, "version": 3}
    vector = np.eye(DIM)[0].tolist()
    await add(api, {"id": "2", "text": "new", "vector": vector})
    app.model.gate.set()
    assert refused(await late) == (409, "memories.1.user_id" if many else "user_id", "erased")
    assert refused(await update)[::2] == (409, "deleted")
    assert await ids(api) == ["2"]
    assert (await api.get(f"{ANN}/2")).json()["text"] == "new"
    assert (await api.get("/v1/users/bob")).json()["memories"] == 0


async def test_vectors_of_memories_are_not_cached(app: LocalApp, api: httpx.AsyncClient) -> None:
    await add(api, {"id": "1", "text": "tea"})
    await api.patch(f"{ANN}/1", json={"text": "milk"})
    await api.post("/v1/users/ann/import", content=b'{"id": "2", "text": "rain"}\n')
    cache = app.gateway._embedder.cache
    assert len(cache) == 0
    await api.post("/v1/embeddings", json={"input": "tea"})
    assert len(cache) == 1


@pytest.mark.parametrize("when", ["die_before", "die_after"])
async def test_clients_do_not_notice_a_replica_that_dies(app: LocalApp, api: httpx.AsyncClient, when: str) -> None:
    await add(api, {"id": "2", "text": "tea"})
    getattr(app.store, when).extend(["append_together", "get", "list", "search"])
    added = await add(api, {"id": "1", "text": "tea"})
    assert added["memories"][0]["status"] == "added"
    assert await ids(api) == ["2", "1"]
    assert (await api.get(f"{ANN}/1")).status_code == 200
    assert len((await api.post(f"{ANN}/search", json={"query": "tea"})).json()["results"]) == 2
    assert app.store.die_before == app.store.die_after == []


class Write(NamedTuple):
    """The name of the store's method, a request that calls it, and a request that reverts it."""

    call: str
    request: tuple[str, str, Any]
    opposite: tuple[str, str, Any]


TEA = {"id": "1", "text": "tea", "metadata": {"topic": "drinks"}}
AGAIN = ("POST", ANN, TEA)
WRITES = {
    "update": Write("update", ("PATCH", f"{ANN}/1", {"metadata": {"n": 1}}), ("PATCH", f"{ANN}/1", {"text": "milk"})),
    "merge": Write(
        "update",
        ("PATCH", f"{ANN}/1", {"metadata_merge": {"topic": None, "n": 1}}),
        ("PATCH", f"{ANN}/1", {"metadata": {"topic": "none"}}),
    ),
    "conditional update": Write(
        "update", ("PATCH", f"{ANN}/1", {"text": "rain", "if_version": 1}), ("PATCH", f"{ANN}/1", {"text": "milk"})
    ),
    "add": Write(
        "append_together",
        ("POST", ANN, {"text": "milk", "metadata": {"topic": "white"}}),
        ("DELETE", ANN, {"filter": {"topic": "white"}}),
    ),
    "add what is not there yet": Write(
        "append_together",
        ("POST", ANN, {"text": "tea", "metadata": {"topic": "drinks"}, "on_duplicate": "skip"}),
        ("DELETE", f"{ANN}/1", None),
    ),
    "add under an id": Write(
        "append_together", ("POST", ANN, {"id": "3", "text": "milk"}), ("DELETE", f"{ANN}/3", None)
    ),
    "upsert": Write(
        "append_together", ("POST", ANN, {"id": "1", "text": "milk", "upsert": True}), ("DELETE", f"{ANN}/1", None)
    ),
    "delete": Write("delete", ("DELETE", f"{ANN}/1", None), AGAIN),
    "delete many": Write("delete_many", ("DELETE", ANN, {"ids": ["none", "1", "zero"]}), AGAIN),
    "delete by filter": Write("delete_where", ("DELETE", ANN, {"filter": {"topic": "drinks"}}), AGAIN),
    "erase": Write("erase_user", ("DELETE", "/v1/users/ann", None), AGAIN),
}


async def everything(api: httpx.AsyncClient) -> list[dict[str, Any]]:
    memories: list[dict[str, Any]] = (await api.get(ANN)).json()["memories"]
    return memories


@pytest.mark.parametrize("name", WRITES)
async def test_a_write_whose_store_dies_is_made_once(app: LocalApp, api: httpx.AsyncClient, name: str) -> None:
    """The store dies before it answers. Before the write is resent, another client reads it and reverts it."""
    write = WRITES[name]
    await add(api, TEA)
    seen: list[Any] = []

    async def before_the_answer() -> None:
        del app.store.after[write.call]
        seen.append(await everything(api))
        method, path, body = write.opposite
        assert (await api.request(method, path, json=body)).is_success
        seen.append(await everything(api))
        app.store.die_after.append(write.call)

    app.store.after[write.call] = before_the_answer
    method, path, body = write.request
    assert (await api.request(method, path, json=body)).is_success
    assert app.store.die_after == []
    assert await everything(api) == seen[1] != seen[0]


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("header", ["Idempotency-Key", "x-memserve-request"])
async def test_a_write_that_is_sent_again_is_made_once(api: httpx.AsyncClient, name: str, header: str) -> None:
    await add(api, TEA)
    method, path, body = WRITES[name].request
    headers = {header: f"{int(time.time() * 1e6)}-a"}
    first = await api.request(method, path, json=body, headers=headers)
    assert first.is_success
    opposite, path_of_it, body_of_it = WRITES[name].opposite
    assert (await api.request(opposite, path_of_it, json=body_of_it)).is_success
    before = await everything(api)
    again = await api.request(method, path, json=body, headers=headers)
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert await everything(api) == before


async def test_an_add_that_is_sent_again_does_not_bring_back_an_erased_user(api: httpx.AsyncClient) -> None:
    headers = {"x-memserve-request": f"{int(time.time() * 1e6)}-a"}
    assert (await api.post(ANN, json={"text": "tea"}, headers=headers)).is_success
    assert (await api.delete("/v1/users/ann")).is_success
    assert refused(await api.post(ANN, json={"text": "tea"}, headers=headers))[::2] == (409, "erased")
    assert await ids(api) == []


async def test_an_add_that_is_sent_again_under_a_key_does_not_bring_back_an_erased_user(api: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "k"}
    assert (await api.post(ANN, json={"text": "tea"}, headers=headers)).is_success
    assert (await api.delete("/v1/users/ann")).is_success
    assert refused(await api.post(ANN, json={"text": "tea"}, headers=headers))[::2] == (409, "erased")
    assert await ids(api) == []


@pytest.mark.parametrize("change", [{"text": "milk"}, {"metadata": {"n": 1}}])
async def test_an_update_that_is_sent_again_after_a_deletion_is_not_denied(
    api: httpx.AsyncClient, change: dict[str, Any]
) -> None:
    await add(api, TEA)
    headers = {"Idempotency-Key": "k"}
    assert (await api.patch(f"{ANN}/1", json=change, headers=headers)).is_success
    assert (await api.delete(f"{ANN}/1")).is_success
    assert refused(await api.patch(f"{ANN}/1", json=change, headers=headers))[::2] == (409, "deleted")
    assert refused(await api.patch(f"{ANN}/1", json=change))[0] == 404


async def test_an_empty_idempotency_key_is_refused(api: httpx.AsyncClient) -> None:
    answer = await api.post(ANN, json={"text": "tea"}, headers={"Idempotency-Key": ""})
    assert refused(answer)[:2] == (400, "Idempotency-Key")


async def test_a_write_that_may_have_been_made_has_an_unknown_outcome(app: LocalApp, api: httpx.AsyncClient) -> None:
    """A client that is told to try again would add the memory twice, unless it gave an id."""
    app.store.die_after += ["append_together"] * 3
    answer = await api.post(ANN, json={"text": "tea"})
    assert refused(answer) == (503, None, "outcome_unknown")
    assert answer.headers["retry-after"] == "1"
    assert len(await ids(api)) == 1
    assert app.store.die_after == []


async def test_an_unchanged_text_that_another_client_changes_meanwhile_is_embedded(
    app: LocalApp, api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add(api, {"id": "1", "text": "tea"})
    update = app.gateway._store.write

    async def after_another(*args: Any, **changes: Any) -> Any:
        monkeypatch.setattr(app.gateway._store, "write", update)
        await api.patch(f"{ANN}/1", json={"text": "milk"})
        return await update(*args, **changes)

    monkeypatch.setattr(app.gateway._store, "write", after_another)
    changed = (await api.patch(f"{ANN}/1", json={"text": "tea", "metadata": {"n": 1}})).json()
    assert (changed["text"], changed["metadata"], changed["version"]) == ("tea", {"n": 1}, 3)


async def test_a_search_answers_with_context_in_an_order_and_within_a_budget(api: httpx.AsyncClient) -> None:
    texts = ["I adopted a dog", "what is its name", "Biscuit", "is he afraid of thunder", "he hides"]
    await add(api, *({"id": str(n), "text": text, "thread": "talk"} for n, text in enumerate(texts)))

    async def search(**options: Any) -> tuple[list[Any], dict[str, Any]]:
        answer = await api.post(f"{ANN}/search", json={"query": "Biscuit", "mode": "words", "top_k": 1, **options})
        assert answer.status_code == 200, answer.text
        rows = answer.json()["results"]
        return [(row["id"], row.get("offset")) for row in rows], answer.json()

    placed, answer = await search(context=1)
    assert placed == [("1", -1), ("2", None), ("3", 1)]
    before, hit, _ = answer["results"]
    assert (before["context"], before["context_of"], "score" in before) == (True, "2", False)
    assert hit["score"] == 1.0 and "context" not in hit and "tokens" not in answer
    assert (await search(context=1, order="-created_at"))[0] == [("3", 1), ("2", None), ("1", -1)]
    placed, answer = await search(context=2, max_tokens=5)
    assert (placed, answer["tokens"]) == ([("1", -1), ("2", None)], 5)
    placed, answer = await search(context=2, max_tokens=4)
    assert (placed, answer["tokens"]) == ([("2", None), ("4", 2)], 3)
    assert (await search(max_tokens=1, filter={"id": "4"}))[1]["tokens"] == 0
    explained = (await search(context=0, recency_half_life_s=60, explain=True))[1]["results"][0]["scores"]
    assert explained == {"words": 1.0, "context": 0.0, "recency": pytest.approx(1.0, abs=0.1)}
    assert (await search(since="2100-01-01T00:00:00Z"))[0] == []
    assert (await search(until="2100-01-01T00:00:00+01:00"))[0] == [("2", None)]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"context": -1}, "context"),
        ({"context": 21}, "context"),
        ({"context": True}, "context"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"order": "newest"}, "order"),
        ({"since": "2026-01-01"}, "since"),
        ({"until": "2026-01-01T00:00:00"}, "until"),
        ({"since": "2026-01-01T00:00:00Z", "until": "2026-01-01T00:00:00Z"}, "until"),
        ({"recency_half_life_s": 0}, "recency_half_life_s"),
        ({"recency_half_life_s": "day"}, "recency_half_life_s"),
    ],
)
async def test_a_wrong_option_of_a_search_is_named(api: httpx.AsyncClient, options: dict[str, Any], param: str) -> None:
    assert refused(await api.post(f"{ANN}/search", json={"query": "a", **options}))[:2] == (400, param)


async def test_a_near_duplicate_is_not_added(api: httpx.AsyncClient) -> None:
    await add(api, {"id": "1", "text": "green tea"})
    vector = (await api.get(f"{ANN}/1?include_vectors=true")).json()["vector"]
    near = {"text": "Green tea!", "vector": [vector[0] + 0.01, *vector[1:]]}
    options = {"on_duplicate": "skip", "duplicate_score": 0.9}
    added = await add(api, near, {"text": "green tea", "metadata": {"n": 1}}, {"id": "2", "text": "rain"}, **options)
    assert [(one["id"], one["status"]) for one in added["memories"]] == [
        ("1", "unchanged"),
        ("1", "unchanged"),
        ("2", "added"),
    ]
    many = {"memories": [{"user_id": "ann", **near}, {"user_id": "bob", **near, "id": "b"}], **options}
    answer = (await api.post("/v1/memories", json=many)).json()
    assert [one["id"] for one in answer["memories"]] == ["1", "b"]


@pytest.mark.parametrize(
    "options",
    [
        {"duplicate_score": 0.9},
        {"duplicate_score": 0, "on_duplicate": "skip"},
        {"duplicate_score": 1.1, "on_duplicate": "skip"},
        {"duplicate_score": "high", "on_duplicate": "skip"},
    ],
)
async def test_a_wrong_duplicate_score_is_named(api: httpx.AsyncClient, options: dict[str, Any]) -> None:
    assert refused(await api.post(ANN, json={"text": "a", **options}))[:2] == (400, "duplicate_score")
    many = {"memories": [{"user_id": "ann", "text": "a"}], **options}
    assert refused(await api.post("/v1/memories", json=many))[:2] == (400, "duplicate_score")


async def test_near_duplicates_are_listed_and_kept(api: httpx.AsyncClient) -> None:
    await add(api, {"id": "1", "text": "green tea"}, {"id": "2", "text": "rain"})
    vector = (await api.get(f"{ANN}/1?include_vectors=true")).json()["vector"]
    await add(api, {"id": "3", "text": "Green tea!", "vector": vector})
    answer = await api.post(f"{ANN}/duplicates", json={"score": 0.99})
    assert answer.status_code == 200
    (group,) = answer.json()["groups"]
    assert [(memory["id"], memory.get("score")) for memory in group["memories"]] == [("1", None), ("3", 1.0)]
    assert answer.json()["next_cursor"] is None
    assert (await api.post(f"{ANN}/duplicates")).json() == answer.json()
    assert (await api.post("/v1/users/nobody/memories/duplicates")).json() == {"groups": [], "next_cursor": None}
    assert len((await api.get(ANN)).json()["memories"]) == 3
    for body, param in (({"score": 0}, "score"), ({"limit": 101}, "limit"), ({"cursor": "a"}, "cursor")):
        assert refused(await api.post(f"{ANN}/duplicates", json=body))[:2] == (400, param)
