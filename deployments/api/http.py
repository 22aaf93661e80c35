"""HTTP for all routes: declaring them, reading requests, writing answers.

Guarantees:
- The size of a body is bounded before it is parsed, and a compressed one is not unpacked beyond the limit.
- An id in a path may hold any percent-encoded character, a slash included.
- Work of a request that is still queued when its `x-request-timeout-ms` has passed is not done.
- Every 4xx and 5xx has the OpenAI error shape, on paths of text-embeddings-inference the shape of that server.
- A route that needs a scope is answered only if the principal of the request has it. A request without a principal
  fails; there is no default.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import parse_qsl, unquote_to_bytes

import numpy as np
import orjson
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.api.gzip import unzipped
from deployments.api.held_bodies import HELD, SMALL_BYTES
from deployments.api.openapi import security
from deployments.embedding.outputs import Timings
from deployments.errors import (
    Forbidden,
    HttpError,
    InvalidRequest,
    LocatedError,
    TooLarge,
    TooSlow,
    UnsupportedEncoding,
    to_http,
    trace_of,
)
from deployments.requests import bodies, deadlines
from deployments.requests.fields import NewId, StoredId
from deployments.requests.origin import Origin
from deployments.requests.principal import KeyScope, Principal
from deployments.requests.receive import RECEIVE
from deployments.service import Memserve

logger = logging.getLogger("memserve.api")

_JSON_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_UTC_Z
_NUMBERS_A_SLICE = 1 << 17  # about 5 ms
_NEW_ID = TypeAdapter(NewId)
_STORED_ID = TypeAdapter(StoredId)
_MAX_PARAMETERS = 32
SLOW_START_S = 30.0
"""The time that a body which takes memory from others may take in any case."""
SLOWEST_BYTES_PER_S = 1 << 15
"""How fast it must arrive beyond that, on the whole."""
_LARGE_BODY_BYTES = 1 << 18  # takes about 1 ms to parse as text, 30 ms as token ids

Body = TypeVar("Body", bound=BaseModel)
Query = TypeVar("Query", bound=BaseModel)
Handler = Callable[[Memserve, Request], Awaitable[Response]]
ErrorBody = Callable[[HttpError], Mapping[str, Any]]
CountRefusal = Callable[[str | None, str | None, HttpError], None]
"""Counts a failed request for the audit: the tenant and the id of its key, as far as they are known, and its answer."""
Needed = KeyScope | Literal["any"] | None


class _Declared(NamedTuple):
    """One route. `described` are FastAPI's arguments that describe its answers."""

    method: str
    path: str
    scope: Needed
    handler: Handler
    described: dict[str, Any]


class Routes:
    """Routes of one tag: Starlette serves them, FastAPI makes the OpenAPI document of them.

    The handlers parse, validate and answer themselves. If FastAPI called them, it would spend 70 us of each request, of
    170, on doing the same.
    """

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self._declared: list[_Declared] = []

    def add(self, method: str, path: str, scope: Needed, **described: Any) -> Callable[[Handler], Handler]:
        """Declare the decorated handler as a route.

        Args:
            scope: the scope that a key needs for it; "any" if every key is admitted. With None the route is answered
                without a key: it must tell nothing of any tenant, and its path must have no parameters.
            described: FastAPI's arguments that describe its answers.
        """

        def declare(handler: Handler) -> Handler:
            self._declared.append(_Declared(method, path, scope, handler, described))
            return handler

        return declare

    def paths(self) -> set[str]:
        """The paths as they are declared."""
        return {route.path for route in self._declared}

    def open_paths(self) -> set[str]:
        """The paths that are answered without a key, whatever the method."""
        return {route.path for route in self._declared if route.scope is None} - {
            route.path for route in self._declared if route.scope is not None
        }

    def scopes(self) -> dict[tuple[str, str], Needed]:
        """The scope that each route needs, by method and path."""
        return {(route.method, route.path): route.scope for route in self._declared}

    def served(self, memserve: Memserve) -> Iterator[Route]:
        """The routes, calling one service."""
        for route in self._declared:
            yield _QuickRoute(route, memserve)

    def documented(self) -> Iterator[APIRoute]:
        """The routes as FastAPI documents them. They are not served."""
        for method, path, scope, handler, described in self._declared:
            extra = {**described.get("openapi_extra", {}), "security": security(scope)}
            yield APIRoute(
                path,
                _no_parameters,
                methods=[method],
                name=handler.__name__,
                description=handler.__doc__,
                tags=[self.tag],
                **{**described, "openapi_extra": extra},
            )


_FOREIGN: tuple[Match, Scope] = (Match.NONE, {})


class _QuickRoute(Route):
    """A route that sees at a glance that a path is not its own.

    Ray and FastAPI each ask all routes for every request, until one matches: Starlette's regular expressions take 2 us
    for each. The errors of the handler are answered by the application's exception handlers.
    """

    def __init__(self, route: _Declared, memserve: Memserve) -> None:
        super().__init__(route.path, partial(_admitted, route, memserve), methods=[route.method])
        self._prefix, parameter, _ = route.path.partition("{")
        # A parameter with a convertor (`{id:path}`) may hold any number of slashes.
        self._slashes = None if ":" in route.path else route.path.count("/")
        self._is_literal = not parameter
        self.app = self._answer

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] == "http" and not scope.get("root_path"):
            path = scope["path"]
            if self._is_literal:
                foreign = path != self._prefix
            else:
                foreign = not path.startswith(self._prefix) or self._slashes not in (None, path.count("/"))
            if foreign:
                return _FOREIGN
        return super().matches(scope)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


async def _admitted(route: _Declared, memserve: Memserve, request: Request) -> Response:
    """Answer a request by its handler, whose work has the request's deadline.

    Raises:
        Forbidden: the principal of the request does not have the scope.
    """
    if route.scope is not None and route.scope != "any" and not principal_of(request).may(route.scope):
        message = f"This request needs a key with the scope `{route.scope}`."
        raise Forbidden(message, None, "insufficient_scope")
    deadline = deadlines.deadline_in(request.headers)
    try:
        if deadline is None:
            return await route.handler(memserve, request)
        with deadlines.until(deadline):
            return await route.handler(memserve, request)
    except (LocatedError, HTTPException, ClientDisconnect):
        raise
    except Exception as error:  # noqa: BLE001 - Serve would log its message, which may hold a text
        return request.app.state.answer_unknown(request, error)
    finally:
        if HELD in request.scope:
            request.app.state.held_bodies.release(request.scope)


def principal_of(request: Request) -> Principal:
    """Who makes a request, as deployments/api/authentication.py has found out."""
    who: Principal = request.scope["state"]["principal"]
    return who


def _no_parameters() -> None:
    """Stands for every handler: FastAPI looks for parameters, which `takes` describes."""


class RawPath:
    """ASGI middleware that routes by the path as it was sent, so that `%2F` inside an id does not split the path.

    It also gives the application the `receive` that reads the body from the connection, if there is one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = scope.get("raw_path")
        if scope["type"] == "http" and raw:
            scope = {**scope, "path": raw.split(b"?", 1)[0].decode("latin-1")}
        await self.app(scope, scope.get(RECEIVE, receive), send)


def decode_id(segment: str, name: str, *, new: bool = False) -> str:
    """A percent-decoded id from a path.

    Args:
        segment: as it was sent.
        name: of the path parameter, for errors.
        new: the id may be of a new user, to which stricter rules apply.

    Raises:
        InvalidRequest: the segment is not an id.
    """
    try:
        return (_NEW_ID if new else _STORED_ID).validate_python(unquote_to_bytes(segment).decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest("must be percent-encoded UTF-8", name) from error
    except ValidationError as error:
        first = error.errors()[0]
        message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
        raise InvalidRequest(message, name) from error


def read_query(request: Request, model: type[Query]) -> Query:
    """The parameters of the query. Raises InvalidRequest if one is unknown, wrong or given twice."""
    try:
        raw = request.scope["query_string"].decode("ascii")
        given = parse_qsl(raw, keep_blank_values=True, errors="strict", max_num_fields=_MAX_PARAMETERS)
    except ValueError as error:
        raise InvalidRequest(
            f"The query must be percent-encoded UTF-8, with at most {_MAX_PARAMETERS} parameters."
        ) from error
    values: dict[str, str] = {}
    for name, value in given:
        if name in values:
            raise InvalidRequest("must not be given twice", name)
        values[name] = value
    return bodies.parse_query(model, values)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body, unpacked.

    Raises:
        TooLarge: as soon as it is known to be longer than `max_bytes`, compressed or unpacked.
        TooSlow: it counts as held and arrives at less than `SLOWEST_BYTES_PER_S`, after `SLOW_START_S`.
        Overloaded: the bodies of other requests take too much memory.
        UnsupportedEncoding, InvalidRequest: see `body_chunks`.
        Unauthorized: the key was revoked or has expired while the body was sent, which may take long.
    """
    declared, size = request.headers.get("content-length", ""), 0
    if declared.isdecimal():
        _admit_body(request, int(declared), max_bytes)
    chunks = []
    started = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(None) as patience:
            if HELD in request.scope:
                patience.reschedule(started + SLOW_START_S)
            async for chunk in body_chunks(request, max_bytes):
                chunks.append(chunk)
                size += len(chunk)
                _admit_body(request, size, max_bytes)
                if HELD in request.scope:
                    patience.reschedule(started + SLOW_START_S + size / SLOWEST_BYTES_PER_S)
    except TimeoutError as error:
        raise TooSlow("The request did not arrive in time.", None, "request_timeout") from error
    await principal_of(request).check()
    return b"".join(chunks)


def _admit_body(request: Request, size: int, max_bytes: int) -> None:
    """Raise TooLarge or Overloaded if so many bytes of a body are too many."""
    if size > max_bytes:
        raise _too_large(max_bytes)
    if size > SMALL_BYTES:
        request.app.state.held_bodies.hold(request.scope, size)


async def _at_most(max_bytes: int, chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The chunks. Raises TooLarge as soon as they are longer than `max_bytes` together."""
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        yield chunk


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"The body is larger than {max_bytes} bytes.", None, "body_too_large")


async def parse_body(model: type[Body], raw: bytes) -> Body:
    """Parse and validate a body; a large one in a thread.

    Our own checks of the inputs let the event loop run. Pydantic does not: it holds the interpreter's lock while it
    reads the JSON, for 4 to 50 ms if 16 MiB hold texts, and for 0.2 to 0.5 s if they hold token ids.

    Raises:
        InvalidRequest: the path of the first wrong field.
    """
    if len(raw) <= _LARGE_BODY_BYTES:
        return bodies.parse(model, raw)
    return await asyncio.to_thread(bodies.parse, model, raw)


def body_chunks(request: Request, max_compressed_bytes: int | None = None) -> AsyncIterator[bytes]:
    """The body as it arrives, unpacked if it is compressed. No chunk is much longer than the one that arrived.

    Args:
        max_compressed_bytes: the longest compressed body; None for no limit. The unpacked body may be empty whatever is
            sent, so a limit of its length alone would let a request go on for ever.

    Raises:
        UnsupportedEncoding: it is compressed in another way than by gzip.
        InvalidRequest: while it is read: it is not what gzip writes.
        TooLarge: while it is read: it is compressed, and longer than `max_compressed_bytes`.
    """
    encoding = request.headers.get("content-encoding", "")
    if encoding.lower() in ("", "identity"):
        return request.stream()
    if encoding.lower() in ("gzip", "x-gzip"):  # RFC 9110, 8.4.1.3
        sent = request.stream()
        return unzipped(sent if max_compressed_bytes is None else _at_most(max_compressed_bytes, sent))
    raise UnsupportedEncoding(f"The body has the encoding {encoding!r}; gzip is read.", None, "unsupported_encoding")


def origin_of(request: Request, body: bytes = b"") -> Origin:
    """The origin of a write. Raises InvalidRequest if a header is invalid."""
    scope = request.scope
    target = f"{scope['path']}?{scope['query_string'].decode('latin-1')}"  # RawPath made `path` the raw one
    return Origin.of_request(principal_of(request).realm, request.headers, request.method, target, body)


async def json_rows(rows: np.ndarray) -> list[orjson.Fragment]:
    """Rows of numbers as JSON, for `json_response`, written in slices so that other requests are served in between.

    orjson writes a million numbers in about 40 ms, in which the process does nothing else.
    """
    written: list[orjson.Fragment] = []
    step = max(1, _NUMBERS_A_SLICE // rows.shape[1])
    for first in range(0, len(rows), step):
        if first:
            await asyncio.sleep(0)
        written += [orjson.Fragment(orjson.dumps(row, option=_JSON_OPTIONS)) for row in rows[first : first + step]]
    return written


def refusal(error: LocatedError, path: str, error_bodies: Mapping[str, ErrorBody]) -> Response:
    """The answer of a request that is refused before it reaches a route."""
    return error_response(to_http(error), error_bodies.get(path, HttpError.body))


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON by orjson: float32 arrays in their shortest form, times in UTC with a Z."""
    return Response(orjson.dumps(content, option=_JSON_OPTIONS), status, headers, "application/json")


def timing_headers(timings: Timings, started: float) -> dict[str, str]:
    """Headers with milliseconds, named as text-embeddings-inference names them; `started` is a time.perf_counter."""
    return {
        "x-queue-time": f"{timings.queue_s * 1e3:.3f}",
        "x-tokenization-time": f"{timings.tokenize_s * 1e3:.3f}",
        "x-inference-time": f"{timings.forward_s * 1e3:.3f}",
        "x-total-time": f"{(time.perf_counter() - started) * 1e3:.3f}",
    }


def error_response(error: HttpError, body_of: ErrorBody = HttpError.body) -> Response:
    """The answer of a request that failed, with Retry-After if a later request may succeed."""
    headers = {} if error.retry_after_s is None else {"retry-after": str(max(1, round(error.retry_after_s)))}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"  # RFC 9110, 15.5.2
    elif error.code == "unsupported_encoding":
        headers["accept-encoding"] = "gzip"  # RFC 9110, 15.5.16
    return json_response(body_of(error), error.status, headers)


_HTTP_TYPES = {404: "not_found_error", 405: "invalid_request_error", 401: "authentication_error"}


def api_without_routes(on_error: Callable[[Exception], None], error_bodies: Mapping[str, ErrorBody]) -> FastAPI:
    """The application without its routes. It calls `on_error` with the error of every request that fails.

    Args:
        error_bodies: by path, the bodies of errors that do not have the OpenAI shape.
    """
    api = FastAPI(
        title="memserve",
        description="Embeddings with dynamic batching, and a durable memory store with one vector index per user.",
        version="0.1.0",
        docs_url=None,  # deployments/api/docs.py
        redoc_url=None,
    )

    def response(request: Request, error: HttpError) -> Response:
        if error.status == 408:  # HAProxy answers it too, in the one shape that it knows
            return error_response(error)
        return error_response(error, error_bodies.get(request.scope["path"], HttpError.body))

    @api.exception_handler(LocatedError)
    async def _known(request: Request, error: Exception) -> Response:
        on_error(error)
        answer = to_http(error)
        who: Principal | None = request.scope.get("state", {}).get("principal")
        if request.app.state.count_refusal is not None and who is not None:
            request.app.state.count_refusal(who.tenant, who.key_id, answer)
        return response(request, answer)

    @api.exception_handler(HTTPException)
    async def _routing(request: Request, error: HTTPException) -> Response:
        on_error(error)
        kind = _HTTP_TYPES.get(error.status_code, "invalid_request_error")
        answer = response(request, HttpError(error.status_code, kind, f"{error.detail}.", None, None, None))
        if error.status_code == 405:
            answer.headers["allow"] = ", ".join(sorted(_methods_of(api, request.scope)))
        return answer

    @api.exception_handler(ClientDisconnect)
    async def _gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # the client is gone; Serve's metrics count the request under this status

    def answer_unknown(request: Request, error: Exception) -> Response:
        on_error(error)
        logger.error("%s %s failed\n%s", request.method, request.scope["path"], trace_of(error))
        return response(request, to_http(error))

    @api.exception_handler(Exception)
    async def _unknown(request: Request, error: Exception) -> Response:
        return answer_unknown(request, error)

    api.state.answer_unknown = answer_unknown

    return api


def _methods_of(api: FastAPI, scope: Scope) -> set[str]:
    """The methods of a request's path. Each method is a route of its own."""
    matching = (route for route in api.routes if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE)
    return {method for route in matching for method in route.methods or ()}
