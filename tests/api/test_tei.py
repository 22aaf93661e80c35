"""The routes of text-embeddings-inference, in this process, on the fake model."""

from typing import Any

import httpx
import numpy as np
import pytest

from deployments.api import tei
from deployments.calls import resilient
from deployments.errors import Unavailable
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
    assert answer.json()["param"] == "prompt_name"
    assert "'query'" in answer.json()["error"]


async def test_embed_truncates_at_either_end_or_refuses(api: httpx.AsyncClient) -> None:
    words = [f"w{n}" for n in range(300)]
    long = " ".join(words)
    answer = await api.post("/embed", json={"inputs": ["short", long]})
    assert (answer.status_code, answer.json()["param"]) == (400, "inputs.1")
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
    special = (1 << 20) - 1
    for skip, text in ((True, "<3>"), (None, "<3>"), (False, f"<{special}> <3>")):
        assert (await api.post("/decode", json={"ids": [special, 3], "skip_special_tokens": skip})).json() == [text]


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
        ("/embed", {"input": "b"}, "inputs"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, "inputs.sentences"),
        ("/similarity", {"inputs": {"source_sentence": "", "sentences": ["b"]}}, "inputs.source_sentence"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b", ""]}}, "inputs.sentences.1"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b", " "]}}, "inputs.sentences.1"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["poison"]}}, "inputs.sentences.0"),
        ("/similarity", {"inputs": {"source_sentence": "a", "more": 1}}, "inputs.sentences"),
        (
            "/similarity",
            {"inputs": {"source_sentence": "a", "sentences": ["b"]}, "parameters": {"prompt_name": "nope"}},
            "parameters.prompt_name",
        ),
        (
            "/similarity",
            {"inputs": {"source_sentence": "a", "sentences": ["b"]}, "parameters": {"truncate": 1}},
            "parameters.truncate",
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
    assert answer.json()["param"] == param
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
        assert (answer.status_code, answer.json()["param"]) == (413, param)
    assert (await api.post("/tokenize", json={"inputs": "1234567890"})).status_code == 200


async def test_calls_past_the_limit_are_refused(app: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resilient, "MAX_UNBATCHED_CALLS", 1)
    shares = app.gateway._embedder._unbatched._urgent
    for caller in "ab":
        shares.add(caller, 1)  # as many as there may be, whoever asks
    for path, body in (("/tokenize", {"inputs": "tea"}), ("/decode", {"ids": [1]})):
        answer = await app.http.post(path, json=body)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error_type"] == "Overloaded"


async def test_the_root_is_embed(api: httpx.AsyncClient) -> None:
    """huggingface_hub sends the inputs of `feature_extraction` to the URL that it was given."""
    body = {"inputs": ["green tea", "a train"], "dimensions": 8}
    assert (await api.post("/", json=body)).json() == (await api.post("/embed", json=body)).json()
    refused = await api.post("/", json={"inputs": ["a", ""]})
    assert (refused.status_code, refused.json()["param"]) == (400, "inputs.1")
    assert (await api.get("/")).headers["allow"] == "POST"


async def test_the_root_is_similarity_if_the_inputs_are_sentences(api: httpx.AsyncClient) -> None:
    """huggingface_hub sends the sentences of `sentence_similarity` to the URL that it was given."""
    inputs: dict[str, Any] = {"source_sentence": "green tea", "sentences": ["black tea", "a train"]}
    plain = await api.post("/similarity", json={"inputs": inputs})
    for more in ({}, {"parameters": {}}, {"parameters": None}):
        answer = await api.post("/", json={"inputs": inputs, **more})
        assert (answer.status_code, answer.content) == (200, plain.content)
    body = {"inputs": inputs, "parameters": {"prompt_name": "query"}}
    assert (await api.post("/", json=body)).content == (await api.post("/similarity", json=body)).content
    for wrong, parameters, param in (
        ({**inputs, "source_sentence": ""}, {}, "inputs.source_sentence"),
        ({**inputs, "sentences": ["b", " "]}, {}, "inputs.sentences.1"),
        ({"source_sentence": "a"}, {}, "inputs.sentences"),
        ({}, {}, "inputs.source_sentence"),
        (inputs, {"prompt_name": "nope"}, "parameters.prompt_name"),
        (5, {}, "inputs"),
    ):
        refused = await api.post("/", json={"inputs": wrong, "parameters": parameters})
        assert (refused.status_code, refused.json()["param"]) == (400, param)


async def test_options_may_be_in_parameters(api: httpx.AsyncClient) -> None:
    """huggingface_hub 0.28 to 0.31 puts the options of `feature_extraction` there."""
    long = " ".join(f"w{n}" for n in range(300))
    options: dict[str, Any] = {"truncate": True, "truncation_direction": "Left", "prompt_name": "query"}
    options["normalize"] = False
    for path in ("/", "/embed"):
        beside = await api.post(path, json={"inputs": [long], "dimensions": 8, **options})
        within = await api.post(path, json={"inputs": [long], "dimensions": 8, "parameters": options})
        assert (within.status_code, within.content) == (200, beside.content)
        for more in ({"truncate": True}, {"truncate": None}):  # an option that is null is left out
            both = {**more, "prompt_name": "document", "parameters": options}
            answer = await api.post(path, json={"inputs": [long], "dimensions": 8, **both})
            expected = {**options, "prompt_name": "document"}
            plain = await api.post(path, json={"inputs": [long], "dimensions": 8, **expected})
            assert (answer.status_code, answer.content) == (200, plain.content)
        refused = await api.post(path, json={"inputs": "tea", "parameters": {"prompt_name": "nope"}})
        assert (refused.status_code, refused.json()["param"]) == (400, "parameters.prompt_name")
        refused = await api.post(path, json={"inputs": "tea", "parameters": {"normalize": 2}})
        assert (refused.status_code, refused.json()["param"]) == (400, "parameters.normalize")
        both = {"inputs": "tea", "prompt_name": "nope", "parameters": {"prompt_name": "query"}}
        assert (await api.post(path, json=both)).json()["param"] == "prompt_name"


async def test_ping_is_readiness(app: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = {"status": "ready", "model": "fake", "device": "cpu", "dtype": "float32"}
    answer = await app.http.get("/ping")
    assert (answer.status_code, answer.json()) == (200, ready)

    async def not_ready() -> Any:
        raise Unavailable("Not ready. store: it is away", None, "not_ready")

    monkeypatch.setattr(app.gateway, "check_ready", not_ready)
    answer = await app.http.get("/ping")
    assert (answer.status_code, answer.json()) == (
        503,
        {"error": "Not ready. store: it is away", "error_type": "Unhealthy", "param": None, "code": "not_ready"},
    )


async def test_unknown_fields_are_ignored_and_only_here(api: httpx.AsyncClient) -> None:
    """huggingface_hub 0.28 to 0.31 sends `parameters` and `options` beside the inputs."""
    unknown: dict[str, Any] = {"parameters": {"normalize": True, "wait": 1}, "options": {"use_cache": True}, "x": None}
    sentences = {"source_sentence": "green tea", "sentences": ["black tea"]}
    for path, body in (
        ("/", {"inputs": "tea"}),
        ("/embed", {"inputs": ["tea"]}),
        ("/similarity", {"inputs": sentences}),
        ("/tokenize", {"inputs": "tea"}),
        ("/decode", {"ids": [3]}),
    ):
        plain = await api.post(path, json=body)
        with_unknown = await api.post(path, json={**unknown, **body})
        assert (with_unknown.status_code, with_unknown.content) == (200, plain.content)
    plain = await api.post("/similarity", json={"inputs": sentences})
    nested = {"inputs": {**sentences, "more": 1}, "parameters": {"wait": True}}
    assert (await api.post("/similarity", json=nested)).content == plain.content
    refused = await api.post("/v1/embeddings", json={"input": "tea", "options": {}})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unknown_field")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "expected"),
    [
        (
            "POST",
            "/embed",
            {"inputs": ["a", ""]},
            400,
            {"error": "inputs.1: must not be empty", "error_type": "Validation", "param": "inputs.1"}
            | {"code": "empty_input"},
        ),
        (
            "POST",
            "/",
            {"inputs": "a", "prompt_name": "nope"},
            400,
            {"error": "prompt_name: is 'nope'; the model's prompts are 'document', 'query'", "error_type": "Validation"}
            | {"param": "prompt_name", "code": None},
        ),
        (
            "POST",
            "/embed",
            {"inputs": "notanumber"},
            500,
            {"error": "inputs: the model made a vector that is not finite", "error_type": "Backend", "param": "inputs"}
            | {"code": None},
        ),
        (
            "GET",
            "/embed",
            None,
            405,
            {"error": "Method Not Allowed.", "error_type": "Validation", "param": None, "code": None},
        ),
    ],
)
async def test_errors_have_the_shape_that_huggingface_hub_reads(
    api: httpx.AsyncClient, method: str, path: str, *, body: Any, status: int, expected: dict[str, Any]
) -> None:
    """huggingface_hub 0.26 strips the value of `error`, and fails if that is not a string."""
    answer = await api.request(method, path, json=body)
    assert (answer.status_code, answer.json()) == (status, expected)


async def test_an_unexpected_error_has_that_shape_too(app: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a secret of the house")

    monkeypatch.setattr(app.gateway, "embed_prompted", broken)
    answer = await app.http.post("/embed", json={"inputs": "tea"})
    assert (answer.status_code, answer.json()) == (
        500,
        {
            "error": "The server failed on this request.",
            "error_type": "Backend",
            "param": None,
            "code": "internal_error",
        },
    )
