"""The keys that a gateway has looked up in the log, so that a request rarely waits for it.

Guarantees:
- A key that was revoked is refused at most `FRESH_S` after its revocation, if the log answers within `WAIT_S`. A key in
  use is looked up again after `REFRESH_S`, while its requests go on.
- While the log cannot be asked, a key that was found before can be used on, for at most `UNCHECKED_S`, even if it was
  revoked meanwhile. Other keys are refused with `Unavailable`.
- A key that expires is refused from that moment on, whether the log can be asked or not.
- Memory is bounded. Credentials of no key are remembered apart from keys, so that they displace none. However many of
  them are looked up, keys that were found before are looked up first.

Nothing here is durable: a gateway that starts knows no key.
"""

import asyncio
import contextvars
import hmac
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from deployments.errors import MemserveError, Unavailable, trace_of
from store import Credential, Key, StoreError

logger = logging.getLogger("memserve.keys")

Name = TypeVar("Name")
Value = TypeVar("Value")

FRESH_S = 5.0
REFRESH_S = 2.5
WAIT_S = 2.0
"""The longest time that a request waits for a lookup."""
RETRY_S = 1.0
"""The pause between a lookup that failed and the next one of a key that was found before."""
UNCHECKED_S = 3_600.0
MAX_KEYS = 10_000
MAX_REFUSED = 10_000


@dataclass(slots=True)
class _Found:
    """A key.

    Attributes:
        asked_at: when the lookup began that found it. A key that was revoked before is not found.
        retry_at: it is not looked up before, because a lookup has failed.
    """

    key: Key
    digest: bytes
    asked_at: float
    retry_at: float = 0.0


class _Lookup:
    """A lookup that is in progress, or has ended. Several requests may wait for it.

    Attributes:
        answered: whether the log has answered. If the lookup has ended without an answer, it has failed.
        found: the answer.
    """

    __slots__ = ("answered", "asked_at", "found", "task")

    def __init__(self, asked_at: float) -> None:
        self.asked_at = asked_at
        self.answered = False
        self.found: _Found | None = None
        self.task: asyncio.Task[None] | None = None


class KnownKeys:
    """The keys of one gateway. Belongs to one event loop.

    Args:
        find: asks the log for a key; the second argument says whether it was found before. Lookups that are made at the
            same time should share a call.
        clock: seconds, monotonic.
        now: the time, which says whether a key has expired.
    """

    def __init__(
        self,
        find: Callable[[Credential, bool], Awaitable[Key | None]],
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._find = find
        self._clock = clock
        self._now = now
        self._found: OrderedDict[str, _Found] = OrderedDict()  # by public id
        self._refused: OrderedDict[bytes, float] = OrderedDict()  # digest of no key -> when its lookup began
        self._lookups: dict[bytes, _Lookup] = {}  # in progress, by digest

    async def find(self, credential: Credential) -> Key | None:
        """The key of a credential; None if there is none, or if it was revoked or has expired.

        Raises:
            Unavailable: the key was not found before, and the log cannot be asked.
        """
        found = self._found.get(credential.id)
        if found is None:
            found = await self._find_first(credential)
        elif not hmac.compare_digest(found.digest, credential.digest):
            return None  # an id belongs to one key for ever
        else:
            self._found.move_to_end(credential.id)
            age_s = self._clock() - found.asked_at
            if age_s >= REFRESH_S:
                found = await self._find_again(credential, found, age_s)
        if found is None:
            return None
        expires_at = found.key.expires_at
        return None if expires_at is not None and expires_at <= self._now() else found.key

    def forget(self, id: str) -> None:
        """Look a key up when it is used next."""
        self._found.pop(id, None)

    async def _find_first(self, credential: Credential) -> _Found | None:
        asked_at = self._refused.get(credential.digest)
        if asked_at is not None and self._clock() - asked_at < FRESH_S:
            return None
        lookup = self._look_up(credential, found_before=False)
        await self._wait_for(lookup)
        if not lookup.answered:
            raise _unavailable()
        return lookup.found

    async def _find_again(self, credential: Credential, found: _Found, age_s: float) -> _Found | None:
        if self._clock() >= found.retry_at:
            lookup = self._look_up(credential, found_before=True)
            if age_s >= FRESH_S:
                await self._wait_for(lookup)
                if lookup.answered:
                    return lookup.found
        if age_s >= UNCHECKED_S:
            raise _unavailable()
        return found

    async def _wait_for(self, lookup: _Lookup) -> None:
        """Wait until a lookup ends, or has lasted for `WAIT_S`. It goes on if the request that waits is cancelled."""
        assert lookup.task is not None
        remaining_s = lookup.asked_at + WAIT_S - self._clock()
        if remaining_s > 0:
            await asyncio.wait([lookup.task], timeout=remaining_s)

    def _look_up(self, credential: Credential, *, found_before: bool) -> _Lookup:
        """The lookup of a credential that is in progress, or a new one."""
        lookup = self._lookups.get(credential.digest)
        if lookup is None:
            lookup = self._lookups[credential.digest] = _Lookup(self._clock())
            # It serves several requests, so it runs in the context of none (see Batcher).
            lookup.task = asyncio.get_running_loop().create_task(
                self._ask(credential, lookup, found_before), context=contextvars.Context()
            )
        return lookup

    async def _ask(self, credential: Credential, lookup: _Lookup, found_before: bool) -> None:
        key, failed = None, False
        try:
            key = await self._find(credential, found_before)
        except Exception as error:  # noqa: BLE001 - without the pause, each request would look the key up
            failed = True
            if not isinstance(error, MemserveError | StoreError):  # such as that of a replica of another version
                logger.error("A key could not be looked up\n%s", trace_of(error))
        finally:
            del self._lookups[credential.digest]
        found = self._found.get(credential.id)
        if found is not None and found.digest != credential.digest:
            found = None
        if failed:
            if found is not None:
                found.retry_at = self._clock() + RETRY_S
            return
        lookup.answered = True
        if key is None:
            if found is not None:
                del self._found[credential.id]
            _remember(self._refused, credential.digest, lookup.asked_at, MAX_REFUSED)
        else:
            lookup.found = _Found(key, credential.digest, lookup.asked_at)
            _remember(self._found, credential.id, lookup.found, MAX_KEYS)


def _remember(entries: OrderedDict[Name, Value], name: Name, value: Value, most: int) -> None:
    """Set an entry, as the newest, and drop the oldest ones."""
    entries[name] = value
    entries.move_to_end(name)
    while len(entries) > most:
        entries.popitem(last=False)


def _unavailable() -> Unavailable:
    return Unavailable("The key cannot be looked up at the moment; try again.", None, "keys_unavailable")
