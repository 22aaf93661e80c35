"""The time in which a caller wants an answer: what is still queued when it has passed is dropped, not done.

A write that has been sent to the store may be made and answered after its deadline, since it cannot be taken back. An
import whose deadline passes keeps the lines that were written before. An export whose deadline passes after it has
begun ends in the middle, as a broken connection.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from deployments.errors import InvalidRequest
from deployments.fair_queue import deadline_of_request
from deployments.requests.origin import Headers

HEADER = "x-request-timeout-ms"
MAX_TIMEOUT_MS = 86_400_000  # a day


def deadline_in(headers: Headers) -> float | None:
    """The deadline that a request's header gives, from now on, on this process's `time.monotonic`; None without one.

    Raises:
        InvalidRequest: the header is not a whole number from 1 to `MAX_TIMEOUT_MS`, or is given twice.
    """
    given = headers.getlist(HEADER)
    if len(given) > 1:
        raise InvalidRequest("must not be given twice", HEADER)
    if not given:
        return None
    digits = given[0]
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 20 and 1 <= int(digits) <= MAX_TIMEOUT_MS):
        raise InvalidRequest(f"must be a whole number from 1 to {MAX_TIMEOUT_MS}", HEADER)
    return time.monotonic() + int(digits) / 1e3


@contextmanager
def within(timeout_s: float | None) -> Iterator[None]:
    """A context for one handle call: its work has to be begun in this time, from now on; None for no limit.

    Raises:
        InvalidRequest: `timeout_s` is not a positive number.
    """
    if timeout_s is None:
        yield
        return
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
        raise InvalidRequest("must be a positive number", "timeout_s")
    with until(time.monotonic() + timeout_s):
        yield


@contextmanager
def until(deadline: float | None) -> Iterator[None]:
    """A context for work that has this deadline, on this process's `time.monotonic`; None for no deadline."""
    token = deadline_of_request.set(deadline)
    try:
        yield
    finally:
        deadline_of_request.reset(token)
