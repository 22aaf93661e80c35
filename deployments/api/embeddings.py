"""The routes of the model: texts to vectors, in OpenAI's form."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response

from deployments.api import answers
from deployments.api.http import decode_id, json_response, read_body, timing_headers
from deployments.api.openapi import TIMES, takes
from deployments.embedding import outputs
from deployments.errors import ModelNotFound
from deployments.requests import bodies

if TYPE_CHECKING:
    from deployments.embedding.model import ModelInfo
    from deployments.gateway import Gateway

BODIES = (bodies.EmbeddingsBody,)


def add_embeddings(api: FastAPI, gateway: Gateway) -> None:
    """Add the routes under /v1/embeddings and /v1/models."""
    started_at = int(time.time())

    def card(info: ModelInfo) -> dict[str, Any]:
        return {
            "id": info.name,
            "object": "model",
            "created": started_at,
            "owned_by": "memserve",
            "dimensions": info.dim,
            "max_tokens": info.max_tokens,
        }

    @api.post(
        "/v1/embeddings",
        response_model=answers.EmbeddingsAnswer,
        responses={200: TIMES},
        openapi_extra=takes(body=bodies.EmbeddingsBody),
        tags=["embeddings"],
    )
    async def post_embeddings(request: Request) -> Response:
        """Embed texts or token ids (OpenAI's route)."""
        started = time.perf_counter()
        body = bodies.parse(bodies.EmbeddingsBody, await read_body(request, gateway.max_body_bytes))
        info = await gateway.model_info()
        if body.model is not None:
            _check_served(body.model, info)
        result = await gateway.vectors.of_inputs(
            body, (lambda _: "input") if bodies.is_single(body.input) else (lambda n: f"input.{n}")
        )
        vectors = outputs.quantise(outputs.cut(result.vectors, body.dimensions), body.output_dtype)
        rows = outputs.to_base64(vectors) if body.encoding_format == "base64" else vectors
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

    @api.get("/v1/models", response_model=answers.ModelsAnswer, tags=["embeddings"])
    async def get_models() -> Response:
        """The model that is served, as a list of one."""
        return json_response({"object": "list", "data": [card(await gateway.model_info())]})

    @api.get("/v1/models/{model_id:path}", response_model=answers.ModelAnswer, tags=["embeddings"])
    async def get_model(model_id: str) -> Response:
        """One model."""
        info = await gateway.model_info()
        _check_served(decode_id(model_id, "model"), info)
        return json_response(card(info))


def _check_served(name: str, info: ModelInfo) -> None:
    if name != info.name:
        raise ModelNotFound(f"{name!r} is not served here; {info.name!r} is", "model", "model_not_found")
