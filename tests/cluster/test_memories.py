"""The memory routes over HTTP: two store replicas, any of which may answer."""

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import numpy as np
import pytest


@pytest.fixture
def user() -> str:
    return f"user-{uuid.uuid4()}"


def add(http: httpx.Client, user: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = http.post(f"/v1/users/{user}/memories", json=body)
    assert answer.status_code == 201, answer.text
    content: dict[str, Any] = answer.json()
    return content


def search(http: httpx.Client, user: str, **body: Any) -> dict[str, Any]:
    answer = http.post(f"/v1/users/{user}/memories/search", json=body)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def ids(found: dict[str, Any]) -> set[str]:
    return {memory["id"] for memory in found["results"]}


def test_a_memory_is_found_by_the_next_search_every_time(http: httpx.Client, user: str) -> None:
    for n in range(40):
        (entry,) = add(http, user, {"text": f"note number {n}"})["memories"]
        assert entry["status"] == "added"
        assert entry["id"] in ids(search(http, user, query=f"note number {n}", top_k=1000))


def test_a_call_between_deployments_may_be_as_large_as_a_request(http: httpx.Client, user: str) -> None:
    """One message in each direction, larger than gRPC's default limit of 4 MiB."""
    vectors = np.random.default_rng(0).integers(-9, 10, (1000, 384))
    memories = [{"id": f"{n}", "text": "word " * 1500, "vector": row.tolist()} for n, row in enumerate(vectors)]
    assert len(add(http, user, {"memories": memories})["memories"]) == 1000
    page = http.get(f"/v1/users/{user}/memories", params={"limit": 1000})
    assert page.status_code == 200 and len(page.content) > 7_500_000
    assert len(page.json()["memories"]) == 1000
    found = search(http, user, vector=vectors[7].tolist(), top_k=1000, include_vectors=True)
    assert (len(found["results"]), found["results"][0]["id"]) == (1000, "7")


def test_a_whole_memory_comes_back(http: httpx.Client, user: str) -> None:
    before = datetime.now(UTC)
    metadata = {"source": {"app": "mail"}, "tags": ["a", "b"], "n": 3, "x": 1.5, "none": None, "yes": True}
    expires = (before + timedelta(days=1)).isoformat()
    add(http, user, {"text": "Tee 🍵 um fünf", "id": "m/1 ü", "metadata": metadata, "expires_at": expires})
    (found,) = search(http, user, query="Tee 🍵 um fünf", mode="vector", include_vectors=True)["results"]
    assert (found["id"], found["user_id"], found["text"], found["metadata"]) == (
        "m/1 ü",
        user,
        "Tee 🍵 um fünf",
        metadata,
    )
    assert abs(found["score"] - 1.0) <= 1e-4
    assert found["version"] == 1
    assert before <= datetime.fromisoformat(found["created_at"]) <= datetime.now(UTC)
    assert datetime.fromisoformat(found["expires_at"]) == datetime.fromisoformat(expires)
    assert len(found["vector"]) == 384


def test_users_never_see_each_other(http: httpx.Client) -> None:
    users = [f"tenant-{uuid.uuid4()}" for _ in range(8)]
    memories = [{"user_id": user, "text": f"the secret of {user}"} for user in users for _ in range(3)]
    answer = http.post("/v1/memories", json={"memories": memories})
    assert answer.status_code == 201
    assert [entry["user_id"] for entry in answer.json()["memories"]] == [memory["user_id"] for memory in memories]
    for user in users:
        found = search(http, user, query=f"the secret of {users[0]}", top_k=1000)["results"]
        assert len(found) == 3
        assert {memory["user_id"] for memory in found} == {user}


def test_ids_with_slashes_and_percent_signs(http: httpx.Client) -> None:
    for user in (f"a/b {uuid.uuid4()}", f"100%25 {uuid.uuid4()}", f"ü?#&{uuid.uuid4()}"):
        path = "/v1/users/" + httpx.QueryParams({"": user}).__str__()[1:].replace("+", "%20") + "/memories"
        assert http.post(path, json={"text": "hello"}).status_code == 201
        (found,) = http.post(f"{path}/search", json={"query": "hello"}).json()["results"]
        assert found["user_id"] == user


def test_a_supplied_id_is_idempotent_and_conflicts_on_other_content(http: httpx.Client, user: str) -> None:
    first = add(http, user, {"id": "one", "text": "first"})
    again = add(http, user, {"id": "one", "text": "first"})
    assert again["memories"] == [{**first["memories"][0], "status": "unchanged"}]
    assert again["version"] == first["version"]
    conflict = http.post(f"/v1/users/{user}/memories", json={"id": "one", "text": "second"})
    assert conflict.status_code == 409
    assert conflict.json()["error"]["type"] == "conflict_error"
    changed = add(http, user, {"id": "one", "text": "second", "upsert": True})
    assert changed["memories"][0]["status"] == "updated"
    (found,) = search(http, user, query="anything")["results"]
    assert found["text"] == "second"


def test_a_deleted_memory_is_gone_at_once(http: httpx.Client, user: str) -> None:
    add(http, user, {"memories": [{"id": str(n), "text": f"text {n}"} for n in range(20)]})
    for n in range(0, 20, 2):
        assert http.delete(f"/v1/users/{user}/memories/{n}").status_code == 204
        assert str(n) not in ids(search(http, user, query=f"text {n}", top_k=1000))
    assert ids(search(http, user, query="text", top_k=1000)) == {str(n) for n in range(1, 20, 2)}
    assert http.delete(f"/v1/users/{user}/memories/0").status_code == 404
    assert http.delete(f"/v1/users/somebody-else-{user}/memories/1").status_code == 404


def test_search_by_vector_and_by_text_agree(http: httpx.Client, user: str) -> None:
    add(http, user, {"memories": [{"text": text} for text in ("tea", "coffee", "a train", "a plane", "snow")]})
    vector = http.post("/v1/embeddings", json={"input": "hot drinks"}).json()["data"][0]["embedding"]
    by_vector = search(http, user, vector=vector)["results"]
    by_text = search(http, user, query="hot drinks", mode="vector")["results"]
    assert [memory["id"] for memory in by_vector] == [memory["id"] for memory in by_text]
    assert np.allclose([m["score"] for m in by_vector], [m["score"] for m in by_text], atol=1e-5)


def test_top_k_and_min_score(http: httpx.Client, user: str) -> None:
    add(http, user, {"memories": [{"text": f"fact {n}"} for n in range(12)]})
    assert len(search(http, user, query="fact 3")["results"]) == 10
    assert len(search(http, user, query="fact 3", top_k=12)["results"]) == 12
    for mode in ("vector", "words", "hybrid"):
        best = search(http, user, query="fact 3", mode=mode, min_score=0.999)["results"]
        assert [memory["text"] for memory in best] == ["fact 3"]
    assert search(http, f"nobody-{user}", query="fact")["results"] == []


def test_own_vectors_are_used(http: httpx.Client, user: str) -> None:
    axis = [0.0] * 384
    axis[7] = 2.0
    add(http, user, {"text": "seven", "vector": axis})
    (found,) = search(http, user, vector=axis)["results"]
    assert found["score"] == 1.0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"text": ""}, "text"),
        ({"text": "a", "colour": 1}, "colour"),
        ({"memories": []}, "memories"),
        ({"memories": [{"text": "a"}, {"text": "  "}]}, "memories.1.text"),
        ({"memories": [{"text": "a", "id": ""}]}, "memories.0.id"),
        ({"text": "a", "id": "x" * 257}, "id"),
        ({"text": "a", "id": "a\nb"}, "id"),
        ({"text": "a", "vector": [0.5]}, "vector"),
        ({"text": "a", "vector": [0.0] * 384}, "vector"),
        ({"memories": [{"text": "a", "vector": [1e39] * 384}]}, "memories.0.vector"),
        ({"text": "a", "metadata": "none"}, "metadata"),
        ({"text": "a\0b"}, "text"),
        ({"text": "a", "expires_at": "tomorrow"}, "expires_at"),
    ],
)
def test_bad_memories_name_the_field(http: httpx.Client, user: str, body: dict[str, Any], param: str | None) -> None:
    answer = http.post(f"/v1/users/{user}/memories", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert search(http, user, query="a")["results"] == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"query": "a", "vector": [1.0] * 384}, None),
        ({"query": ""}, "query"),
        ({"query": "a", "top_k": 0}, "top_k"),
        ({"query": "a", "top_k": 1001}, "top_k"),
        ({"query": "a", "min_score": 2}, "min_score"),
        ({"vector": [1.0] * 3}, "vector"),
    ],
)
def test_bad_searches_name_the_field(http: httpx.Client, user: str, body: dict[str, Any], param: str | None) -> None:
    answer = http.post(f"/v1/users/{user}/memories/search", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
