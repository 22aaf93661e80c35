"""Reranking by the routes of Cohere and Jina, by TEI's route, by the handle, and of searches.

The fake reranker's logit is the number of words of a text that the query has.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.errors import InvalidRequest, Overloaded
from tests.local_app import LocalApp

QUERY = "the dog fears thunder"
TEXTS = ["rain", "the dog sleeps", "the dog fears loud thunder", "the rain"]


def score(logit: float) -> float:
    return pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6)  # type: ignore[return-value]


@pytest.fixture
async def without_reranker(tmp_path: Path) -> AsyncIterator[LocalApp]:
    app = await LocalApp.start(tmp_path, reranker={"model": None})
    yield app
    await app.stop()


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
async def test_documents_are_answered_best_first(api: httpx.AsyncClient, path: str) -> None:
    documents = [*TEXTS[:2], {"text": TEXTS[2], "title": "ignored"}, TEXTS[3]]
    answer = await api.post(path, json={"query": QUERY, "documents": documents, "model": "fake-reranker"})
    assert answer.status_code == 200
    assert answer.json() == {
        "model": "fake-reranker",
        "results": [
            {"index": 2, "relevance_score": score(4)},
            {"index": 1, "relevance_score": score(2)},
            {"index": 3, "relevance_score": score(1)},
            {"index": 0, "relevance_score": score(0)},
        ],
        "usage": {"prompt_tokens": 27, "total_tokens": 27, "truncated_inputs": 0},
    }
    body = {"query": QUERY, "documents": documents, "top_n": 2, "return_documents": True, "max_tokens_per_doc": 512}
    assert (await api.post(path, json=body)).json()["results"] == [
        {"index": 2, "relevance_score": score(4), "document": {"text": TEXTS[2]}},
        {"index": 1, "relevance_score": score(2), "document": {"text": TEXTS[1]}},
    ]


async def test_documents_that_are_too_long_are_cut_and_counted(api: httpx.AsyncClient) -> None:
    body = {"query": QUERY, "documents": ["the " * 300, "dog"]}
    answer = (await api.post("/v1/rerank", json=body)).json()
    assert answer["usage"] == {"prompt_tokens": 261, "total_tokens": 261, "truncated_inputs": 1}


@pytest.mark.parametrize(
    ("change", "param", "message", "code"),
    [
        ({"query": None}, "query", "Input should be a valid string", None),
        ({"query": ""}, "query", "must not be empty", None),
        ({"query": "a" * 32_769}, "query", "String should have at most 32768 characters", None),
        ({"documents": []}, "documents", "must not be empty", "empty_input"),
        ({"documents": "one"}, "documents", "must be a list", None),
        ({"documents": ["a", ""]}, "documents.1", "must not be empty", "empty_input"),
        ({"documents": ["a", {"text": ""}]}, "documents.1.text", "must not be empty", "empty_input"),
        ({"documents": [{"title": "a"}]}, "documents.0.text", "is required", "missing_field"),
        ({"documents": ["a", 5]}, "documents.1", "must be a string", None),
        ({"documents": ["a", {"text": None}]}, "documents.1.text", "must be a string", None),
        ({"documents": ["a"] * 2049}, "documents", "must hold at most 2048 items, not 2049", "too_many_inputs"),
        ({"top_n": 0}, "top_n", "Input should be greater than or equal to 1", None),
        ({"topn": 1}, "topn", "unknown field", "unknown_field"),
        ({"documents": ["a", "poison"]}, "documents.1", "the model failed on this input", None),
    ],
)
async def test_wrong_bodies_are_refused_with_the_path(
    api: httpx.AsyncClient, change: dict[str, Any], param: str, message: str, code: str | None
) -> None:
    answer = await api.post("/v1/rerank", json={"query": "q", "documents": ["a"], **change})
    assert answer.status_code == (500 if "poison" in str(change) else 400)
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"].startswith(f"{param}: {message}")


async def test_another_model_is_not_served(api: httpx.AsyncClient) -> None:
    body = {"query": "q", "documents": ["a"], "model": "rerank-v3.5"}
    answer = await api.post("/v1/rerank", json=body)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == (
        "model: 'rerank-v3.5' is not served here; the served model is 'fake-reranker'"
    )
    body["model"] = "cross-encoder/fake-reranker"
    assert (await api.post("/v1/rerank", json=body)).status_code == 200


async def test_teis_route(api: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"query": QUERY, "texts": TEXTS, "unknown": True}
    assert (await api.post("/rerank", json=body)).json() == [
        {"index": 2, "score": score(4)},
        {"index": 1, "score": score(2)},
        {"index": 3, "score": score(1)},
        {"index": 0, "score": score(0)},
    ]
    answer = await api.post("/rerank", json={**body, "raw_scores": True, "return_text": True})
    assert answer.json() == [
        {"index": 2, "score": 4.0, "text": TEXTS[2]},
        {"index": 1, "score": 2.0, "text": TEXTS[1]},
        {"index": 3, "score": 1.0, "text": TEXTS[3]},
        {"index": 0, "score": 0.0, "text": TEXTS[0]},
    ]


async def test_teis_route_cuts_texts_only_if_it_is_asked_to(api: httpx.AsyncClient) -> None:
    body = {"query": QUERY, "texts": ["dog", "dog " + "a " * 300 + "thunder fears"], "raw_scores": True}
    answer = await api.post("/rerank", json=body)
    assert answer.status_code == 400
    assert answer.json() == {
        "error": "texts.1: has at least 307 tokens; the model reads at most 256",
        "error_type": "Validation",
        "param": "texts.1",
        "code": "context_length_exceeded",
    }
    answer = await api.post("/rerank", json={**body, "truncate": True})
    assert [one["score"] for one in answer.json()] == [1.0, 1.0]


async def test_by_handle(app: LocalApp) -> None:
    assert await app.gateway.rerank(QUERY, TEXTS, top_n=1, return_documents=True) == [
        {"index": 2, "relevance_score": score(4), "document": {"text": TEXTS[2]}}
    ]
    with pytest.raises(InvalidRequest) as caught:
        await app.gateway.rerank(QUERY, "a text")  # type: ignore[arg-type]
    assert (caught.value.param, caught.value.message) == ("documents", "must be a list")


async def test_pairs_of_all_requests_that_wait_share_batches(app: LocalApp) -> None:
    queries = [f"{QUERY} {n}" for n in range(40)]
    rankings = await asyncio.gather(*(app.gateway.rerank(query, TEXTS, top_n=1) for query in queries))
    assert [ranking[0]["index"] for ranking in rankings] == [2] * 40
    batches = app.ranker.model.batches
    assert sum(map(len, batches)) == 160
    assert len(batches) <= 8


async def test_a_full_queue_refuses_more_pairs(tmp_path: Path) -> None:
    app = await LocalApp.start(tmp_path, gateway={"max_queued_tokens": 64, "embed_call_tokens": 64})
    await app.gateway.rerank("q", ["known"])
    app.ranker.gate.clear()
    asked = []
    for _ in range(8):  # two calls are in flight, two requests wait
        asked.append(asyncio.create_task(app.gateway.rerank("dog " * 60, ["a"])))
        for _ in range(20):
            await asyncio.sleep(0)
    assert (await app.gateway.record_autoscaling_stats())["waiting_for_reranker_tokens"] == 124  # twice 62
    app.ranker.gate.set()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [isinstance(answer, Overloaded) for answer in answers] == [False] * 4 + [True] * 4
    assert await app.gateway.record_autoscaling_stats() == {"waiting_tokens": 0, "waiting_for_reranker_tokens": 0}
    await app.stop()


async def test_without_a_reranker_requests_to_rerank_are_refused_by_name(without_reranker: LocalApp) -> None:
    app = without_reranker
    message = "No reranker is served here: set reranker.model to a cross-encoder."
    for path in ("/v1/rerank", "/v2/rerank"):
        answer = await app.http.post(path, json={"query": "q", "documents": ["a"]})
        assert answer.status_code == 400
        assert answer.json()["error"] == {
            "message": message,
            "type": "invalid_request_error",
            "param": None,
            "code": "no_reranker",
        }
    answer = await app.http.post("/rerank", json={"query": "q", "texts": ["a"]})
    assert (answer.status_code, answer.json()["error"], answer.json()["code"]) == (400, message, "no_reranker")
    with pytest.raises(InvalidRequest) as caught:
        await app.gateway.search("anna", "q", rerank=True)
    assert caught.value.code == "no_reranker"
    assert await app.gateway.search("anna", "q") == []
    assert (await app.http.get("/health/ready")).status_code == 200


async def test_readiness_does_not_wait_for_a_reranker(app: LocalApp) -> None:
    assert (await app.http.get("/health/ready")).status_code == 200
    assert app.reranker.calls == []


async def test_a_search_sorts_its_candidates_by_the_reranker(app: LocalApp) -> None:
    texts = [f"number {n}" for n in range(60)] + ["thunder number fears dog the"]
    await app.gateway.add("anna", texts)
    plain = await app.gateway.search("anna", "number 7", top_k=61)
    assert plain[0]["text"] == "number 7"
    ranked = await app.gateway.search("anna", "number 7", rerank=True, top_k=3)
    assert [(memory["text"], memory["score"]) for memory in ranked[:1]] == [("number 7", score(2))]
    assert [memory["score"] for memory in ranked[1:]] == [score(1), score(1)]
    # Equal scores keep the order of the search.
    assert [memory["text"] for memory in ranked] == [memory["text"] for memory in plain[:3]]
    assert set(ranked[0]) == set(plain[0])
    assert sum(map(len, app.ranker.model.batches)) == 50  # of 61
    await app.gateway.search("anna", "number 7", rerank=True, top_k=55)
    assert sum(map(len, app.ranker.model.batches)) == 105


async def test_the_order_of_a_search_is_the_rerankers(app: LocalApp) -> None:
    await app.gateway.add("anna", ["dog dog dog", "the dog fears loud thunder at night in the old house by the sea"])
    plain = await app.gateway.search("anna", "dog")
    assert plain[0]["text"] == "dog dog dog"
    answer = await app.http.post("/v1/users/anna/memories/search", json={"query": "dog by sea night", "rerank": True})
    assert [memory["text"].split()[0] for memory in answer.json()["results"]] == ["the", "dog"]
    assert answer.json()["results"][0]["score"] == score(4)


@pytest.mark.parametrize(("mode", "parts"), [("hybrid", {"vector", "words"}), ("words", {"words"})])
async def test_the_score_of_the_reranker_is_explained(app: LocalApp, mode: str, parts: set[str]) -> None:
    await app.gateway.add("anna", ["the dog", "a cat and a dog"])
    found = await app.gateway.search("anna", "the dog", mode=mode, rerank=True, explain=True)
    assert [set(memory["scores"]) for memory in found] == [{*parts, "rerank"}] * 2
    assert [memory["scores"]["rerank"] for memory in found] == [memory["score"] for memory in found]
    assert found[0]["score"] == score(2)


async def test_the_least_score_is_of_the_search_before_it_is_reranked(app: LocalApp) -> None:
    await app.gateway.add("anna", ["the dog", "dog dog dog sea night old loud house"])
    found = await app.gateway.search("anna", "the dog", mode="vector", min_score=0.5, rerank=True)
    assert [(memory["text"], memory["score"]) for memory in found] == [("the dog", score(2))]


async def test_a_search_without_memories_asks_no_reranker(app: LocalApp) -> None:
    assert await app.gateway.search("nobody", "q", rerank=True) == []
    assert app.reranker.calls == []


async def test_a_search_by_vector_cannot_be_reranked(api: httpx.AsyncClient) -> None:
    answer = await api.post("/v1/users/anna/memories/search", json={"vector": [1.0] * 32, "rerank": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "rerank: needs a query"


async def test_a_query_that_is_too_long_is_not_sent_with_each_candidate(app: LocalApp) -> None:
    query = "a" * 32_769
    assert await app.gateway.search("anna", query) == []
    with pytest.raises(InvalidRequest, match="at most 32768 characters") as caught:
        await app.gateway.search("anna", query, rerank=True)
    assert caught.value.param == "query"
    answer = await app.http.post("/rerank", json={"query": query, "texts": ["a"]})
    assert answer.json()["error"] == "query: String should have at most 32768 characters"


async def test_the_memories_around_a_result_move_with_it(app: LocalApp) -> None:
    lines = ["the sea", "it rains", "dog dog dog", "a cat", "the dog fears thunder", "the end"]
    await app.gateway.add("anna", [{"text": text, "thread": "talk"} for text in lines])
    found = await app.gateway.search("anna", "the dog fears", top_k=1, context=1, rerank=True)
    assert [(memory["text"], memory.get("context", False)) for memory in found] == [
        ("a cat", True),
        ("the dog fears thunder", False),
        ("the end", True),
    ]


async def test_the_budget_holds_the_best_results_of_the_reranker(app: LocalApp) -> None:
    await app.gateway.add("anna", ["dog", "the dog fears thunder at night", "cat"])
    found = await app.gateway.search("anna", "the dog fears thunder", rerank=True, max_tokens=6)
    assert [memory["text"] for memory in found] == ["the dog fears thunder at night"]
