"""The routes of keys: an admin makes, lists and revokes the keys of its own tenant, and every key describes itself."""

from typing import Any, get_args

from fastapi import Request, Response

from deployments.api import answers
from deployments.api.http import Routes, decode_id, json_response, parse_body, principal_of, read_body, read_query
from deployments.api.openapi import fails, takes
from deployments.errors import InvalidRequest
from deployments.requests import bodies
from deployments.requests.principal import KeyScope
from deployments.service import Memserve

BODIES = (bodies.CreateKeyBody,)

routes = Routes("keys")


@routes.add(
    "POST",
    "/v1/keys",
    "admin",
    status_code=201,
    response_model=answers.NewKeyAnswer,
    openapi_extra=takes(body=bodies.CreateKeyBody, optional_body=True),
)
async def post_key(memserve: Memserve, request: Request) -> Response:
    """Make a key of your own tenant. The answer alone has the key itself: the server keeps its hash.

    It has at most the limits of the key of this request. A request that is sent again makes another key.
    """
    read_query(request, bodies.NoQuery)
    body = await parse_body(bodies.CreateKeyBody, await read_body(request, memserve.max_body_bytes) or b"{}")
    made = await memserve.create_key_body(principal_of(request), _limited(body, request.scope.get("state", {})))
    return json_response(made, 201, {"cache-control": "no-store"})


def _limited(body: bodies.CreateKeyBody, state: dict[str, Any]) -> bodies.CreateKeyBody:
    """The body with the own limits of the key that asks, unless it has limits. Raises InvalidRequest if one is higher.

    Args:
        state: of the request, with that key and its limits, its own or those of the settings.
    """
    maker, limits = state.get("key"), state.get("limits")
    if maker is None or limits is None:
        return body
    inherited = {}
    for field, bucket in limits.by_field().items():
        asked = getattr(body, field)
        if asked is None:
            inherited[field] = getattr(maker, field)
        elif bucket is not None and asked > bucket.limit:
            raise InvalidRequest(f"must be at most {bucket.limit}, the limit of the key that asks", field)
    return body.model_copy(update=inherited)


@routes.add(
    "GET", "/v1/keys", "admin", response_model=answers.KeysPageAnswer, openapi_extra=takes(query=bodies.KeysQuery)
)
async def get_keys(memserve: Memserve, request: Request) -> Response:
    """List the keys of your own tenant in pages, the newest first, those that were revoked or have expired included."""
    query = read_query(request, bodies.KeysQuery)
    return json_response(await memserve.keys_body(principal_of(request), query))


@routes.add("GET", "/v1/keys/self", "any", response_model=answers.OwnKeyAnswer)
async def get_own_key(_: Memserve, request: Request) -> Response:
    """Describe the key of this request: its tenant, its user and its scopes."""
    read_query(request, bodies.NoQuery)
    who, key = principal_of(request), request.scope["state"]["key"]
    content: dict[str, Any] = {
        "id": who.key_id,
        "tenant": who.tenant,
        "user_id": who.user_id,
        "scopes": [scope for scope in get_args(KeyScope) if who.may(scope)],
        "label": key and key.label,
        "expires_at": key and key.expires_at,
    }
    return json_response(content)


@routes.add(
    "DELETE",
    "/v1/keys/{key_id}",
    "admin",
    response_model=answers.KeyAnswer,
    responses=fails({404: "your tenant has no such key"}),
)
async def delete_key(memserve: Memserve, request: Request) -> Response:
    """Revoke a key of your own tenant. Every gateway refuses it within 5 seconds. It stays in the list."""
    read_query(request, bodies.NoQuery)
    key_id = decode_id(request.path_params["key_id"], "key_id")
    return json_response(await memserve.revoke_key_body(principal_of(request), key_id))
