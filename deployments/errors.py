"""One error tree, and one table from it to HTTP.

    MemserveError                   500  server_error
    ├── InvalidRequest              400  invalid_request_error, `param` names the field
    ├── NotFound                    404  not_found_error
    ├── Conflict                    409  conflict_error
    ├── TooLarge                    413  invalid_request_error
    ├── Overloaded                  429  rate_limit_error, with Retry-After
    ├── EmbeddingFailed             500  server_error: this input failed alone, or its vector is not finite
    ├── Unavailable                 503  unavailable_error, with Retry-After
    │   ├── ModelUnavailable        503  the model cannot be loaded; the message is one line for an operator
    │   └── ShuttingDown            503  this process ends before the work's turn came
    └── UpstreamFailed              502, 503 or 504  upstream_error, with the upstream's message

The errors of the package store/ stand in the same table. Every error takes positional arguments and passes them to
`super().__init__`, so that it survives pickling between replicas.
"""

from __future__ import annotations

from typing import NamedTuple

import store.errors as store_errors

MAX_SAID = 1_024  # characters of a message or of a path on the wire: a name in it may be as long as the body it came in


class MemserveError(store_errors.LocatedError):
    """Root of the tree."""


class InvalidRequest(MemserveError):
    """The request can never succeed as it stands."""


class NotFound(MemserveError):
    """Not there, or another tenant's or user's."""


class Conflict(MemserveError):
    """The state of the log contradicts the request."""


class TooLarge(MemserveError):
    """The body is larger than the server reads."""


class EmbeddingFailed(MemserveError):
    """The model failed on this input alone, or made a vector that is not finite."""


class Overloaded(MemserveError):
    """More work waits than is admitted. `retry_after_s` is the time in which the queue is expected to drain."""

    def __init__(
        self,
        message: str,
        field: str | None = None,
        code: str | None = "overloaded",
        position: int | None = None,
        retry_after_s: float = 1.0,
    ) -> None:
        super().__init__(message, field, code, position, retry_after_s)
        self.retry_after_s = retry_after_s


class Unavailable(MemserveError):
    """A part that the request needs is not there at the moment. Safe to retry after `retry_after_s`."""

    def __init__(
        self,
        message: str,
        field: str | None = None,
        code: str | None = "unavailable",
        position: int | None = None,
        retry_after_s: float = 1.0,
    ) -> None:
        super().__init__(message, field, code, position, retry_after_s)
        self.retry_after_s = retry_after_s


class ModelUnavailable(Unavailable):
    """The model cannot be loaded: not there, not readable, or not a model."""


class ShuttingDown(Unavailable):
    """This process ends before the work's turn came: nothing of it was done, and another process may do it."""


class UpstreamFailed(MemserveError):
    """A remote embedding provider failed. `status` is what the caller is answered: 502, 503 or 504."""

    def __init__(
        self,
        message: str,
        field: str | None = None,
        code: str | None = "upstream_failed",
        position: int | None = None,
        status: int = 502,
    ) -> None:
        super().__init__(message, field, code, position, status)
        self.status = status


class HttpError(NamedTuple):
    """What an exception becomes on the wire."""

    status: int
    type: str
    message: str
    param: str | None
    code: str | None
    retry_after_s: float | None

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error shape."""
        param = None if self.param is None else _cut(self.param)
        return {"error": {"message": _cut(self.message), "type": self.type, "param": param, "code": self.code}}


def _cut(said: str) -> str:
    return said if len(said) <= MAX_SAID else said[: MAX_SAID - 1] + "…"


# Most specific first: the first class that matches wins.
_TABLE: tuple[tuple[type[Exception], int, str], ...] = (
    (InvalidRequest, 400, "invalid_request_error"),
    (NotFound, 404, "not_found_error"),
    (Conflict, 409, "conflict_error"),
    (TooLarge, 413, "invalid_request_error"),
    (Overloaded, 429, "rate_limit_error"),
    (EmbeddingFailed, 500, "server_error"),
    (Unavailable, 503, "unavailable_error"),
    (UpstreamFailed, 502, "upstream_error"),
    (store_errors.InvalidInput, 400, "invalid_request_error"),
    (store_errors.NotFound, 404, "not_found_error"),
    (store_errors.ModelMismatch, 409, "conflict_error"),
    (store_errors.Conflict, 409, "conflict_error"),
    (store_errors.LogUnavailable, 503, "unavailable_error"),
    (store_errors.StoreError, 500, "server_error"),
    (MemserveError, 500, "server_error"),
)


def to_http(error: Exception) -> HttpError:
    """Map any exception to what its caller is answered; an unknown one becomes a 500 that tells nothing inner."""
    for cls, status, kind in _TABLE:
        if isinstance(error, cls):
            return HttpError(
                getattr(error, "status", status),
                kind,
                getattr(error, "message", str(error)),
                getattr(error, "param", None),
                getattr(error, "code", None),
                getattr(error, "retry_after_s", 1.0 if status == 503 else None),
            )
    return HttpError(500, "server_error", "The server failed on this request.", None, "internal_error", None)
