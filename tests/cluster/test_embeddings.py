"""/v1/embeddings and /v1/models over HTTP, against sentence-transformers itself."""

import base64
from typing import Any

import httpx
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from deployments.embedding.load import DEFAULT_MODEL, resolve

TEXTS = [
    "A short text.",
    "Dynamic batching follows the device. " * 12,
    "kurz",
    "猫が好きです",
    "emoji 🦊 and accents é",
]


@pytest.fixture(scope="module")
def reference() -> SentenceTransformer:
    return SentenceTransformer(resolve(DEFAULT_MODEL), device="cpu", local_files_only=True)


def vectors_of(answer: dict[str, Any]) -> np.ndarray:
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    return np.array([entry["embedding"] for entry in answer["data"]], np.float32)


def test_embeddings_equal_encode(http: httpx.Client, reference: SentenceTransformer) -> None:
    answer = http.post("/v1/embeddings", json={"input": TEXTS, "model": DEFAULT_MODEL})
    assert answer.status_code == 200
    content = answer.json()
    assert content["object"] == "list"
    assert content["model"] == DEFAULT_MODEL
    assert np.abs(vectors_of(content) - reference.encode(TEXTS)).max() <= 1e-5
    tokens = sum(len(ids) for ids in reference.tokenizer(TEXTS)["input_ids"])
    assert content["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "truncated_inputs": 0}
    for header in ("x-queue-time", "x-tokenization-time", "x-inference-time", "x-total-time"):
        assert float(answer.headers[header]) >= 0


def test_base64_carries_the_same_bits(http: httpx.Client) -> None:
    floats = vectors_of(http.post("/v1/embeddings", json={"input": TEXTS}).json())
    coded = http.post("/v1/embeddings", json={"input": TEXTS, "encoding_format": "base64"}).json()
    decoded = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in coded["data"]]
    assert np.array_equal(np.stack(decoded), floats)


def test_a_string_is_embedded_like_a_list_of_one(http: httpx.Client) -> None:
    single = vectors_of(http.post("/v1/embeddings", json={"input": "one text"}).json())
    assert single.shape == (1, 384)
    assert np.array_equal(single, vectors_of(http.post("/v1/embeddings", json={"input": ["one text"]}).json()))


def test_token_ids_are_used_verbatim(http: httpx.Client, reference: SentenceTransformer) -> None:
    ids = reference.tokenizer("the same text")["input_ids"]
    by_ids = http.post("/v1/embeddings", json={"input": ids}).json()
    by_text = http.post("/v1/embeddings", json={"input": "the same text"}).json()
    assert by_ids["usage"] == by_text["usage"]
    assert np.abs(vectors_of(by_ids) - vectors_of(by_text)).max() <= 2e-6


def test_dimensions_cut_and_renormalise(http: httpx.Client) -> None:
    full = vectors_of(http.post("/v1/embeddings", json={"input": TEXTS}).json())
    cut = vectors_of(http.post("/v1/embeddings", json={"input": TEXTS, "dimensions": 64}).json())
    expected = full[:, :64] / np.linalg.norm(full[:, :64], axis=1, keepdims=True)
    assert np.abs(cut - expected).max() <= 1e-6


def test_smaller_output_types(http: httpx.Client) -> None:
    full = vectors_of(http.post("/v1/embeddings", json={"input": TEXTS}).json())
    units = full / np.linalg.norm(full, axis=1, keepdims=True)  # in half precision their length is not exactly 1
    for output_dtype, expected in (
        ("int8", np.rint(units * 127).astype(np.int8)),
        ("ubinary", np.packbits(full > 0, axis=1)),
    ):
        answer = http.post("/v1/embeddings", json={"input": TEXTS, "output_dtype": output_dtype}).json()
        assert np.array_equal([entry["embedding"] for entry in answer["data"]], expected)


def test_truncation_is_counted_and_can_be_refused(http: httpx.Client) -> None:
    long = "word " * 400
    content = http.post("/v1/embeddings", json={"input": ["short", long]}).json()
    assert content["usage"]["truncated_inputs"] == 1
    refused = http.post("/v1/embeddings", json={"input": ["short", long], "truncate": "none"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "input.1"
    assert "402 tokens" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["fine", ""]}, "input.1"),
        ({"input": ["fine", 7]}, "input.1"),
        ({"input": [[1, 2], []]}, "input.1"),
        ({"input": [101, 999_999]}, "input"),
        ({"input": [[101, 102], [101, 999_999, 102]]}, "input.1"),
        ({"input": [[101, 102], [7, 8]]}, "input.1"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x", "dimensions": 385}, "dimensions"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "colour": "red"}, "colour"),
        ({}, "input"),
    ],
)
def test_bad_input_names_the_field(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/embeddings", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"]


def test_an_unknown_model_is_404(http: httpx.Client) -> None:
    answer = http.post("/v1/embeddings", json={"input": "x", "model": "text-embedding-3-small"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_models(http: httpx.Client) -> None:
    (card,) = http.get("/v1/models").json()["data"]
    assert (card["id"], card["dimensions"], card["max_tokens"]) == (DEFAULT_MODEL, 384, 256)
    assert http.get(f"/v1/models/{DEFAULT_MODEL}").json() == card
    assert http.get("/v1/models/other").status_code == 404


def test_the_routes_of_tei_equal_sentence_transformers(http: httpx.Client, reference: SentenceTransformer) -> None:
    vectors = reference.encode(TEXTS)
    answer = http.post("/embed", json={"inputs": TEXTS})
    assert np.abs(np.array(answer.json()) - vectors).max() <= 1e-5
    answer = http.post("/similarity", json={"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}})
    assert np.abs(np.array(answer.json()) - vectors[1:] @ vectors[0]).max() <= 1e-5
    tokens = http.post("/tokenize", json={"inputs": TEXTS}).json()
    assert [[token["id"] for token in text] for text in tokens] == reference.tokenizer(TEXTS)["input_ids"]
    assert "".join(TEXTS[0][token["start"] : token["stop"]] for token in tokens[0][1:-1]) == "Ashorttext."
    assert http.post("/decode", json={"ids": [token["id"] for token in tokens[0]]}).json() == ["a short text."]
    assert http.get("/info").json()["model_id"] == DEFAULT_MODEL
