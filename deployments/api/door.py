"""The door: which HTTP requests a server without keys refuses before it looks at anything else.

A web page can have a browser on this machine send requests to a loopback address. Guarantees, if `auth.mode` is
`loopback`: a page of another origin can neither read nor write through such a browser.
- A request whose Host is not a loopback name is refused. A page that has its own name resolve to 127.0.0.1 (DNS
  rebinding) would otherwise be of the same origin as the server.
- A request that may write is refused if its Origin is another one than the Host, or if the browser says that it comes
  from another site. Browsers do not show the answers of reads to a page of another origin.
- A request that may write is refused if its body has a content type that a page may send to another origin without
  asking: text/plain or that of a form. This holds back pages in browsers that send neither of the two headers. A body
  without a content type is admitted, although a page may send one (a Blob without a type): every browser that can do so
  sends an Origin with it.
- Origins that the settings allow (CORS) are not foreign.

Programs that are no browsers send neither an Origin nor Sec-Fetch-Site; they must not send the content type of a form,
as `curl -d` does by itself. A request without a Host is not from a browser.
"""

import re
from collections.abc import Callable, Collection, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.api.http import ErrorBody, refusal
from deployments.errors import Forbidden, UnsupportedType

_LOOPBACK = re.compile(rb"(?:localhost|[a-z0-9.-]+\.localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?", re.IGNORECASE)
_SENT_WITHOUT_ASKING = frozenset({b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data"})
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_MAX_HOSTS = 64  # that are remembered; a client may send any number of different ones


class Door:
    """ASGI middleware that refuses requests as described above.

    Args:
        allowed: origins whose pages may call this server.
        error_bodies: by path, the bodies of errors that do not have the OpenAI shape.
        on_error: is called with the error of each refused request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed: Collection[str],
        error_bodies: Mapping[str, ErrorBody],
        on_error: Callable[[Exception], None],
    ) -> None:
        self.app = app
        self._allowed = frozenset(origin.encode() for origin in allowed)
        self._error_bodies = error_bodies
        self._on_error = on_error
        self._loopback_hosts: set[bytes] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refused := self._refusal(scope)) is not None:
            self._on_error(refused)
            await refusal(refused, scope["path"], self._error_bodies)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Forbidden | UnsupportedType | None:
        """Why a request is refused; None if it is admitted. Takes about a microsecond."""
        hosts: list[bytes] = []
        origin = site = kind = None
        for name, value in scope["headers"]:
            if name == b"host":
                hosts.append(value)
            elif name == b"origin":
                origin = value
            elif name == b"sec-fetch-site":
                site = value
            elif name == b"content-type":
                kind = value.partition(b";")[0].strip(b" \t").lower()
        if not all(map(self._is_loopback, hosts)):
            return Forbidden(
                "The Host of this request is not a loopback name, so it may come from a web page. Call the server by "
                "127.0.0.1 or localhost, or set auth.mode: open if another server authenticates its callers.",
                None,
                "foreign_host",
            )
        if scope["method"] in _READS:
            return None
        if origin is None:
            foreign = site == b"cross-site"
        else:
            foreign = origin not in self._allowed and not any(origin.endswith(b"://" + host) for host in hosts)
        if foreign:
            return Forbidden(
                "This request comes from a web page of another origin. List the origin in auth.cors_origins if its "
                "pages may call this server.",
                None,
                "foreign_origin",
            )
        if kind in _SENT_WITHOUT_ASKING:
            return UnsupportedType(
                f"A body of type {kind.decode()} may come from a web page. Send the header "
                "'content-type: application/json' (curl does so with --json in place of -d).",
                None,
                "unsupported_type",
            )
        return None

    def _is_loopback(self, host: bytes) -> bool:
        if host in self._loopback_hosts:
            return True
        if _LOOPBACK.fullmatch(host) is None:
            return False
        if len(self._loopback_hosts) < _MAX_HOSTS:
            self._loopback_hosts.add(host)
        return True
