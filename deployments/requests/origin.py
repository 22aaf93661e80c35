"""The origin of a write, by which the log recognises a write that arrives a second time.

HAProxy resends a write if the gateway that had it dies, the gateway resends it if a store dies, and a client may resend
it with the same `Idempotency-Key` if it got no answer. The log records the result of the write under its write id, and
answers a resent write with that result.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Protocol

from deployments.errors import InvalidRequest

HEADER = "x-memserve-request"
"""HAProxy adds this header to every request: microseconds since 1970 and a UUID, `1795373580195616-e0b1a45e-...`."""

KEY_HEADER = "idempotency-key"
MAX_KEY_LENGTH = 255


class Headers(Protocol):
    """The headers of a request, as Starlette gives them."""

    def getlist(self, key: str) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of one write.

    Attributes:
        write_id: 32 hexadecimal digits, the same however often the write is sent.
        issued_at: when the write was first sent, if that is known. The write does not bring back anything that was
            deleted after this time.
        has_key: the client gave an idempotency key, and may send the write again as a request with another time.
    """

    write_id: str
    issued_at: datetime
    has_key: bool = False

    @classmethod
    def fresh(cls) -> Origin:
        """The origin of a write that will not be resent."""
        return cls(uuid.uuid4().hex, datetime.now(UTC))

    @classmethod
    def of_key(cls, realm: str, key: str, *write: str | bytes) -> Origin:
        """The origin of a write to which the client gave an idempotency key.

        Args:
            realm: of the principal. The keys of two realms never meet.
            key: the client's key.
            write: everything that tells this write from others under the same key.

        Raises:
            InvalidRequest: the key is empty, too long or not printable ASCII.
        """
        if not (0 < len(key) <= MAX_KEY_LENGTH and key.isascii() and key.isprintable()):
            raise InvalidRequest(f"must be 1 to {MAX_KEY_LENGTH} printable ASCII characters", "Idempotency-Key")
        return cls(_digest(realm, key, *write), datetime.now(UTC), has_key=True)

    @classmethod
    def of_request(cls, realm: str, headers: Headers, method: str, target: str, body: bytes = b"") -> Origin:
        """The origin of a write that came over HTTP, by its idempotency key if it has one, else by HAProxy's header.

        Args:
            realm: of the principal. A client that reaches a gateway directly can choose HAProxy's header, too.
            target: path and query, as they were sent.

        Raises:
            InvalidRequest: the key is empty, too long or not printable ASCII, or given twice.
        """
        keys = headers.getlist(KEY_HEADER)
        if len(keys) > 1:
            raise InvalidRequest("must not be given twice", "Idempotency-Key")
        now = datetime.now(UTC)
        # If a client sends the header too, HAProxy adds its own behind the client's.
        proxied = headers.getlist(HEADER)[-1:]
        issued_at = min(now, _time_in(proxied[0]) or now) if proxied else now
        if keys:
            return replace(cls.of_key(realm, keys[0], method, target, body), issued_at=issued_at)
        return cls(_digest(realm, proxied[0]) if proxied else uuid.uuid4().hex, issued_at)

    def memory_id(self, number: int) -> str:
        """A UUID for the write's n-th memory, if the caller gave no id. It is the same when the write is resent."""
        return str(uuid.UUID(_digest(self.write_id, str(number)), version=4))


def request_id_is_missing(headers: Headers, own_port: int | None) -> bool:
    """Whether a request came through HAProxy without the header that HAProxy should add.

    Args:
        own_port: the port on which this process took the request. A request whose Host names it is a direct probe of
            this process and needs no header; nor does one without a Host, which cannot be told from it.
    """
    hosts = headers.getlist("host")
    direct = not hosts or hosts[-1].rpartition(":")[2] == str(own_port)
    return not direct and not headers.getlist(HEADER)


def _time_in(value: str) -> datetime | None:
    digits = value.partition("-")[0]
    if not (digits.isdecimal() and digits.isascii() and len(digits) <= 16):
        return None
    return datetime.fromtimestamp(0, UTC) + timedelta(microseconds=int(digits))


def _digest(*parts: str | bytes) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8))  # so that ("ab", "c") and ("a", "bc") differ
        digest.update(data)
    return digest.hexdigest()
