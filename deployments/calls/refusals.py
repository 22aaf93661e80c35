"""The refused requests of a gateway, which are counted here and then written to the audit.

Guarantees: counting a refusal takes about a microsecond and waits for nothing. Equal refusals of a minute are one row,
unless the tenant reads its audit meanwhile. A gateway has about `MAX_KINDS` rows to write, so that nobody can fill the
disk with them: the other refusals of a tenant are counted without the key. What one tenant does changes nothing in the
rows of another, except beyond that number. A request that is cancelled while it reads the audit loses no refusal.

What may be lost: the refusals of the last two minutes, if the process ends; and older ones, if the log cannot be
written all the while. Refusals may be counted twice if a store replica ends just after it has written them.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any

from deployments.errors import HttpError, MemserveError
from store import Refusals, StoreError

REFUSED = frozenset({401, 403, 429})
"""The statuses that are recorded."""

WRITE_S = 60.0
"""The time between two writes, while anything is refused."""
MAX_KINDS = 1_000

logger = logging.getLogger("memserve.audit")

_Kind = tuple[datetime, str | None, str | None, int, str | None]


class RefusedRequests:
    """Counts of refusals that are yet to be written. Belongs to one event loop.

    Args:
        write: adds refusals to the audit.
        now: the time.
    """

    def __init__(
        self,
        write: Callable[[Sequence[Refusals]], Awaitable[None]],
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._write = write
        self._now = now
        self._counts: dict[_Kind, int] = {}
        self._later: asyncio.TimerHandle | None = None
        self._writing: set[asyncio.Task[None]] = set()

    def count(self, tenant: str | None, key_id: str | None, error: HttpError) -> None:
        """Count a refusal, if it is one that is recorded.

        Args:
            tenant: of the key; None if the key is not known.
            key_id: the id of the key that was sent, if one was.
        """
        if error.status not in REFUSED:
            return
        minute = self._minute()
        kind = minute, tenant, key_id, error.status, error.code
        if kind not in self._counts and len(self._counts) >= MAX_KINDS:
            kind = minute, tenant, None, error.status, error.code
            if kind not in self._counts and len(self._counts) >= 2 * MAX_KINDS:
                return
        self._counts[kind] = self._counts.get(kind, 0) + 1
        self._write_later()

    async def flush(self, tenant: str) -> None:
        """Write what was counted of a tenant so far, and in minutes that are over of unknown keys, which may be its.

        If the caller is cancelled, they are written all the same. Raises as `flush_past` does.
        """
        minute = self._minute()
        writing = self._flush(lambda kind: kind[1] == tenant or (kind[1] is None and kind[0] < minute))
        await asyncio.shield(self._start(writing))

    async def flush_past(self) -> None:
        """Write what was counted in minutes that are over.

        Raises:
            StoreError, MemserveError: the log cannot be written. The counts are kept.
        """
        minute = self._minute()
        await self._flush(lambda kind: kind[0] < minute)

    async def _flush(self, wanted: Callable[[_Kind], bool]) -> None:
        counts = {kind: count for kind, count in self._counts.items() if wanted(kind)}
        if not counts:
            return
        self._counts = {kind: count for kind, count in self._counts.items() if kind not in counts}
        refusals = [
            Refusals(at, tenant, key_id, status, code, count)
            for (at, tenant, key_id, status, code), count in counts.items()
        ]
        try:
            await self._write(refusals)
        except (Exception, asyncio.CancelledError):
            for kind, count in counts.items():
                if kind in self._counts or len(self._counts) < MAX_KINDS:
                    self._counts[kind] = self._counts.get(kind, 0) + count
            self._write_later()
            raise

    def _start(self, writing: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task of its own, which is kept until it ends."""
        task = asyncio.get_running_loop().create_task(writing)
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return task

    def _minute(self) -> datetime:
        return self._now().replace(second=0, microsecond=0)

    def _write_later(self) -> None:
        if self._later is None:
            # In the context of no request: its deadline and its caller would be those of the write.
            self._later = asyncio.get_running_loop().call_later(WRITE_S, self._write_now, context=contextvars.Context())

    def _write_now(self) -> None:
        self._later = None
        self._start(self._flush_or_keep())

    async def _flush_or_keep(self) -> None:
        try:
            await self.flush_past()
        except (StoreError, MemserveError) as error:
            logger.warning("Refused requests could not be written to the audit, and are kept: %s", error)
        if self._counts:
            self._write_later()
