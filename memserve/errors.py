"""The errors of the client. They are the same over HTTP, over a Ray handle and in process.

    MemserveError
    ├── NotReached           no answer: the server refused or lost the connection; a write may have been made
    │   └── TimedOut         no answer in the time that the client waits
    ├── BadRequest           400  the request can never succeed; `param` names the field
    │   └── TooLarge         413  the body is larger than the server reads
    ├── Unauthorized         401  no key, or an unknown one
    ├── Forbidden            403  the key does not allow the request
    ├── NotFound             404  no such memory, user or model
    ├── Conflict             409  the request contradicts what is stored
    ├── RateLimited          429  too much work is queued; `retry_after_s`
    └── ServerError          5xx  the server failed
        ├── Unavailable      503  a part of the server is not available at the moment; `retry_after_s`
        └── DeadlineExceeded 504  the request was queued until its deadline, or a remote model did not answer in time

`NotReached`, `RateLimited` and `Unavailable` are raised after the client has tried again in vain. Every error survives
pickling: it takes positional arguments and passes them to `super().__init__`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class MemserveError(Exception):
    """Root of the tree.

    Args:
        message: one sentence. It begins with the path of the invalid field, if there is one.
        status: of the HTTP answer, or the one that HTTP would have; None without an answer.
        param: the path of the invalid field (`memories.3.text`), if there is one.
        code: a stable name of the reason, if there is one.
        retry_after_s: the time after which the server asked to try again.
    """

    def __init__(
        self,
        message: str,
        status: int | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, status, param, code, retry_after_s)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message

    def in_piece(self, first: int) -> MemserveError:
        """The same error about a list of which the request held a piece that began at the item `first`."""
        name, _, rest = (self.param or "").partition(".")
        position, dot, field = rest.partition(".")
        if not position.isdecimal():
            return self
        param = f"{name}.{int(position) + first}{dot}{field}"
        message = param + self.message.removeprefix(str(self.param))
        return type(self)(message, self.status, param, self.code, self.retry_after_s)


class NotReached(MemserveError):
    """The server refused or lost the connection. A write may have been made."""


class TimedOut(NotReached):
    """The server did not answer in the time that the client waits. A write may have been made."""


class BadRequest(MemserveError):
    """The request can never succeed as it stands."""


class TooLarge(BadRequest):
    """The body is larger than the server reads."""


class Unauthorized(MemserveError):
    """The request has no key, or an unknown one."""


class Forbidden(MemserveError):
    """The key does not allow the request."""


class NotFound(MemserveError):
    """There is no such memory, user or model."""


class Conflict(MemserveError):
    """The request contradicts what is stored."""


class RateLimited(MemserveError):
    """More work is queued than the server admits, or the caller is over a limit."""


class ServerError(MemserveError):
    """The server failed."""


class Unavailable(ServerError):
    """A part of the server that the request needs is not available at the moment."""


class DeadlineExceeded(ServerError):
    """The request was still queued when its deadline passed. Nothing of it was done."""


_BY_STATUS: Mapping[int, type[MemserveError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    429: RateLimited,
    503: Unavailable,
    504: DeadlineExceeded,
}


def of_status(status: int, body: Any, retry_after_s: float | None = None) -> MemserveError:
    """The error of an answer with this status.

    Args:
        body: the answer's JSON. If it has not the shape of memserve's errors, it is not used.
    """
    kind = _BY_STATUS.get(status, BadRequest if status < 500 else ServerError)
    detail = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(detail, Mapping):
        return kind(f"The server answered with status {status}.", status, None, None, retry_after_s)
    message = str(detail.get("message"))
    return kind(message, status, detail.get("param"), detail.get("code"), retry_after_s)
