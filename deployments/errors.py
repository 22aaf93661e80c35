"""The errors of the deployments, the one table from errors to HTTP, and how an error gets the path of its field.

    MemserveError                   500  server_error
    ├── InvalidRequest              400  invalid_request_error
    ├── Unauthorized                401  authentication_error, with WWW-Authenticate
    ├── Forbidden                   403  permission_error
    ├── ModelNotFound               404  not_found_error
    ├── TooSlow                     408  timeout_error
    ├── TooLarge                    413  invalid_request_error
    ├── UnsupportedEncoding         415  invalid_request_error
    ├── UnsupportedType             415  invalid_request_error
    ├── Overloaded                  429  rate_limit_error, with Retry-After
    ├── RateLimited                 429  the same: a key has used its limit a minute
    ├── DeadlineExceeded            504  timeout_error: the request was still queued when its deadline passed
    ├── EmbeddingFailed             500  server_error: the model failed on this input alone, or its vector is not finite
    ├── Unavailable                 503  unavailable_error, with Retry-After
    │   ├── ModelUnavailable        503  the model cannot be loaded; the message is one line for an operator
    │   └── ShuttingDown            503  this process ended before it began the work
    └── UpstreamFailed              502, 503 or 504  upstream_error, with the upstream's message

The errors of the package store/ are in the same table. Every error takes positional arguments and passes them to
`super().__init__`, so that it survives pickling between replicas.

Code below the service raises errors with the position of an item in the list that it was given, and the field within
the item. If that list was made from another one, `renumbered` gives the error the position in the other list. `located`
turns position and field into the path in the caller's request, once, in the service or the route.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import store.errors as store_errors
from store.errors import LocatedError

MAX_CHARACTERS = 1_024  # of a message, and of a path, on the wire: a path may be as long as the body that it comes from


class MemserveError(LocatedError):
    """Root of the tree."""


class InvalidRequest(MemserveError):
    """The request can never succeed as it stands."""


class Unauthorized(MemserveError):
    """The request carries no key, or one that cannot be used."""


class Forbidden(MemserveError):
    """The caller may not make this request."""


class ModelNotFound(MemserveError):
    """The request names a model that is not served here."""


class TooSlow(MemserveError):
    """The body does not arrive in time."""


class TooLarge(MemserveError):
    """The body is larger than the server reads."""


class UnsupportedEncoding(MemserveError):
    """The body is compressed in a way that the server does not read."""


class UnsupportedType(MemserveError):
    """The body has a content type that the server does not read."""


class EmbeddingFailed(MemserveError):
    """The model failed on this input alone, or made a vector that is not finite."""


class Overloaded(MemserveError):
    """More work is queued than is admitted. `retry_after_s` is the time until the queue is expected to be empty."""

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


class RateLimited(MemserveError):
    """A key has used its limit of requests or tokens a minute. `retry_after_s` is the time until it may ask again."""

    def __init__(
        self,
        message: str,
        field: str | None = None,
        code: str | None = "rate_limit_exceeded",
        position: int | None = None,
        retry_after_s: float = 1.0,
    ) -> None:
        super().__init__(message, field, code, position, retry_after_s)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(MemserveError):
    """The work was still queued when its deadline passed. Nothing of it was done."""

    def __init__(
        self,
        message: str,
        field: str | None = None,
        code: str | None = "deadline_exceeded",
        position: int | None = None,
    ) -> None:
        super().__init__(message, field, code, position)


class Unavailable(MemserveError):
    """A part of the server that the request needs is not available at the moment.

    The request is safe to retry after `retry_after_s`, unless `code` is `OUTCOME_UNKNOWN`.
    """

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
    """The model cannot be loaded: it is missing, not readable, or not a model."""


class ShuttingDown(Unavailable):
    """This process ended before it began the work. Nothing of it was done, and another process may do it."""


class UpstreamFailed(MemserveError):
    """A remote embedding provider failed. `status` is the HTTP status for the caller: 502, 503 or 504."""

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


@contextmanager
def renumbered(positions: Sequence[int], field: str | None = None) -> Iterator[None]:
    """A context for a call with items from a longer list: changes an error's position n to `positions[n]` of that list.

    Args:
        field: the field of the longer list's items that the call was given, if it was not given whole items.
    """
    try:
        yield
    except LocatedError as error:
        if error.position is None:
            raise
        raise error.at(_joined(field, error.field), positions[error.position]) from error


@contextmanager
def located(name: str, *, in_list: bool = True, beside: Collection[str] = ()) -> Iterator[None]:
    """A context for a call with the items of a request: turns the position and the field of an error into its path.

    Args:
        name: the field of the request that holds the items; empty if one item is the request itself.
        in_list: the request holds a list: `memories.3.text`. If not, it holds one item: `input`, or `text`.
        beside: fields next to the list, which the request has once for all items.
    """
    try:
        yield
    except LocatedError as error:
        if error.position is None:
            raise
        if error.field in beside:
            raise error.at(error.field) from error
        raise error.at(_joined(name, str(error.position) if in_list else None, error.field)) from error


def _joined(*parts: str | None) -> str | None:
    return ".".join(part for part in parts if part) or None


class HttpError(NamedTuple):
    """The answer that an exception becomes. `message` is without the path, which `param` holds."""

    status: int
    type: str
    message: str
    param: str | None
    code: str | None
    retry_after_s: float | None

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error shape. The message begins with the path."""
        message, param = _shortened(self.message), None
        if self.param is not None:
            param = _shortened(self.param)
            message = f"{param}: {message}"
        return {"error": {"message": message, "type": self.type, "param": param, "code": self.code}}


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"


# Most specific first: the first class that matches wins.
_TABLE: tuple[tuple[type[Exception], int, str], ...] = (
    (InvalidRequest, 400, "invalid_request_error"),
    (Unauthorized, 401, "authentication_error"),
    (Forbidden, 403, "permission_error"),
    (ModelNotFound, 404, "not_found_error"),
    (TooSlow, 408, "timeout_error"),
    (TooLarge, 413, "invalid_request_error"),
    (UnsupportedEncoding, 415, "invalid_request_error"),
    (UnsupportedType, 415, "invalid_request_error"),
    (Overloaded, 429, "rate_limit_error"),
    (RateLimited, 429, "rate_limit_error"),
    (DeadlineExceeded, 504, "timeout_error"),
    (EmbeddingFailed, 500, "server_error"),
    (Unavailable, 503, "unavailable_error"),
    (UpstreamFailed, 502, "upstream_error"),
    (store_errors.InvalidInput, 400, "invalid_request_error"),
    (store_errors.NotFound, 404, "not_found_error"),
    (store_errors.ModelMismatch, 409, "conflict_error"),
    (store_errors.Conflict, 409, "conflict_error"),
    (store_errors.QuotaExceeded, 403, "permission_error"),
    (store_errors.LogUnavailable, 503, "unavailable_error"),
    (store_errors.StoreError, 500, "server_error"),
    (MemserveError, 500, "server_error"),
)


def trace_of(error: BaseException) -> str:
    """The traceback of an error and its causes, for a log.

    Without the messages of errors that are not ours, and without source lines: they may hold a caller's text.
    """
    lines: list[str] = []
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        message = f": {cause}" if isinstance(cause, LocatedError) else ""
        lines.append(f"{type(cause).__module__}.{type(cause).__qualname__}{message}")
        frames = traceback.extract_tb(cause.__traceback__)
        lines += [f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}' for frame in frames]
        cause = cause.__cause__ or cause.__context__
    return "\n".join(lines)


def to_http(error: Exception) -> HttpError:
    """Map an exception to the answer of its caller. An unknown one becomes a 500 that reveals nothing about it."""
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
