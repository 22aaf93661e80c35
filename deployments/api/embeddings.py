"""The routes of the model in OpenAI's form: embeddings and models."""

import time
from typing import Any

from fastapi import Request, Response

from deployments.api import answers
from deployments.api.http import (
    Routes,
    decode_id,
    json_response,
    json_rows,
    parse_body,
    principal_of,
    read_body,
    timing_headers,
)
from deployments.api.openapi import TIMES, fails, takes
from deployments.embedding import outputs
from deployments.errors import ModelNotFound
from deployments.requests import bodies
from deployments.service import Memserve

BODIES = (bodies.EmbeddingsBody,)

routes = Routes("embeddings")
_OTHER_MODEL = "this model is not served here (`model_not_found`)"
_started_at = int(time.time())


@routes.add(
    "POST",
    "/v1/embeddings",
    "read",
    response_model=answers.EmbeddingsAnswer,
    responses={200: TIMES, **fails({404: _OTHER_MODEL})},
    openapi_extra=takes(body=bodies.EmbeddingsBody),
)
async def post_embeddings(memserve: Memserve, request: Request) -> Response:
    """Embed texts or token ids (OpenAI's route)."""
    started = time.perf_counter()
    body = await parse_body(bodies.EmbeddingsBody, await read_body(request, memserve.max_body_bytes))
    info = await memserve.model_info()
    if body.model is not None:
        check_served(body.model, info.name)
    result = await memserve.embed_body(principal_of(request), body)
    vectors = outputs.quantise(outputs.cut(result.vectors, body.dimensions), body.output_dtype)
    rows = outputs.to_base64(vectors) if body.encoding_format == "base64" else await json_rows(vectors)
    tokens = int(result.tokens.sum())
    content = {
        "object": "list",
        "model": info.name,
        "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "truncated_inputs": int(result.truncated.sum()),
        },
    }
    return json_response(content, headers=timing_headers(result.timings, started))


@routes.add("GET", "/v1/models", "read", response_model=answers.ModelsAnswer)
async def get_models(memserve: Memserve, _: Request) -> Response:
    """List the one model that is served."""
    return json_response({"object": "list", "data": [await _card(memserve)]})


@routes.add(
    "GET",
    "/v1/models/{model_id:path}",
    "read",
    response_model=answers.ModelAnswer,
    responses=fails({404: _OTHER_MODEL}),
)
async def get_model(memserve: Memserve, request: Request) -> Response:
    """Describe the model that is served."""
    card = await _card(memserve)
    check_served(decode_id(request.path_params["model_id"], "model"), card["id"])
    return json_response(card)


async def _card(memserve: Memserve) -> dict[str, Any]:
    info = await memserve.model_info()
    return {
        "id": info.name,
        "object": "model",
        "created": _started_at,
        "owned_by": "memserve",
        "dimensions": info.dim,
        "max_tokens": info.max_tokens,
    }


def check_served(name: str, served: str, usual: str = "sentence-transformers") -> None:
    """Refuse the name of another model.

    A model has two names: with its organisation on the hub, and without. If it was configured without one, it is
    looked up among the models of the `usual` organisation, as sentence-transformers does.
    """
    organisation, _, bare = served.rstrip("/").rpartition("/")
    if name not in (served, bare if organisation else f"{usual}/{served}"):
        raise ModelNotFound(f"{name!r} is not served here; the served model is {served!r}", "model", "model_not_found")
