"""The HTTP routes: parse, one call into the gateway, shape the answer. Knows no Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response

from deployments import schemas
from deployments.embedding import outputs
from deployments.errors import NotFound
from deployments.http import api_skeleton, body_of, decode_id, document_bodies, json_response, read_body

if TYPE_CHECKING:
    from deployments.embedding.engine import Timings
    from deployments.embedding.model import ModelInfo
    from deployments.gateway import Gateway

BODIES = (schemas.EmbeddingsRequest, schemas.AddRequest, schemas.AddManyRequest, schemas.SearchRequest)


def build_api(gateway: Gateway, on_error: Callable[[Exception], None]) -> FastAPI:
    """The ASGI application of one gateway replica; `on_error` is told of every request that fails."""
    api = api_skeleton(on_error)
    _add_embeddings(api, gateway)
    _add_memories(api, gateway)
    _add_operations(api, gateway)
    document_bodies(api, BODIES)
    return api


def _add_embeddings(api: FastAPI, gateway: Gateway) -> None:
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

    @api.post("/v1/embeddings", openapi_extra=body_of(schemas.EmbeddingsRequest), tags=["embeddings"])
    async def post_embeddings(request: Request) -> Response:
        """Embed texts or token ids (OpenAI's route)."""
        started = time.perf_counter()
        body = schemas.parse(schemas.EmbeddingsRequest, await read_body(request, gateway.max_body_bytes))
        info = await gateway.model_info()
        if body.model is not None:
            _check_served(body.model, info)
        result = await gateway.embed_inputs(body, (lambda _: "input") if body.is_lone() else (lambda n: f"input.{n}"))
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
        return json_response(content, headers=_timing_headers(result.timings, started))

    @api.get("/v1/models", tags=["embeddings"])
    async def get_models() -> Response:
        """The model that is served, as a list of one."""
        return json_response({"object": "list", "data": [card(await gateway.model_info())]})

    @api.get("/v1/models/{model_id:path}", tags=["embeddings"])
    async def get_model(model_id: str) -> Response:
        """One model."""
        info = await gateway.model_info()
        _check_served(decode_id(model_id, "model"), info)
        return json_response(card(info))


def _add_memories(api: FastAPI, gateway: Gateway) -> None:
    @api.post(
        "/v1/users/{user_id}/memories", status_code=201, openapi_extra=body_of(schemas.AddRequest), tags=["memories"]
    )
    async def post_user_memories(user_id: str, request: Request) -> Response:
        """Remember one text or many for a user. Answers when they are committed."""
        user = decode_id(user_id, "user_id")
        body = schemas.parse(schemas.AddRequest, await read_body(request, gateway.max_body_bytes))
        lone = body.memories is None
        (result,) = await gateway.append([(user, body.items())], body, lambda n: "" if lone else f"memories.{n}")
        content = {"memories": [schemas.appended(entry) for entry in result.memories], "version": result.version}
        return json_response(content, 201)

    @api.post("/v1/memories", status_code=201, openapi_extra=body_of(schemas.AddManyRequest), tags=["memories"])
    async def post_memories(request: Request) -> Response:
        """Remember texts of many users in one call. Answers when they are committed."""
        body = schemas.parse(schemas.AddManyRequest, await read_body(request, gateway.max_body_bytes))
        positions: dict[str, list[int]] = {}
        for position, item in enumerate(body.memories):
            positions.setdefault(item.user_id, []).append(position)
        groups = [(user_id, [body.memories[n] for n in taken]) for user_id, taken in positions.items()]
        order = [position for taken in positions.values() for position in taken]
        results = await gateway.append(groups, body, lambda n: f"memories.{order[n]}")
        answers: dict[int, dict[str, Any]] = {}
        for (user_id, taken), result in zip(positions.items(), results, strict=True):
            for position, entry in zip(taken, result.memories, strict=True):
                answers[position] = {"user_id": user_id, **schemas.appended(entry)}
        return json_response({"memories": [answers[n] for n in range(len(answers))]}, 201)

    @api.post("/v1/users/{user_id}/memories/search", openapi_extra=body_of(schemas.SearchRequest), tags=["memories"])
    async def post_search(user_id: str, request: Request) -> Response:
        """Find a user's memories by meaning. Sees every write that was acknowledged before."""
        user = decode_id(user_id, "user_id")
        body = schemas.parse(schemas.SearchRequest, await read_body(request, gateway.max_body_bytes))
        found = await gateway.find(user, body)
        results = [schemas.memory(memory) for memory in found.results]
        return json_response({"results": results, "index": found.index, "version": found.version})

    @api.delete("/v1/users/{user_id}/memories/{memory_id}", status_code=204, tags=["memories"])
    async def delete_memory(user_id: str, memory_id: str) -> Response:
        """Forget one memory."""
        await gateway.forget(decode_id(user_id, "user_id"), decode_id(memory_id, "memory_id"))
        return Response(status_code=204)


def _add_operations(api: FastAPI, gateway: Gateway) -> None:
    @api.get("/health/live", tags=["operations"])
    async def get_live() -> Response:
        """200 while the process runs."""
        return json_response({"status": "live"})

    @api.get("/health/ready", tags=["operations"])
    @api.get("/health", tags=["operations"])
    async def get_ready() -> Response:
        """200 when a text can be embedded and the log be read, else 503 with what is missing."""
        await gateway.check_ready()
        info = await gateway.model_info()
        return json_response({"status": "ready", "model": info.name, "device": info.device, "dtype": info.dtype})


def _check_served(name: str, info: ModelInfo) -> None:
    if name != info.name:
        raise NotFound(f"The model {name!r} is not served here; {info.name!r} is.", "model", "model_not_found")


def _timing_headers(timings: Timings, started: float) -> dict[str, str]:
    """Milliseconds, under the names that text-embeddings-inference uses."""
    return {
        "x-queue-time": f"{timings.queue_s * 1e3:.3f}",
        "x-tokenization-time": f"{timings.tokenise_s * 1e3:.3f}",
        "x-inference-time": f"{timings.forward_s * 1e3:.3f}",
        "x-total-time": f"{(time.perf_counter() - started) * 1e3:.3f}",
    }
