"""Where a write comes from: what makes it the same write when it arrives a second time.

A write is sent again by HAProxy when a gateway dies with it, by the gateway when a store dies with it, and by a client
that got no answer and gave it an `Idempotency-Key`. The log remembers under its write id what was done, and answers the
second time as it did the first.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Protocol

from deployments.errors import InvalidRequest

HEADER = "x-memserve-request"
"""What HAProxy puts into every request: microseconds since 1970 and a UUID, `1795373580195616-e0b1a45e-...`."""

KEY_HEADER = "idempotency-key"
MAX_KEY_LENGTH = 255


class Headers(Protocol):
    """Those of Starlette."""

    def getlist(self, key: str) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Origin:
    """Of one write.

    Attributes:
        write_id: 32 hexadecimal digits, the same however often the write is sent.
        issued_at: when it was sent, for the first time if that is known: what was deleted later stays deleted.
        has_key: its client named it, and may send it again as a request with a time of its own.
    """

    write_id: str
    issued_at: datetime
    has_key: bool = False

    @classmethod
    def fresh(cls) -> Origin:
        """Of a write that nobody will send again."""
        return cls(uuid.uuid4().hex, datetime.now(UTC))

    @classmethod
    def of_key(cls, key: str, *write: str | bytes) -> Origin:
        """Of a write that its client named.

        Args:
            key: the client's.
            write: all that says what is asked for. Another write under the same key is another write.

        Raises:
            InvalidRequest: the key is empty, too long or not printable ASCII.
        """
        if not (0 < len(key) <= MAX_KEY_LENGTH and key.isascii() and key.isprintable()):
            raise InvalidRequest(
                f"An idempotency key is 1 to {MAX_KEY_LENGTH} printable ASCII characters.", "Idempotency-Key"
            )
        return cls(_digest(key, *write), datetime.now(UTC), has_key=True)

    @classmethod
    def of_request(cls, headers: Headers, method: str, target: str, body: bytes = b"") -> Origin:
        """Of a write that came over HTTP, by its key or else by what HAProxy calls it.

        Args:
            target: path and query, as they were sent.

        Raises:
            InvalidRequest: the key is empty, too long or not printable ASCII, or there are two.
        """
        keys = headers.getlist(KEY_HEADER)
        if len(keys) > 1:
            raise InvalidRequest("Idempotency-Key is given twice.", "Idempotency-Key")
        now = datetime.now(UTC)
        # A client may send the header too: HAProxy adds its own behind it.
        named = headers.getlist(HEADER)[-1:]
        issued_at = min(now, _time_in(named[0]) or now) if named else now
        if keys:
            return replace(cls.of_key(keys[0], method, target, body), issued_at=issued_at)
        return cls(_digest(named[0]) if named else uuid.uuid4().hex, issued_at)

    def memory_id(self, number: int) -> str:
        """The id of the write's n-th memory, where it has none of its own: a UUID."""
        return str(uuid.UUID(_digest(self.write_id, str(number)), version=4))


def _time_in(value: str) -> datetime | None:
    digits = value.partition("-")[0]
    if not (digits.isdecimal() and digits.isascii() and len(digits) <= 16):
        return None
    return datetime.fromtimestamp(0, UTC) + timedelta(microseconds=int(digits))


def _digest(*parts: str | bytes) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8))  # so that "ab", "c" is not "a", "bc"
        digest.update(data)
    return digest.hexdigest()
