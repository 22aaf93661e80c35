"""The routes of users as a whole: list, describe, delete, export and import."""

from collections.abc import AsyncIterator

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from deployments.api import answers
from deployments.api.http import (
    Routes,
    body_chunks,
    decode_id,
    json_response,
    origin_of,
    principal_of,
    read_body,
    read_query,
)
from deployments.api.openapi import WRITE_CONFLICT, fails, takes
from deployments.errors import InvalidRequest
from deployments.requests import bodies
from deployments.service import Memserve

USER = "/v1/users/{user_id}"
NDJSON = "application/x-ndjson"

routes = Routes("users")


@routes.add(
    "GET", "/v1/users", "read", response_model=answers.UsersPageAnswer, openapi_extra=takes(query=bodies.UsersQuery)
)
async def get_users(memserve: Memserve, request: Request) -> Response:
    """List the users that have memories, by user id, in pages."""
    query = read_query(request, bodies.UsersQuery)
    return json_response(await memserve.users_body(principal_of(request), query))


@routes.add("GET", USER, "read", response_model=answers.UserAnswer)
async def get_user(memserve: Memserve, request: Request) -> Response:
    """Describe one user. Every value is zero or null if the user has never had a memory."""
    return json_response(await memserve.user_body(principal_of(request), _user_id(request)))


@routes.add(
    "DELETE", USER, "write", response_model=answers.DeletedUserAnswer, openapi_extra=takes(idempotency_key=True)
)
async def delete_user(memserve: Memserve, request: Request) -> Response:
    """Delete everything of one user."""
    user = _user_id(request)
    if await read_body(request, memserve.max_body_bytes):
        raise InvalidRequest("This route deletes the whole user and takes no body.")
    return json_response(await memserve.delete_user_body(principal_of(request), user, origin_of(request)))


@routes.add(
    "GET",
    f"{USER}/export",
    "read",
    response_class=StreamingResponse,
    responses={200: {"content": {NDJSON: {"schema": {"type": "string"}}}}},
)
async def get_export(memserve: Memserve, request: Request) -> Response:
    """Export all memories of a user as NDJSON: one line for each memory, with its vector and history."""
    pieces = memserve.export_body(principal_of(request), _user_id(request))
    first = await anext(pieces, b"")  # an error of the first piece still gets a status of its own

    async def all_pieces() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return StreamingResponse(all_pieces(), media_type=NDJSON)


@routes.add(
    "POST",
    f"{USER}/import",
    "write",
    response_model=answers.ImportedAnswer,
    responses=fails({409: WRITE_CONFLICT}),
    openapi_extra={"requestBody": {"required": False, "content": {NDJSON: {"schema": {"type": "string"}}}}},
)
async def post_import(memserve: Memserve, request: Request) -> Response:
    """Import NDJSON as the export writes it. A line without a vector is embedded. The request may be sent again."""
    user = _user_id(request, new=True)
    who, origin = principal_of(request), origin_of(request)
    return json_response(await memserve.import_body(who, user, body_chunks(request), origin))


def _user_id(request: Request, *, new: bool = False) -> str:
    """The user of a route that takes no query."""
    read_query(request, bodies.NoQuery)
    return decode_id(request.path_params["user_id"], "user_id", new=new)
