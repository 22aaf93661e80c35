"""The routes of the model in OpenAI's form, in this process, on the fake model."""

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest

from deployments.embedding import outputs
from tests.local_app import LocalApp


async def vectors(api: httpx.AsyncClient, **body: Any) -> list[Any]:
    answer = await api.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    return [entry["embedding"] for entry in answer.json()["data"]]


async def test_null_stands_for_the_default_of_an_option(api: httpx.AsyncClient) -> None:
    """LiteLLM sends `encoding_format: null` with every call."""
    plain = await vectors(api, input=["green tea", "a train"])
    nulls = dict.fromkeys(["model", "encoding_format", "dimensions", "user", "input_type", "truncate", "output_dtype"])
    assert await vectors(api, input=["green tea", "a train"], **nulls) == plain
    assert [type(value) for value in plain[0][:2]] == [float, float]


async def test_nul_is_embedded_but_not_stored(app: LocalApp) -> None:
    api = app.http
    texts = ["\0", "green\0tea"]
    nul, tea = await vectors(api, input=texts)
    assert app.model.texts == texts
    assert (await api.post("/embed", json={"inputs": texts})).json() == [nul, tea]
    compared = {"source_sentence": "\0", "sentences": ["\0"]}
    assert (await api.post("/similarity", json={"inputs": compared})).json() == [pytest.approx(1)]
    ((token,),) = (await api.post("/tokenize", json={"inputs": "\0"})).json()
    assert (token["text"], token["start"], token["stop"]) == ("\0", 0, 1)
    found = await api.post("/v1/users/ann/memories/search", json={"query": "green\0tea"})
    assert (found.status_code, found.json()["results"]) == (200, [])
    for body, param in (({"text": "green\0tea"}, "text"), ({"text": "a", "metadata": {"k": "\0"}}, "metadata")):
        refused = await api.post("/v1/users/ann/memories", json=body)
        assert (refused.status_code, refused.json()["error"]["message"]) == (400, f"{param}: must not contain NUL")


async def test_the_model_decides_about_white_space(api: httpx.AsyncClient) -> None:
    """The fake model has no special tokens, so that white space has no tokens; see tests/embedding/local for others."""
    for given, param in ((" \n", "input"), (["a", "\t"], "input.1")):
        answer = await api.post("/v1/embeddings", json={"input": given})
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, f"{param}: holds nothing to embed")
    assert (await api.post("/tokenize", json={"inputs": [" ", "a"]})).json()[0] == []
    for given, param in (("", "input"), ([], "input"), (["a", ""], "input.1")):
        error = (await api.post("/v1/embeddings", json={"input": given})).json()["error"]
        assert (error["message"], error["code"]) == (f"{param}: must not be empty", "empty_input")


@pytest.mark.parametrize(
    ("served", "accepted", "refused"),
    [
        (
            "all-MiniLM-L6-v2",
            ["all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"],
            ["other/all-MiniLM-L6-v2", "all-minilm-l6-v2", ""],
        ),
        (
            "sentence-transformers/all-MiniLM-L6-v2",
            ["sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"],
            ["sentence-transformers/sentence-transformers/all-MiniLM-L6-v2", "other/all-MiniLM-L6-v2"],
        ),
        ("BAAI/bge-small-en-v1.5", ["bge-small-en-v1.5"], ["sentence-transformers/bge-small-en-v1.5", "BAAI"]),
        ("/models/minilm/", ["minilm", "/models/minilm/"], ["", "models"]),
    ],
)
async def test_a_hub_name_of_the_served_model_is_the_model(
    app: LocalApp, served: str, accepted: list[str], refused: list[str]
) -> None:
    app.model.model.info = replace(app.model.model.info, name=served)
    for name in accepted:
        answer = await app.http.post("/v1/embeddings", json={"input": "tea", "model": name})
        assert (answer.status_code, answer.json()["model"]) == (200, served)
        for segment in (name, quote(name, safe="")):
            found = await app.http.get(f"/v1/models/{segment}")
            assert (found.status_code, found.json()["id"]) == (200, served)
    for name in refused:
        error = (await app.http.post("/v1/embeddings", json={"input": "tea", "model": name})).json()["error"]
        assert (error["param"], error["code"]) == ("model", "model_not_found")


OWN_IDS, FOREIGN_IDS = [101, 5, 6, 102], [101, 5, 6]  # [CLS] ... [SEP], and no [SEP]
ROUTES = (("/v1/embeddings", "input"), ("/embed", "inputs"), ("/", "inputs"))


def with_special_tokens(app: LocalApp) -> None:
    app.model.model.info = replace(app.model.model.info, first_ids=(101,), last_ids=(102,))


async def test_token_ids_of_another_tokenizer_are_refused(app: LocalApp) -> None:
    with_special_tokens(app)
    expected = app.model.model._vector(OWN_IDS).tolist()
    for route, field in ROUTES:
        for given in (OWN_IDS, [OWN_IDS]):
            answer = await app.http.post(route, json={field: given})
            assert answer.status_code == 200
            content = answer.json()["data"][0]["embedding"] if field == "input" else answer.json()[0]
            assert content == pytest.approx(expected, abs=1e-7)
        for given, path in ((FOREIGN_IDS, field), ([OWN_IDS, FOREIGN_IDS], f"{field}.1")):
            refused = await app.http.post(route, json={field: given})
            message = (
                f"{path}: must begin with 101 and end with 102, as the ids of this model's tokenizer do: ids of "
                "another tokenizer would give a wrong vector; send the text itself "
                "(in langchain-openai: check_embedding_ctx_length=False)"
            )
            error = refused.json() if field == "inputs" else refused.json()["error"]
            assert refused.status_code == 400
            assert (error["error" if field == "inputs" else "message"], error["param"]) == (message, path)
            assert error["code"] == "foreign_token_ids"
    assert FOREIGN_IDS not in app.model.texts


async def test_token_ids_are_checked_before_they_are_cut(app: LocalApp) -> None:
    with_special_tokens(app)
    whole = [101, *range(1_000, 2_000), 102]
    (vector,) = await vectors(app.http, input=whole)
    assert vector == pytest.approx(app.model.model._vector([*whole[:255], 102]).tolist(), abs=1e-7)
    (vector,) = await vectors(app.http, input=whole, truncate="start")
    assert vector == pytest.approx(app.model.model._vector([101, *whole[-255:]]).tolist(), abs=1e-7)
    for truncate in ("end", "start", "none"):
        for given in (whole[:256], whole[-256:]):
            answer = await app.http.post("/v1/embeddings", json={"input": given, "truncate": truncate})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "foreign_token_ids")


async def test_a_model_without_special_tokens_takes_all_ids(app: LocalApp) -> None:
    (vector,) = await vectors(app.http, input=FOREIGN_IDS)
    assert vector == pytest.approx(app.model.model._vector(FOREIGN_IDS).tolist(), abs=1e-7)


async def test_token_ids_may_all_be_accepted_or_refused(tmp_path: Path) -> None:
    for accepted, status in (("any", 200), ("refuse", 400)):
        app = await LocalApp.start(tmp_path, model={"token_ids": accepted})
        with_special_tokens(app)
        for route, field in ROUTES:
            for ids in (OWN_IDS, FOREIGN_IDS):
                assert (await app.http.post(route, json={field: ids})).status_code == status
            assert (await app.http.post(route, json={field: "a text"})).status_code == 200
        decoded = await app.http.post("/decode", json={"ids": FOREIGN_IDS})
        assert decoded.json() == ["<101> <5> <6>"]
        await app.stop()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "binary", "ubinary"])
async def test_small_types_are_numbers_and_never_base64(app: LocalApp, dtype: outputs.OutputDtype) -> None:
    """OpenAI's client asks for base64 unless `encoding_format` is given, and would read float32 from the bytes."""
    (whole,) = await vectors(app.http, input="green tea")
    expected = outputs.quantise(np.array([whole], np.float32), dtype)[0].tolist()
    for more in ({}, {"encoding_format": "float"}, {"encoding_format": None}):
        assert await vectors(app.http, input="green tea", output_dtype=dtype, **more) == [expected]
    body = {"input": "a train", "output_dtype": dtype, "encoding_format": "base64"}
    reason = f'must be "float" if output_dtype is {dtype!r}: clients read float32 from base64'
    refused = await app.http.post("/v1/embeddings", json=body)
    assert (refused.status_code, refused.json()["error"]) == (
        400,
        {
            "message": f"encoding_format: {reason}",
            "type": "invalid_request_error",
            "param": "encoding_format",
            "code": "base64_is_float32",
        },
    )
    assert app.model.texts == ["green tea"]


async def test_base64_is_of_float32(api: httpx.AsyncClient) -> None:
    (numbers,) = await vectors(api, input="green tea")
    for more in ({}, {"output_dtype": "float"}, {"output_dtype": None}):
        (coded,) = await vectors(api, input="green tea", encoding_format="base64", **more)
        assert np.frombuffer(base64.b64decode(coded), "<f4").tolist() == np.array(numbers, np.float32).tolist()
