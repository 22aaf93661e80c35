"""Searches by words and by both words and vectors, over HTTP, as a user of memserve makes them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.local_app import DIM, LocalApp

ANN = "/v1/users/ann/memories"
TEXTS = {
    "vet": "Biscuit trembles whenever it thunders",
    "walk": "The dog likes long walks in the rain",
    "order": "Ordered 40 pieces of AX-4471-B for the pump",
    "other": "Ordered 2 pieces of AX-4470-C for the pump",
    "guest": "Frau Nowaczyńska moved to the second floor",
    "ticket": "Ticket 7f3a9c2e-51d0 is about the login page",
}


@pytest.fixture
async def api(app: LocalApp) -> httpx.AsyncClient:
    """The routes, with ann's memories."""
    memories = [{"id": id, "text": text} for id, text in TEXTS.items()]
    assert (await app.http.post(ANN, json={"memories": memories})).status_code == 201
    return app.http


async def search(api: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    answer = await api.post(f"{ANN}/search", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


@pytest.mark.parametrize("mode", [None, "hybrid", "words"])
@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("what is Biscuit afraid of?", "vet"),
        ("AX-4471-B", "order"),
        ("40 pieces of ax 4471", "order"),
        ("nowaczynska", "guest"),
        ("7F3A9C2E-51D0", "ticket"),
        ("a dog walking", "walk"),
    ],
)
async def test_a_name_or_a_number_is_found_by_typing_it(
    api: httpx.AsyncClient, mode: str | None, query: str, found: str
) -> None:
    best = (await search(api, query=query, mode=mode))[0]
    assert (best["id"], "scores" in best) == (found, False)
    assert 0.0 < best["score"] <= 1.0


async def test_a_search_by_words_embeds_nothing(app: LocalApp, api: httpx.AsyncClient) -> None:
    before = list(app.model.texts)
    found = await search(api, query="pump pieces", mode="words", explain=True)
    assert [(one["id"], one["score"], one["scores"]) for one in found] == [
        ("other", 1.0, {"words": 1.0}),
        ("order", 1.0, {"words": 1.0}),
    ]
    assert await search(api, query="giraffe", mode="words") == []
    assert app.model.texts == before
    await search(api, query="pump pieces", mode="vector")
    assert app.model.texts == [*before, "pump pieces"]


async def test_a_search_by_both_explains_its_scores(api: httpx.AsyncClient) -> None:
    by = {
        mode: {one["id"]: one for one in await search(api, query="ordered pump", mode=mode, explain=True)}
        for mode in ("vector", "words", "hybrid")
    }
    assert set(by["vector"]) == set(by["hybrid"]) == set(TEXTS)
    cosines = {id: one["score"] for id, one in by["vector"].items()}
    least, most = min(cosines.values()), max(cosines.values())
    scaled = {id: (cosine - least) / (most - least) for id, cosine in cosines.items()}
    wordless = max(TEXTS.keys() - by["words"].keys(), key=lambda id: scaled[id])
    weight = 1 - by["hybrid"][wordless]["score"] / scaled[wordless]
    assert 0.3 < weight < 0.7
    for id, one in by["hybrid"].items():
        words = by["words"][id]["score"] if id in by["words"] else 0.0
        assert one["scores"] == {"vector": cosines[id], "words": words}
        assert by["vector"][id]["scores"] == {"vector": cosines[id]}
        assert one["score"] == pytest.approx((1 - weight) * scaled[id] + weight * words, abs=1e-4)


async def test_if_no_memory_has_a_word_of_the_query_the_order_is_that_of_the_vectors(api: httpx.AsyncClient) -> None:
    by_vector = await search(api, query="🙂 giraffe", mode="vector")
    by_both = await search(api, query="🙂 giraffe")
    assert [one["id"] for one in by_both] == [one["id"] for one in by_vector]
    assert by_both[0]["score"] == 1.0


async def test_min_score_is_of_the_score_of_the_mode(api: httpx.AsyncClient) -> None:
    for mode in ("vector", "words", "hybrid"):
        everything = await search(api, query="dog in the rain", mode=mode)
        least = everything[0]["score"]
        assert await search(api, query="dog in the rain", mode=mode, min_score=least) == everything[:1]


async def test_a_filter_leaves_its_memories_alone_to_decide_how_rare_a_word_is(api: httpx.AsyncClient) -> None:
    await api.post(ANN, json={"memories": [{"text": f"rare pump {n}", "metadata": {"kind": "x"}} for n in range(3)]})
    found = await search(api, query="rare pump", mode="words", filter={"kind": "x"}, explain=True)
    assert [one["text"] for one in found] == ["rare pump 2", "rare pump 1", "rare pump 0"]
    assert {one["score"] for one in found} == {1.0}


async def test_equal_memories_are_found_the_newest_first(api: httpx.AsyncClient) -> None:
    await api.post(ANN, json={"memories": [{"id": str(n), "text": "a lighthouse"} for n in range(150)]})
    for mode in ("hybrid", "words", "vector"):
        found = await search(api, query="lighthouse", mode=mode, top_k=3)
        assert [one["id"] for one in found] == ["149", "148", "147"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"query": "tea", "mode": "bm25"}, "mode"),
        ({"vector": [1.0] * DIM, "mode": "words"}, "mode"),
        ({"vector": [1.0] * DIM, "mode": "hybrid"}, "mode"),
        ({"mode": "words"}, None),
        ({"query": "tea", "explain": "yes"}, "explain"),
    ],
)
async def test_a_wrong_mode_is_refused(api: httpx.AsyncClient, body: dict[str, Any], param: str | None) -> None:
    answer = await api.post(f"{ANN}/search", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_vector_may_say_that_it_is_searched_by_vector(api: httpx.AsyncClient) -> None:
    vector = [1.0, *[0.0] * (DIM - 1)]
    assert await search(api, vector=vector, mode="vector") == await search(api, vector=vector)
