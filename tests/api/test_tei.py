"""The routes of text-embeddings-inference, in this process, on the fake model."""

from typing import Any

import httpx
import numpy as np
import pytest

from deployments.api import tei
from deployments.calls import resilient
from tests.local_app import DIM, LocalApp


async def embeddings(api: httpx.AsyncClient, **body: Any) -> np.ndarray:
    answer = await api.post("/v1/embeddings", json=body)
    return np.array([entry["embedding"] for entry in answer.json()["data"]], np.float32)


async def test_embed_gives_the_vectors_of_openais_route(api: httpx.AsyncClient) -> None:
    for inputs in ("green tea", ["green tea", "a train"], [5, 6], [[5, 6], [7]]):
        answer = await api.post("/embed", json={"inputs": inputs})
        assert answer.status_code == 200
        assert float(answer.headers["x-inference-time"]) >= 0
        assert np.allclose(np.array(answer.json(), np.float32), await embeddings(api, input=inputs), atol=1e-6)


async def test_embed_normalises_shortened_vectors_unless_normalize_is_false(api: httpx.AsyncClient) -> None:
    body = {"inputs": ["green tea"], "dimensions": 8}
    (scaled,) = (await api.post("/embed", json=body)).json()
    (plain,) = (await api.post("/embed", json={**body, "normalize": False})).json()
    (whole,) = await embeddings(api, input=["green tea"])
    assert np.allclose(plain, whole[:8]) and np.linalg.norm(plain) < 0.99
    assert np.allclose(scaled, np.array(plain) / np.linalg.norm(plain), atol=1e-6)


async def test_embed_takes_prompts_by_their_name(api: httpx.AsyncClient) -> None:
    (query,) = (await api.post("/embed", json={"inputs": "tea", "prompt_name": "query"})).json()
    assert np.allclose(query, (await embeddings(api, input="tea", input_type="query"))[0], atol=1e-6)
    (bare,) = (await api.post("/embed", json={"inputs": "tea"})).json()
    assert not np.allclose(query, bare)
    answer = await api.post("/embed", json={"inputs": "tea", "prompt_name": "nope"})
    assert answer.json()["error"]["param"] == "prompt_name"
    assert "'query'" in answer.json()["error"]["message"]


async def test_embed_truncates_at_either_end_or_refuses(api: httpx.AsyncClient) -> None:
    words = [f"w{n}" for n in range(300)]
    long = " ".join(words)
    answer = await api.post("/embed", json={"inputs": ["short", long]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "inputs.1")
    for direction, kept in (("right", words[:256]), ("Left", words[-256:])):
        (cut,) = (
            await api.post("/embed", json={"inputs": long, "truncate": True, "truncation_direction": direction})
        ).json()
        assert np.allclose(cut, (await embeddings(api, input=" ".join(kept)))[0], atol=1e-6)


async def test_similarity_is_the_cosine_to_each_sentence(api: httpx.AsyncClient) -> None:
    inputs = {"source_sentence": "green tea", "sentences": ["green tea", "black tea", "a train"]}
    answer = await api.post("/similarity", json={"inputs": inputs})
    source, *others = await embeddings(api, input=["green tea", *inputs["sentences"]])
    assert np.allclose(answer.json(), np.stack(others) @ source, atol=1e-5)
    assert answer.json()[0] == pytest.approx(1)
    for parameters in ({"prompt_name": "query", "truncate": True}, {"truncate": None}, None):
        assert (await api.post("/similarity", json={"inputs": inputs, "parameters": parameters})).status_code == 200


async def test_tokenize_and_decode(api: httpx.AsyncClient) -> None:
    for inputs in ("a cat a", ["a cat a"]):
        (tokens,) = (await api.post("/tokenize", json={"inputs": inputs})).json()
        assert [(token["text"], token["start"], token["stop"], token["special"]) for token in tokens] == [
            ("a", 0, 1, False),
            ("cat", 2, 5, False),
            ("a", 6, 7, False),
        ]
        assert tokens[0]["id"] == tokens[2]["id"] != tokens[1]["id"]
    assert (await api.post("/decode", json={"ids": [3, 4]})).json() == ["<3> <4>"]
    assert (await api.post("/decode", json={"ids": [[3, 4], [5]]})).json() == ["<3> <4>", "<5>"]


async def test_tokenize_splits_many_texts_in_their_order(api: httpx.AsyncClient) -> None:
    texts = [f"text{n} " + "word " * 600 for n in range(20)]  # several groups
    answer = (await api.post("/tokenize", json={"inputs": texts})).json()
    assert [tokens[0]["text"] for tokens in answer] == [f"text{n}" for n in range(20)]
    assert {len(tokens) for tokens in answer} == {601}


async def test_decode_joins_many_lists_in_their_order(api: httpx.AsyncClient) -> None:
    lists = [[n] + [7] * 2000 for n in range(30)]  # several groups
    answer = (await api.post("/decode", json={"ids": lists})).json()
    assert [text.split()[0] for text in answer] == [f"<{n}>" for n in range(30)]
    assert {len(text.split()) for text in answer} == {2001}


async def test_info_describes_the_model(api: httpx.AsyncClient) -> None:
    info = (await api.get("/info")).json()
    assert (info["model_id"], info["model_dtype"], info["max_input_length"]) == ("fake", "float32", 256)
    assert info["model_type"] == {"embedding": {"dimensions": DIM}}
    assert info["prompts"] == {"query": "query: ", "document": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/embed", {}, "inputs"),
        ("/embed", {"inputs": ""}, "inputs"),
        ("/embed", {"inputs": ["a", " "]}, "inputs.1"),
        ("/embed", {"inputs": "a", "dimensions": DIM + 1}, "dimensions"),
        ("/embed", {"inputs": "a", "truncation_direction": "up"}, "truncation_direction"),
        ("/embed", {"inputs": [[1, 1 << 30]]}, "inputs.0"),
        ("/embed", {"inputs": "poison"}, "inputs"),
        ("/embed", {"inputs": "a", "input": "b"}, "input"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, "inputs.sentences"),
        ("/similarity", {"inputs": {"source_sentence": "", "sentences": ["b"]}}, "inputs.source_sentence"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b", ""]}}, "inputs.sentences.1"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b", " "]}}, "inputs.sentences.1"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["poison"]}}, "inputs.sentences.0"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"], "more": 1}}, "inputs.more"),
        (
            "/similarity",
            {"inputs": {"source_sentence": "a", "sentences": ["b"]}, "parameters": {"prompt_name": "nope"}},
            "parameters.prompt_name",
        ),
        (
            "/similarity",
            {"inputs": {"source_sentence": "a", "sentences": ["b"]}, "parameters": {"nope": 1}},
            "parameters.nope",
        ),
        ("/tokenize", {"inputs": [1, 2]}, "inputs"),
        ("/tokenize", {"inputs": ["a", ""]}, "inputs.1"),
        ("/decode", {"ids": "text"}, "ids"),
        ("/decode", {"ids": ["text"]}, "ids"),
        ("/decode", {"ids": [1 << 30]}, "ids"),
        ("/decode", {"ids": [[1], [1 << 30]]}, "ids.1"),
    ],
)
async def test_a_wrong_field_is_named(api: httpx.AsyncClient, path: str, body: Any, param: str) -> None:
    answer = await api.post(path, json=body)
    assert answer.json()["error"]["param"] == param
    assert answer.status_code == (500 if "poison" in str(body) else 400)


async def test_a_request_with_too_large_an_answer_is_refused(
    api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tei, "MAX_UNITS", 10)
    for path, body, param in (
        ("/tokenize", {"inputs": ["12345", "123456"]}, "inputs"),
        ("/decode", {"ids": [[1] * 6, [1] * 5]}, "ids"),
    ):
        answer = await api.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (413, param)
    assert (await api.post("/tokenize", json={"inputs": "1234567890"})).status_code == 200


async def test_calls_past_the_limit_are_refused(app: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resilient, "MAX_UNBATCHED_CALLS", 0)
    for path, body in (("/tokenize", {"inputs": "tea"}), ("/decode", {"ids": [1]})):
        answer = await app.http.post(path, json=body)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
