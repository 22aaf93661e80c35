"""The routes of memories: add, search, list, get, update and delete them."""

from fastapi import Request, Response

from deployments.api import answers
from deployments.api.http import (
    Routes,
    decode_id,
    json_response,
    origin_of,
    parse_body,
    principal_of,
    read_body,
    read_query,
)
from deployments.api.openapi import MEMORY_NOT_FOUND, WRITE_CONFLICT, fails, takes
from deployments.errors import InvalidRequest
from deployments.requests import bodies
from deployments.service import Memserve

MEMORIES = "/v1/users/{user_id}/memories"
MEMORY = f"{MEMORIES}/{{memory_id}}"
BODIES = (
    bodies.AddBody,
    bodies.AddManyBody,
    bodies.SearchBody,
    bodies.GetManyBody,
    bodies.DuplicatesBody,
    bodies.UpdateBody,
    bodies.DeleteBody,
)

routes = Routes("memories")


@routes.add(
    "POST",
    MEMORIES,
    "write",
    status_code=201,
    response_model=answers.AddedMemoriesAnswer,
    responses=fails({409: WRITE_CONFLICT}),
    openapi_extra=takes(body=bodies.AddBody, idempotency_key=True),
)
async def post_user_memories(memserve: Memserve, request: Request) -> Response:
    """Add one memory or many to a user. The answer is sent after they are committed."""
    user = _user_id(request, new=True)
    read_query(request, bodies.NoQuery)
    raw = await read_body(request, memserve.max_body_bytes)
    body = await parse_body(bodies.AddBody, raw)
    return json_response(await memserve.add_body(principal_of(request), user, body, origin_of(request, raw)), 201)


@routes.add(
    "POST",
    "/v1/memories",
    "write",
    status_code=201,
    response_model=answers.AddedForUsersAnswer,
    responses=fails({409: WRITE_CONFLICT}),
    openapi_extra=takes(body=bodies.AddManyBody, idempotency_key=True),
)
async def post_memories(memserve: Memserve, request: Request) -> Response:
    """Add memories of many users in one call, all of them or none. The answer is sent after they are committed."""
    read_query(request, bodies.NoQuery)
    raw = await read_body(request, memserve.max_body_bytes)
    body = await parse_body(bodies.AddManyBody, raw)
    return json_response(
        {"memories": await memserve.add_many_body(principal_of(request), body, origin_of(request, raw))}, 201
    )


@routes.add(
    "POST",
    f"{MEMORIES}/search",
    "read",
    response_model=answers.FoundAnswer,
    openapi_extra=takes(body=bodies.SearchBody),
)
async def post_search(memserve: Memserve, request: Request) -> Response:
    """Search a user's memories by meaning. A search sees every write that was acknowledged before it."""
    user = _user_id(request)
    read_query(request, bodies.NoQuery)
    body = await parse_body(bodies.SearchBody, await read_body(request, memserve.max_body_bytes))
    return json_response(await memserve.search_body(principal_of(request), user, body))


@routes.add(
    "GET", MEMORIES, "read", response_model=answers.MemoriesPageAnswer, openapi_extra=takes(query=bodies.ListQuery)
)
async def get_memories(memserve: Memserve, request: Request) -> Response:
    """List a user's memories in pages."""
    query = read_query(request, bodies.ListQuery)
    return json_response(await memserve.list_body(principal_of(request), _user_id(request), query))


@routes.add(
    "POST",
    f"{MEMORIES}/get",
    "read",
    response_model=answers.GotMemoriesAnswer,
    openapi_extra=takes(body=bodies.GetManyBody),
)
async def post_get(memserve: Memserve, request: Request) -> Response:
    """Get memories by their ids, at most 1,000. The answer names the ids of no memory."""
    user = _user_id(request)
    read_query(request, bodies.NoQuery)
    body = await parse_body(bodies.GetManyBody, await read_body(request, memserve.max_body_bytes))
    return json_response(await memserve.get_many_body(principal_of(request), user, body))


@routes.add(
    "POST",
    f"{MEMORIES}/duplicates",
    "read",
    response_model=answers.DuplicatesAnswer,
    openapi_extra=takes(body=bodies.DuplicatesBody, optional_body=True),
)
async def post_duplicates(memserve: Memserve, request: Request) -> Response:
    """List memories of a user that are nearly the same, in groups. Nothing is deleted.

    A group is a memory and the newer ones that are similar to it. A memory that is similar to an older one begins no
    group. A page takes 200 memories into account, so it may have few groups or none.
    """
    user = _user_id(request)
    read_query(request, bodies.NoQuery)
    raw = await read_body(request, memserve.max_body_bytes)
    body = await parse_body(bodies.DuplicatesBody, raw or b"{}")
    return json_response(await memserve.duplicates_body(principal_of(request), user, body))


@routes.add(
    "DELETE",
    MEMORIES,
    "write",
    response_model=answers.DeletedAnswer,
    openapi_extra=takes(body=bodies.DeleteBody, optional_body=True, query=bodies.DeleteQuery, idempotency_key=True),
)
async def delete_memories(memserve: Memserve, request: Request) -> Response:
    """Delete the memories that match a filter, which is given in the body or in the query, or those with some ids."""
    user = _user_id(request)
    query = read_query(request, bodies.DeleteQuery)
    raw = await read_body(request, memserve.max_body_bytes)
    if query.filter is None:
        body = await parse_body(bodies.DeleteBody, raw or b"{}")
    elif raw:
        raise InvalidRequest("must be given in the body or in the query, not in both", "filter")
    else:
        body = bodies.DeleteBody(filter=query.filter)
    who, origin = principal_of(request), origin_of(request, raw)
    if body.ids is not None:
        return json_response(await memserve.delete_many_body(who, user, body.ids, origin))
    assert body.filter is not None
    return json_response({"deleted": await memserve.delete_where_body(who, user, body.filter, origin)})


@routes.add(
    "GET",
    MEMORY,
    "read",
    response_model=answers.MemoryAnswer,
    responses=fails({404: MEMORY_NOT_FOUND}),
    openapi_extra=takes(query=bodies.GetQuery),
)
async def get_memory(memserve: Memserve, request: Request) -> Response:
    """Get one memory."""
    query = read_query(request, bodies.GetQuery)
    who, user, memory = principal_of(request), _user_id(request), _memory_id(request)
    return json_response(await memserve.get_body(who, user, memory, query))


@routes.add(
    "PATCH",
    MEMORY,
    "write",
    response_model=answers.UpdatedMemoryAnswer,
    responses=fails(
        {
            404: MEMORY_NOT_FOUND,
            409: "the memory has another version than `if_version` (`version_mismatch`), or was deleted after this "
            "write was sent (`deleted`)",
        }
    ),
    openapi_extra=takes(body=bodies.UpdateBody, idempotency_key=True),
)
async def patch_memory(memserve: Memserve, request: Request) -> Response:
    """Update a memory. A new text without a vector is embedded.

    A key without the scope `read` is answered without the content of the memory.
    """
    user, memory = _user_id(request), _memory_id(request)
    read_query(request, bodies.NoQuery)
    raw = await read_body(request, memserve.max_body_bytes)
    body = await parse_body(bodies.UpdateBody, raw)
    return json_response(await memserve.update_body(principal_of(request), user, memory, body, origin_of(request, raw)))


@routes.add(
    "DELETE",
    MEMORY,
    "write",
    status_code=204,
    responses=fails({404: MEMORY_NOT_FOUND}),
    openapi_extra=takes(idempotency_key=True),
)
async def delete_memory(memserve: Memserve, request: Request) -> Response:
    """Delete one memory, and its text and metadata from the history."""
    user, memory = _user_id(request), _memory_id(request)
    read_query(request, bodies.NoQuery)
    await memserve.delete_body(principal_of(request), user, memory, origin_of(request))
    return Response(status_code=204)


@routes.add(
    "GET",
    f"{MEMORY}/history",
    "read",
    response_model=answers.HistoryAnswer,
    responses=fails({404: MEMORY_NOT_FOUND}),
    openapi_extra=takes(query=bodies.HistoryQuery),
)
async def get_history(memserve: Memserve, request: Request) -> Response:
    """List the states of one memory in pages, oldest first."""
    user, memory = _user_id(request), _memory_id(request)
    query = read_query(request, bodies.HistoryQuery)
    return json_response(await memserve.history_body(principal_of(request), user, memory, query))


def _user_id(request: Request, *, new: bool = False) -> str:
    return decode_id(request.path_params["user_id"], "user_id", new=new)


def _memory_id(request: Request) -> str:
    return decode_id(request.path_params["memory_id"], "memory_id")
