"""The OpenAPI document has an example of each operation, and the server answers it so."""

from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
from jsonschema import Draft202012Validator

from deployments.api.build import build_api
from deployments.api.examples import EXAMPLES
from tests.documented import Document
from tests.local_app import LocalApp

Schema = dict[str, Any]


@pytest.fixture
async def document(api: httpx.AsyncClient) -> Schema:
    found: Schema = (await api.get("/openapi.json")).json()
    return found


def contents_of(document: Schema) -> Iterator[tuple[str, Schema]]:
    """(what it is, media type object) of each body and answer of the document."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            name = f"{method.upper()} {path}"
            if "requestBody" in operation:
                for content in operation["requestBody"]["content"].values():
                    yield f"{name}: body", content
            for status, answer in operation["responses"].items():
                *_, last = [None, *answer.get("content", {}).values()]
                if last is not None:
                    yield f"{name}: {status}", last
    for name, answer in document["components"]["responses"].items():
        yield name, answer["content"]["application/json"]


async def test_every_body_and_every_answer_has_an_example_that_is_as_described(document: Schema) -> None:
    without = []
    for name, content in contents_of(document):
        if "example" not in content:
            without.append(name)
        else:
            validator = Draft202012Validator({**content["schema"], "components": document["components"]})
            assert list(validator.iter_errors(content["example"])) == [], name
    assert without == []  # add it to deployments/api/examples.py
    operations = {f"{method.upper()} {path}" for path, of in document["paths"].items() for method in of}
    assert set(EXAMPLES) == operations


async def test_errors_are_described_one_by_one_with_their_headers(document: Schema) -> None:
    responses = document["components"]["responses"]
    for shape in ("ErrorAnswer", "TeiErrorAnswer"):
        assert set(responses[f"{shape}503"]["headers"]) == set(responses[f"{shape}429"]["headers"]) == {"Retry-After"}
        assert set(responses[f"{shape}401"]["headers"]) == {"WWW-Authenticate"}
    for operations in document["paths"].values():
        for operation in operations.values():
            assert all(status.isdecimal() for status in operation["responses"])


async def test_keys_are_described_and_health_needs_none(document: Schema) -> None:
    schemes = document["components"]["securitySchemes"]
    assert (schemes["bearer"]["type"], schemes["bearer"]["scheme"]) == ("http", "bearer")
    assert (schemes["apiKey"]["in"], schemes["apiKey"]["name"]) == ("header", "X-API-Key")
    assert document["security"] == [{"bearer": []}, {"apiKey": []}, {}]
    without = {path for path, of in document["paths"].items() for one in of.values() if one.get("security") == []}
    assert without == {"/health", "/health/live", "/health/ready", "/ping"}


async def test_the_document_of_a_server_that_asks_for_keys_says_so(app: LocalApp) -> None:
    document = build_api(app.gateway, app.errors.append, find_key=app.gateway.find_key).openapi()
    assert document["security"] == [{"bearer": []}, {"apiKey": []}]
    add = document["paths"]["/v1/users/{user_id}/memories"]["post"]
    assert add["security"] == [{"bearer": ["write"]}, {"apiKey": ["write"]}]
    assert document["paths"]["/health"]["get"]["security"] == []


async def test_the_examples_are_answered_as_they_say(app: LocalApp, document: Schema) -> None:
    described = Document(document)
    key_id = ""
    for name, example in EXAMPLES.items():
        method, path = name.split(" ")
        model = (await app.http.get("/v1/models")).json()["data"][0]["id"]
        path = path.format(user_id="anna", memory_id="tea", model_id=model, key_id=key_id)
        body = example.body
        if isinstance(body, dict) and body.get("model"):
            body = {**body, "model": model}
        content = None if body is None else body.encode() if isinstance(body, str) else orjson.dumps(body)
        answer = await app.http.request(method, path, content=content)
        assert answer.is_success, (name, answer.text)
        described.check(answer.request, answer)
        key_id = answer.json()["id"] if name == "POST /v1/keys" else key_id
        if isinstance(example.answer, dict):
            assert set(answer.json()) == set(example.answer), name
        elif example.answer is None:
            assert answer.content == b""
