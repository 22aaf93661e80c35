"""The figures of the benchmark on conversations, and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks import locomo, report
from benchmarks.locomo import Server, figures, measure, moment, questions, ranks_of

TURN = {"id": "D1:1", "session": 1, "when": "1:56 pm on 8 May, 2023", "speaker": "Ann", "text": "Biscuit is afraid"}
TALK = {
    "conversation": 3,
    "memories": [TURN, {**TURN, "id": "D1:2", "text": "of thunder"}],
    "questions": [
        {"question": "What is Biscuit afraid of?", "evidence": ["D1:1", "D1:2"], "category": 4},
        {"question": "Who was not there?", "evidence": ["D9:9"], "category": 5},
        {"question": "Who is Biscuit?", "evidence": ["D1:1"], "category": 1},
    ],
}


def test_ranks_recall_hits_and_reciprocal_ranks() -> None:
    asked = [ranks_of(["a", "b", "b"], ["x", "b", "y"]), ranks_of(["c"], ["c"]), ranks_of(["d"], [])]
    assert asked == [[None, 2], [1], [None]]
    found = figures(asked)
    assert found["recall"] == {1: 0.3333, 3: 0.5, 5: 0.5, 10: 0.5, 20: 0.5}
    assert found["hit"] == {1: 0.3333, 3: 0.6667, 5: 0.6667, 10: 0.6667, 20: 0.6667}
    assert (found["questions"], found["mrr"]) == (3, 0.5)


def test_a_question_without_an_answer_in_its_conversation_is_not_asked() -> None:
    assert [question["category"] for _, question in questions([TALK], None)] == [4, 1]
    assert [question["category"] for _, question in questions([TALK], 1)] == [4]


def test_a_time_of_the_data_is_a_time_of_the_wire() -> None:
    assert moment("1:56 pm on 8 May, 2023") == "2023-05-08T13:56:00+00:00"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> tuple[Server, list[Any]]:
    """A server that knows modes and threads, finds the last memory first, and records the bodies that it gets."""
    bodies: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/openapi.json":
            search = {"query": {}, "top_k": {}, "mode": {}, "rerank": {}}
            memory = {"id": {}, "text": {}, "thread": {}}
            schemas = {"SearchBody": {"properties": search}, "NewMemoryBody": {"properties": memory}}
            return httpx.Response(200, json={"components": {"schemas": schemas}})
        assert request.url.path.startswith("/v1/users/conversation-3/memories")
        bodies.append(httpx.Response(200, content=request.content).json())
        results = [{"id": "D1:2", "context": True}, {"id": "D1:2"}, {"id": "D1:1"}]
        return httpx.Response(200, json={"results": results})

    client = httpx.Client(base_url="http://memserve", transport=httpx.MockTransport(answer))
    monkeypatch.setattr(locomo.httpx, "Client", lambda **_: client)
    return Server("http://memserve"), bodies


def test_each_question_is_asked_in_every_way_that_the_server_knows(
    server: tuple[Server, list[Any]], tmp_path: Path
) -> None:
    asked, bodies = server
    assert asked.stages(reranks=False) == ["vector", "words", "hybrid"]
    assert asked.stages(reranks=True) == ["vector", "words", "hybrid", "hybrid, rerank"]
    rows = measure(asked, [TALK], ["vector", "words"], None)
    assert bodies[0]["memories"][0] == {"id": "D1:1", "text": "Ann: Biscuit is afraid", "thread": "session 1"}
    queries = [(body["query"], body["mode"]) for body in bodies[3:]]
    assert queries == [
        ("What is Biscuit afraid of?", "vector"),
        ("What is Biscuit afraid of?", "words"),
        ("Who is Biscuit?", "words"),
        ("Who is Biscuit?", "vector"),
    ]
    assert [(row["stage"], row["recall"]["20"], row["mrr"]) for row in rows] == [
        ("vector", 1, 0.75),
        ("words", 1, 0.75),
    ]
    found = {"kind": "locomo", "conversations": 1, "memories": 2, "rows": rows}
    files = report.save(found, tmp_path / "locomo.json")
    assert "| vector | 1.000 | 1.000 | 0.750 |" in files[1].read_text()
    assert "| search by | multi-hop (1) | single-hop (1) |" in files[1].read_text()
