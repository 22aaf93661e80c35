"""Builds the HTTP application: the routes of all modules, served by one service. Does not use Ray."""

from collections.abc import Awaitable, Callable, Sequence

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware

from deployments.api import answers, audit, docs, embeddings, keys, memories, rerank, tei, users
from deployments.api.authentication import Authentication
from deployments.api.door import Door
from deployments.api.held_bodies import HeldBodies
from deployments.api.http import RawPath, Routes, api_without_routes, json_response, read_query
from deployments.api.openapi import ErrorShape, document_routes, fails
from deployments.api.rate_limiting import RateLimiting
from deployments.errors import Unavailable
from deployments.rate_limits import RateLimits
from deployments.requests import bodies
from deployments.requests.origin import HEADER, request_id_is_missing
from deployments.requests.principal import FindKey
from deployments.service import Memserve

DOCUMENTATION = docs.PATHS | {"/openapi.json"}
"""The paths of the documentation, which everybody may read: it is the same on every server."""

operations = Routes("operations")
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_NOT_READY = "a text cannot be embedded, or the log cannot be read"


@operations.add("GET", "/health/live", None, response_model=answers.LiveAnswer)
async def get_live(_: Memserve, __: Request) -> Response:
    """200 while the process runs."""
    return json_response({"status": "live"})


@tei.routes.add("GET", "/ping", None, response_model=answers.ReadyAnswer, responses=fails({503: _NOT_READY}))
@operations.add("GET", "/health", None, response_model=answers.ReadyAnswer, responses=fails({503: _NOT_READY}))
@operations.add("GET", "/health/ready", None, response_model=answers.ReadyAnswer, responses=fails({503: _NOT_READY}))
async def get_ready(memserve: Memserve, request: Request) -> Response:
    """200 if a text can be embedded and the log can be read, else 503; the message names what is missing."""
    _, own_port = request.scope.get("server") or (None, None)
    if request.app.state.behind_haproxy and request_id_is_missing(request.headers, own_port):
        raise Unavailable(
            f"Not ready. haproxy: it adds no {HEADER} to requests, so a write that it resends would be stored twice; "
            "start Ray with the variables that `memserve env` prints",
            None,
            "not_ready",
        )
    return json_response({"status": "ready", **await memserve.check_ready()})


@operations.add(
    "GET",
    "/metrics",
    "admin",
    response_class=PlainTextResponse,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        **fails({503: "Ray's agent on this node does not answer (`no_metrics`)"}),
    },
)
async def get_metrics(_: Memserve, request: Request) -> Response:
    """The metrics of all replicas on the node of the gateway that answers, in Prometheus' text format."""
    read_query(request, bodies.NoQuery)
    return Response(await request.app.state.read_metrics(), media_type=_PROMETHEUS)


async def _no_metrics() -> bytes:
    raise Unavailable("This server exports no metrics.", None, "no_metrics")


def build_api(
    memserve: Memserve,
    on_error: Callable[[Exception], None],
    *,
    behind_haproxy: bool = False,
    find_key: FindKey | None = None,
    rate_limits: RateLimits | None = None,
    loopback_only: bool = False,
    cors_origins: Sequence[str] = (),
    max_body_bytes_in_flight: int = 256 << 20,
    read_metrics: Callable[[], Awaitable[bytes]] = _no_metrics,
) -> FastAPI:
    """The ASGI application of one gateway replica. If a request fails, `on_error` is called with its error.

    Args:
        behind_haproxy: whether HAProxy is in front. Readiness then requires the header that makes resent writes safe.
        find_key: looks up the key of a request; None if everybody may do everything without a key.
        rate_limits: how much each key may ask for in a minute, if keys are asked for; None for no limits.
        loopback_only: whether requests that a web page may make through a browser on this machine are refused.
        cors_origins: origins whose web pages may call the application.
        max_body_bytes_in_flight: see `HeldBodies`.
        read_metrics: the metrics of this node in Prometheus' text format.
    """
    error_bodies = dict.fromkeys(tei.routes.paths(), tei.error_body)
    api = api_without_routes(on_error, error_bodies)
    groups = (
        embeddings.routes,
        rerank.routes,
        tei.routes,
        memories.routes,
        users.routes,
        keys.routes,
        audit.routes,
        operations,
    )
    count_refusal = None if find_key is None else memserve.refused.count
    if rate_limits is not None:
        api.add_middleware(
            RateLimiting,
            limits=rate_limits,
            count_refusal=count_refusal,
            error_bodies=error_bodies,
            on_error=on_error,
        )
    api.add_middleware(
        Authentication,
        find_key=find_key,
        count_refusal=count_refusal,
        open_paths={*DOCUMENTATION, *(path for group in groups for path in group.open_paths())},
        error_bodies=error_bodies,
        on_error=on_error,
    )
    if loopback_only:
        api.add_middleware(Door, allowed=cors_origins, error_bodies=error_bodies, on_error=on_error)
    if cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    api.add_middleware(RawPath)  # the outermost: all others see the path as the router does
    api.state.behind_haproxy = behind_haproxy
    api.state.read_metrics = read_metrics
    api.state.count_refusal = count_refusal
    api.state.held_bodies = HeldBodies(max_body_bytes_in_flight)
    # A request asks the routes in order, so those of most requests stand in front.
    busiest = [embeddings.routes, memories.routes]
    ordered = [*busiest, *(group for group in groups if group not in busiest)]
    api.router.routes.extend(route for group in ordered for route in group.served(memserve))
    api.router.routes.extend(docs.routes())

    def declare() -> list[APIRoute]:
        return [route for group in groups for route in group.documented()]

    of_tei = {tei.routes.tag: ErrorShape(answers.TeiErrorAnswer, tei.error_body)}
    described = [body for module in (embeddings, rerank, tei, memories, keys) for body in module.BODIES]
    document_routes(api, declare, described, of_tei, needs_key=find_key is not None)
    return api
