"""The HTTP routes, each noun in a module of its own: parse, one call into the gateway, shape the answer. No Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi import FastAPI, Response

from deployments.api import answers, embeddings, memories, tei, users
from deployments.api.http import api_skeleton, call_directly, json_response
from deployments.api.openapi import complete

if TYPE_CHECKING:
    from deployments.gateway import Gateway


def build_api(gateway: Gateway, on_error: Callable[[Exception], None]) -> FastAPI:
    """The ASGI application of one gateway replica; `on_error` is told of every request that fails."""
    api = api_skeleton(on_error)
    embeddings.add_embeddings(api, gateway)
    tei.add_tei(api, gateway)
    memories.add_memories(api, gateway)
    users.add_users(api, gateway)
    _add_operations(api, gateway)
    call_directly(api)
    complete(api, [*embeddings.BODIES, *tei.BODIES, *memories.BODIES])
    return api


def _add_operations(api: FastAPI, gateway: Gateway) -> None:
    @api.get("/health/live", response_model=answers.LiveAnswer, tags=["operations"])
    async def get_live() -> Response:
        """200 while the process runs."""
        return json_response({"status": "live"})

    @api.get("/health/ready", response_model=answers.ReadyAnswer, tags=["operations"])
    @api.get("/health", response_model=answers.ReadyAnswer, tags=["operations"])
    async def get_ready() -> Response:
        """200 when a text can be embedded and the log be read, else 503 with what is missing."""
        return json_response({"status": "ready", **await gateway.check_ready()})
