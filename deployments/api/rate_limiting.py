"""Limits a minute over HTTP: a request beyond the limit of its key is refused before its body is read.

The answers to a key with a limit tell what is left, in the headers that OpenAI sends. Tokens are taken where texts are
embedded (deployments/calls/embedder.py): an estimate before anything is queued, then what was read.
"""

from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.http import CountRefusal, ErrorBody, refusal
from deployments.errors import RateLimited, to_http
from deployments.rate_limits import RateLimits, tokens_from


class RateLimiting:
    """ASGI middleware inside of Authentication.

    Args:
        limits: of the keys. Those of the request's key are `limits` in the state of its scope.
        count_refusal: is called with each refused request, if there is an audit.
        error_bodies: by path, the bodies of errors that do not have the OpenAI shape.
        on_error: is called with the error of each refused request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: RateLimits,
        count_refusal: CountRefusal | None,
        error_bodies: Mapping[str, ErrorBody],
        on_error: Callable[[Exception], None],
    ) -> None:
        self.app = app
        self._limits = limits
        self._count_refusal = count_refusal
        self._error_bodies = error_bodies
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = scope.get("state", {}).get("key")
        limits = key and self._limits.of_key(key.id, key.requests_per_minute, key.tokens_per_minute)
        if limits is None:
            await self.app(scope, receive, send)
            return

        scope["state"]["limits"] = limits

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *limits.headers()]}
            await send(message)

        if limits.requests is not None:
            try:
                await limits.requests.take(1)
            except RateLimited as error:
                self._on_error(error)
                if self._count_refusal is not None:
                    self._count_refusal(key.tenant, key.id, to_http(error))
                await refusal(error, scope["path"], self._error_bodies)(scope, receive, send_with_limits)
                return
        with tokens_from(limits.tokens):
            await self.app(scope, receive, send_with_limits)
