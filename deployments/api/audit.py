"""The route of the audit."""

from fastapi import Request, Response

from deployments.api import answers
from deployments.api.http import Routes, json_response, principal_of, read_query
from deployments.api.openapi import takes
from deployments.requests import bodies
from deployments.service import Memserve

routes = Routes("audit")


@routes.add(
    "GET",
    "/v1/events",
    "admin",
    response_model=answers.EventsPageAnswer,
    openapi_extra=takes(query=bodies.EventsQuery),
)
async def get_events(memserve: Memserve, request: Request) -> Response:
    """List the audit of the key's tenant, the oldest event first, in pages.

    There is an event for each write that a key asked for, for each key that was made or revoked, and for the refused
    requests of a minute with one status and code. Events hold ids, and no text. If `auth.mode` is not `keys`, requests
    leave no events.
    """
    query = read_query(request, bodies.EventsQuery)
    return json_response(await memserve.events_body(principal_of(request), query))
