"""What the transports without HTTP have in common: the server's methods are called in Python, and raise its errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deployments.errors import LocatedError, to_http
from deployments.requests.origin import Origin
from memserve.errors import of_status
from memserve.requests import Request
from store import DEFAULT_TENANT

TIMED = frozenset({"add", "add_many", "embed", "rerank", "search"})
"""The methods that take `timeout_s`."""


def options_of(request: Request, timeout_s: float | None, tenant: str = DEFAULT_TENANT) -> dict[str, Any]:
    """The keyword arguments of the method that a request names.

    A write has an origin by which the log recognises it if it is sent again.
    """
    options = dict(request.options)
    if tenant != DEFAULT_TENANT:
        options["tenant"] = tenant
    if request.key is not None:
        options["origin"] = origin_of(request, tenant)
    if request.name in TIMED:
        options["timeout_s"] = timeout_s
    return options


def origin_of(request: Request, tenant: str = DEFAULT_TENANT) -> Origin:
    """The origin of a write."""
    return Origin.of_key(tenant, str(request.key), request.name)


@contextmanager
def reported() -> Iterator[None]:
    """A context for a call: the server's errors become the client's, as they would over HTTP."""
    try:
        yield
    except LocatedError as error:
        found = to_http(error)
        raise of_status(found.status, found.body(), found.retry_after_s) from error
