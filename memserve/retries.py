"""When a request is sent again: the rules, without waiting and without sending.

- A request is sent again after 429 and 503, not before the time that `Retry-After` asks for, and after a connection was
  refused or lost. A write carries the same key each time, so the server makes it once.
- It is given up when the next attempt could not begin before the timeout. After `CONNECTION_ATTEMPTS` attempts without
  an answer the server is taken to be away.
- Waiting times vary at random, so that clients that were refused at the same time do not come back at the same time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from memserve.errors import MemserveError, NotReached, RateLimited, TimedOut, Unavailable

CONNECTION_ATTEMPTS = 5
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0
JITTER = 0.25


class Retries:
    """The attempts of one request.

    Args:
        timeout_s: the time for all attempts together; None for no limit.
        clock: seconds, monotonic.
        chance: a number in [0, 1).
    """

    def __init__(
        self,
        timeout_s: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._clock = clock
        self._chance = chance
        self._deadline = None if timeout_s is None else clock() + timeout_s
        self._attempts = 0
        self._unanswered = 0

    @property
    def remaining_s(self) -> float | None:
        """The time that is left for the next attempt; None for no limit."""
        return None if self._deadline is None else max(0.001, self._deadline - self._clock())

    def delay_s(self, error: MemserveError) -> float:
        """The time to wait before the next attempt. Raises the error if there should not be one."""
        self._attempts += 1
        if isinstance(error, NotReached) and not isinstance(error, TimedOut):
            self._unanswered += 1
            if self._unanswered == CONNECTION_ATTEMPTS:
                raise error
        elif not isinstance(error, RateLimited | Unavailable):
            raise error
        delay = error.retry_after_s
        if delay is None:
            delay = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (self._attempts - 1))
        delay *= 1 + JITTER * self._chance()
        if self._deadline is not None and self._clock() + delay >= self._deadline:
            raise error
        return delay
