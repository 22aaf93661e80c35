"""The routes of memories: add, search, list, read, change and forget them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response

from deployments.api import answers
from deployments.api.http import decode_id, json_response, origin_of, read_body, read_query
from deployments.api.openapi import takes
from deployments.errors import InvalidRequest
from deployments.requests import bodies

if TYPE_CHECKING:
    from deployments.gateway import Gateway

MEMORIES = "/v1/users/{user_id}/memories"
MEMORY = f"{MEMORIES}/{{memory_id}}"
BODIES = (
    bodies.AddBody,
    bodies.AddManyBody,
    bodies.SearchBody,
    bodies.UpdateBody,
    bodies.DeleteBody,
)


def add_memories(api: FastAPI, gateway: Gateway) -> None:
    """Add the routes under /v1/users/{user_id}/memories, and the one that writes for many users."""

    @api.post(
        MEMORIES,
        status_code=201,
        response_model=answers.AddedMemoriesAnswer,
        openapi_extra=takes(body=bodies.AddBody, idempotency_key=True),
        tags=["memories"],
    )
    async def post_user_memories(user_id: str, request: Request) -> Response:
        """Remember one text or many for a user. Answers when they are committed."""
        user = decode_id(user_id, "user_id", new=True)
        read_query(request, bodies.NoQuery)
        raw = await read_body(request, gateway.max_body_bytes)
        body = bodies.parse(bodies.AddBody, raw)
        single = body.memories is None
        (result,) = await gateway.append(
            [(user, body.items())], body, lambda n: "" if single else f"memories.{n}", origin_of(request, raw)
        )
        content = {"memories": [bodies.appended(entry) for entry in result.memories], "version": result.version}
        return json_response(content, 201)

    @api.post(
        "/v1/memories",
        status_code=201,
        response_model=answers.AddedForUsersAnswer,
        openapi_extra=takes(body=bodies.AddManyBody, idempotency_key=True),
        tags=["memories"],
    )
    async def post_memories(request: Request) -> Response:
        """Remember texts of many users in one call, all or none of them. Answers when they are committed."""
        read_query(request, bodies.NoQuery)
        raw = await read_body(request, gateway.max_body_bytes)
        body = bodies.parse(bodies.AddManyBody, raw)
        return json_response({"memories": await gateway.append_many(body, origin_of(request, raw))}, 201)

    @api.post(
        f"{MEMORIES}/search",
        response_model=answers.FoundAnswer,
        openapi_extra=takes(body=bodies.SearchBody),
        tags=["memories"],
    )
    async def post_search(user_id: str, request: Request) -> Response:
        """Find a user's memories by meaning. Sees every write that was acknowledged before."""
        user = decode_id(user_id, "user_id")
        read_query(request, bodies.NoQuery)
        body = bodies.parse(bodies.SearchBody, await read_body(request, gateway.max_body_bytes))
        found = await gateway.find(user, body)
        results = [bodies.memory(memory) for memory in found.results]
        return json_response({"results": results, "index": found.index, "version": found.version})

    @api.get(
        MEMORIES,
        response_model=answers.MemoriesPageAnswer,
        openapi_extra=takes(query=bodies.ListQuery),
        tags=["memories"],
    )
    async def get_memories(user_id: str, request: Request) -> Response:
        """A page of a user's memories."""
        query = read_query(request, bodies.ListQuery)
        return json_response(await gateway.list(decode_id(user_id, "user_id"), **query.model_dump()))

    @api.delete(
        MEMORIES,
        response_model=answers.DeletedAnswer,
        openapi_extra=takes(body=bodies.DeleteBody, optional_body=True, query=bodies.DeleteQuery, idempotency_key=True),
        tags=["memories"],
    )
    async def delete_memories(user_id: str, request: Request) -> Response:
        """Forget the memories that match a filter, which is in the body or in the query."""
        user = decode_id(user_id, "user_id")
        query = read_query(request, bodies.DeleteQuery)
        raw = await read_body(request, gateway.max_body_bytes)
        if query.filter is None:
            body = bodies.parse(bodies.DeleteBody, raw or b"{}")
        elif raw:
            raise InvalidRequest("Give the filter in the body or in the query, not in both.", "filter")
        else:
            body = bodies.DeleteBody(filter=query.filter)
        return json_response({"deleted": await gateway.delete_where(user, body.filter, origin=origin_of(request, raw))})

    @api.get(MEMORY, response_model=answers.MemoryAnswer, openapi_extra=takes(query=bodies.GetQuery), tags=["memories"])
    async def get_memory(user_id: str, memory_id: str, request: Request) -> Response:
        """One memory."""
        query = read_query(request, bodies.GetQuery)
        return json_response(await gateway.get(*_names(user_id, memory_id), **query.model_dump()))

    @api.patch(
        MEMORY,
        response_model=answers.MemoryAnswer,
        openapi_extra=takes(body=bodies.UpdateBody, idempotency_key=True),
        tags=["memories"],
    )
    async def patch_memory(user_id: str, memory_id: str, request: Request) -> Response:
        """Change a memory; a new text is embedded anew."""
        names = _names(user_id, memory_id)
        read_query(request, bodies.NoQuery)
        raw = await read_body(request, gateway.max_body_bytes)
        changes = bodies.parse(bodies.UpdateBody, raw).model_dump(exclude_unset=True)
        return json_response(await gateway.update(*names, origin=origin_of(request, raw), **changes))

    @api.delete(MEMORY, status_code=204, openapi_extra=takes(idempotency_key=True), tags=["memories"])
    async def delete_memory(user_id: str, memory_id: str, request: Request) -> Response:
        """Forget one memory, with what its history said."""
        names = _names(user_id, memory_id)
        read_query(request, bodies.NoQuery)
        await gateway.delete(*names, origin=origin_of(request))
        return Response(status_code=204)

    @api.get(f"{MEMORY}/history", response_model=answers.HistoryAnswer, tags=["memories"])
    async def get_history(user_id: str, memory_id: str, request: Request) -> Response:
        """The states of one memory, oldest first."""
        names = _names(user_id, memory_id)
        read_query(request, bodies.NoQuery)
        return json_response({"events": await gateway.history(*names)})


def _names(user_id: str, memory_id: str) -> tuple[str, str]:
    return decode_id(user_id, "user_id"), decode_id(memory_id, "memory_id")
