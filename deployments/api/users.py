"""The routes of users: who there is, what is kept of one, taking it out, bringing it in, and forgetting it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from deployments.api import answers
from deployments.api.http import decode_id, json_response, origin_of, read_body, read_query
from deployments.api.openapi import takes
from deployments.errors import InvalidRequest
from deployments.requests import bodies

if TYPE_CHECKING:
    from deployments.gateway import Gateway

NDJSON = "application/x-ndjson"


def add_users(api: FastAPI, gateway: Gateway) -> None:
    """Add the routes under /v1/users that are about a user as a whole."""

    def user_of(user_id: str, request: Request, *, new: bool = False) -> str:
        read_query(request, bodies.NoQuery)
        return decode_id(user_id, "user_id", new=new)

    @api.get(
        "/v1/users",
        response_model=answers.UsersPageAnswer,
        openapi_extra=takes(query=bodies.UsersQuery),
        tags=["users"],
    )
    async def get_users(request: Request) -> Response:
        """A page of the users that have memories, by user id."""
        return json_response(await gateway.users(**read_query(request, bodies.UsersQuery).model_dump()))

    @api.get("/v1/users/{user_id}", response_model=answers.UserAnswer, tags=["users"])
    async def get_user(user_id: str, request: Request) -> Response:
        """What is kept of one user; of one that never was, nothing."""
        return json_response(await gateway.user(user_of(user_id, request)))

    @api.delete(
        "/v1/users/{user_id}",
        response_model=answers.DeletedUserAnswer,
        openapi_extra=takes(idempotency_key=True),
        tags=["users"],
    )
    async def delete_user(user_id: str, request: Request) -> Response:
        """Forget everything of a user."""
        user = user_of(user_id, request)
        if await read_body(request, gateway.max_body_bytes):
            raise InvalidRequest("This route deletes the whole user and takes no body.")
        return json_response(await gateway.delete_user(user, origin=origin_of(request)))

    @api.get(
        "/v1/users/{user_id}/export",
        response_class=StreamingResponse,
        responses={200: {"content": {NDJSON: {"schema": {"type": "string"}}}}},
        tags=["users"],
    )
    async def get_export(user_id: str, request: Request) -> Response:
        """All memories of a user as NDJSON, one with its vector and history a line."""
        pieces = gateway.export(user_of(user_id, request))
        first = await anext(pieces, b"")  # what is wrong from the beginning is answered as an error

        async def all_pieces() -> AsyncIterator[bytes]:
            yield first
            async for piece in pieces:
                yield piece

        return StreamingResponse(all_pieces(), media_type=NDJSON)

    @api.post(
        "/v1/users/{user_id}/import",
        response_model=answers.ImportedAnswer,
        openapi_extra={"requestBody": {"required": True, "content": {NDJSON: {"schema": {"type": "string"}}}}},
        tags=["users"],
    )
    async def post_import(user_id: str, request: Request) -> Response:
        """Take in NDJSON as the export makes it; a line without a vector is embedded. Can be sent again."""
        user = user_of(user_id, request, new=True)
        return json_response(await gateway.take_in(user, request.stream(), origin_of(request)))
