"""Who makes a request: the key that it carries, looked up before any route sees the request.

Guarantees:
- Every request that reaches a route has a principal. If keys are asked for, it is that of the request's key; without a
  usable key the request is refused, whatever its path, except for the paths that need none.
- The body of a refused request is not read.
- A key that is revoked, or expires, while a body is sent or an export is read writes and reads nothing more: it is
  looked up again after the body, before each page of an import, and before each piece of an export.
- All work of a request counts as its key's, so that callers of one key share what the queues give to one caller.

Serve's health checks and a load balancer's probes carry no key, nor does a browser that opens the documentation. These
paths tell nothing of any tenant.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.api.http import CountRefusal, ErrorBody, refusal
from deployments.errors import LocatedError, to_http
from deployments.fair_queue import work_of
from deployments.requests.principal import ANYONE, FindKey, Principal, credential_in, unknown_key


class Authentication:
    """ASGI middleware that puts `principal` and `key` into the state of each request.

    `key` is None if the server asks for no key. A request to an open path has neither.

    Args:
        find_key: looks up a key; None if the server asks for no key, and everybody may do everything.
        count_refusal: is called with each refused request, if there is an audit.
        open_paths: the paths that are answered without a key.
        error_bodies: by path, the bodies of errors that do not have the OpenAI shape.
        on_error: is called with the error of each refused request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        find_key: FindKey | None,
        count_refusal: CountRefusal | None,
        open_paths: Collection[str],
        error_bodies: Mapping[str, ErrorBody],
        on_error: Callable[[Exception], None],
    ) -> None:
        self.app = app
        self._find_key = find_key
        self._count_refusal = count_refusal
        self._open_paths = frozenset(open_paths)
        self._error_bodies = error_bodies
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif self._find_key is None:
            await self.app(_with_state(scope, principal=ANYONE, key=None), receive, send)
        elif scope["path"] in self._open_paths:
            await self.app(scope, receive, send)
        else:
            await self._identify(self._find_key, scope, receive, send)

    async def _identify(self, find_key: FindKey, scope: Scope, receive: Receive, send: Send) -> None:
        credential = None
        try:
            credential = credential_in(Headers(raw=scope["headers"]))
            key = await find_key(credential)
            if key is None:
                raise unknown_key()
        except LocatedError as error:
            self._on_error(error)
            if self._count_refusal is not None:
                self._count_refusal(None, None if credential is None else credential.id, to_http(error))
            await refusal(error, scope["path"], self._error_bodies)(scope, receive, send)
            return
        principal = Principal.of_key(key, partial(find_key, credential))
        with work_of(f"key:{key.id}"):
            await self.app(_with_state(scope, principal=principal, key=key), receive, send)


def _with_state(scope: Scope, **added: Any) -> Scope:
    return {**scope, "state": {**scope.get("state", {}), **added}}
