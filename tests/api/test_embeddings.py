"""The routes of the model in OpenAI's form, in this process, on the fake model."""

from typing import Any

import httpx


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
