"""One check of readiness for all probes of a gateway.

Guarantees: one check at a time is in progress, and its answer is kept for `KEPT_S`. So probes, which need no key, cost
the store and the embedder a fixed amount of work, however many there are. A probe that is cancelled ends no check.
What is lost or comes back meanwhile is seen after `KEPT_S`.
"""

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Sequence

KEPT_S = 1.0

Reasons = Sequence[str]


class SharedCheck:
    """A check that callers share. Belongs to one event loop.

    Args:
        check: what is missing; nothing if all is ready. It runs in the context of no request, so it has no deadline.
        clock: seconds, monotonic.
    """

    def __init__(self, check: Callable[[], Awaitable[Reasons]], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._check = check
        self._clock = clock
        self._found: Reasons = ()
        self._kept_until = -float("inf")
        self._running: asyncio.Task[Reasons] | None = None

    async def __call__(self) -> Reasons:
        """What is missing, as of at most `KEPT_S` ago. Raises what the check raises."""
        if self._clock() < self._kept_until:
            return self._found
        if self._running is None:
            loop = asyncio.get_running_loop()
            self._running = loop.create_task(self._run(), context=contextvars.Context())
        return await asyncio.shield(self._running)

    async def _run(self) -> Reasons:
        try:
            self._found = await self._check()
        finally:
            self._running = None
        self._kept_until = self._clock() + KEPT_S
        return self._found
