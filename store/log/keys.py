"""Keys: which tenant a caller belongs to, which user it is bound to, and what it may do.

Guarantees:
- The log holds the SHA-256 of a key, and never the key. `create` returns the key once.
- A key that was revoked or has expired is not found from then on. Its row stays, so that lists show it.
- Digests are compared in constant time. A row is looked up by the key's public id, which is no secret.

What may be lost: the last minute in which a key was used, if the process dies before its next background step.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, func, select, update

from store.errors import InvalidInput, NotFound, QuotaExceeded
from store.log import audit, rows
from store.log.database import Log
from store.log.listing import check_limit, decode_cursor, encode_cursor
from store.log.schema import CHUNK, keys
from store.records import SCOPES, Credential, Key, KeysPage, NewKey, Scope

_ID = re.compile(r"[0-9a-f]{16}")
_KEY = re.compile(rf"ms_({_ID.pattern})_[0-9a-f]{{64}}")
_NO_DIGEST = bytes(32)  # is compared if there is no row, so that an unknown id takes as long as a wrong secret
_MAX_LABEL = 200  # characters
MAX_PER_MINUTE = 1_000_000_000
_MINUTE_US = 60_000_000

_SAVE_USE = (
    update(keys)
    .where(keys.c.kid == bindparam("of_kid"), keys.c.revoked_at.is_(None))
    .values(used_at=bindparam("minute"))
)


_COUNT = (
    select(func.count())
    .select_from(keys)
    .where(keys.c.tenant == bindparam("of_tenant"), keys.c.revoked_at.is_(None))
    .where(keys.c.expires_at.is_(None) | (keys.c.expires_at > bindparam("now")))
)


def credential_of(key: str) -> Credential | None:
    """The public id and the digest of a key as a caller sends it; None if it does not have the form of a key."""
    match = _KEY.fullmatch(key)
    return None if match is None else Credential(match[1], hashlib.sha256(key.encode()).digest())


class Keys:
    """The keys of one store's log. Remembers the uses that are yet to be saved."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._uses: dict[int, int] = {}  # the newest minute, by kid

    def create(
        self,
        tenant: str,
        now: int,
        *,
        user_id: str | None,
        scopes: Sequence[Scope],
        label: str | None,
        expires_at: datetime | None,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        by: str | None,
        most: int | None,
    ) -> NewKey:
        """Make a key.

        Args:
            most: the number of keys, neither revoked nor expired, that the tenant may have; None for no limit.

        Raises:
            InvalidInput: `field` is the name of the argument.
            QuotaExceeded: the tenant has that many.
        """
        rows.check_new_id(tenant, "tenant")
        if user_id is not None:
            rows.check_new_id(user_id, "user_id")
        if label is not None:
            _check_label(label)
        chosen = _checked_scopes(scopes, bound=user_id is not None)
        expires_us = None if expires_at is None else rows.micros(expires_at, "expires_at")
        if expires_us is not None and expires_us <= now:
            raise InvalidInput("must be in the future", "expires_at")
        _check_per_minute(requests_per_minute, "requests_per_minute")
        _check_per_minute(tokens_per_minute, "tokens_per_minute")
        id = secrets.token_hex(8)
        secret = f"ms_{id}_{secrets.token_hex(32)}"
        row = {
            "id": id,
            "digest": hashlib.sha256(secret.encode()).digest(),
            "tenant": tenant,
            "user_id": user_id,
            "scopes": ",".join(chosen),
            "label": label,
            "created_at": now,
            "expires_at": expires_us,
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
        }
        with self._log.write() as connection:
            if most is not None and connection.execute(_COUNT, {"of_tenant": tenant, "now": now}).scalar_one() >= most:
                message = f"A tenant may have {most} keys that can be used: revoke one first."
                raise QuotaExceeded(message, code="quota_exceeded")
            connection.execute(keys.insert(), [row])
            audit.write(connection, [audit.NewEvent(tenant, by, "key.created", None, [id], 1)], now)
            made = connection.execute(select(keys).where(keys.c.id == id)).one()
        return NewKey(_key(made), secret)

    def find(self, credentials: Sequence[Credential], now: int) -> list[Key | None]:
        """The key of each credential, in order; None if there is none, or if it was revoked or has expired."""
        ids = list({credential.id for credential in credentials})
        found: dict[str, Any] = {}
        with self._log.read() as connection:
            for start in range(0, len(ids), CHUNK):
                statement = select(keys).where(keys.c.id.in_(ids[start : start + CHUNK]))
                found.update({row.id: row for row in connection.execute(statement)})
        return [self._usable(found.get(credential.id), credential, now) for credential in credentials]

    def _usable(self, row: Any, credential: Credential, now: int) -> Key | None:
        is_same = hmac.compare_digest(_NO_DIGEST if row is None else row.digest, credential.digest)
        if row is None or not is_same or row.revoked_at is not None:
            return None
        if row.expires_at is not None and row.expires_at <= now:
            return None
        minute = now - now % _MINUTE_US
        if row.used_at is None or row.used_at < minute:
            self._uses[row.kid] = minute
        return _key(row)

    def save_uses(self) -> None:
        """Write the minutes in which keys were used, if there are any that the log does not hold."""
        if not self._uses:
            return
        with self._log.write() as connection:
            connection.execute(_SAVE_USE, [{"of_kid": kid, "minute": at} for kid, at in sorted(self._uses.items())])
        self._uses.clear()

    def page(self, tenant: str | None, limit: int, cursor: str | None) -> KeysPage:
        """One page of a tenant's keys, those that cannot be used any more included, the newest first.

        Args:
            tenant: None for the keys of all tenants, which concern the operator of the log alone.

        Raises:
            InvalidInput: the limit is not in 1 to 1000, or the cursor belongs to another list.
        """
        statement = select(keys)
        if tenant is not None:
            statement = statement.where(keys.c.tenant == tenant)
        if cursor is not None:
            statement = statement.where(keys.c.kid < decode_cursor(cursor, "keys", (int,))[0])
        statement = statement.order_by(keys.c.kid.desc()).limit(check_limit(limit) + 1)
        with self._log.read() as connection:
            found = connection.execute(statement).all()
        following = encode_cursor("keys", [found[limit - 1].kid]) if len(found) > limit else None
        return KeysPage([_key(row) for row in found[:limit]], following)

    def revoke(self, tenant: str | None, id: str, now: int, by: str | None) -> Key:
        """Revoke a key. If it is revoked already, nothing changes.

        Args:
            tenant: None for a key of any tenant.

        Raises:
            NotFound: the tenant has no such key.
        """
        is_it = keys.c.id == id
        if tenant is not None:
            is_it &= keys.c.tenant == tenant
        row = None
        if _ID.fullmatch(id):  # the databases cannot compare every string
            with self._log.write() as connection:
                revoked = update(keys).where(is_it, keys.c.revoked_at.is_(None)).values(revoked_at=now)
                is_new = connection.execute(revoked).rowcount > 0
                row = connection.execute(select(keys).where(is_it)).first()
                if row is not None and is_new:
                    audit.write(connection, [audit.NewEvent(row.tenant, by, "key.revoked", None, [id], 1)], now)
        if row is None:
            raise NotFound(f"there is no key {id!r}", "id")
        return _key(row)


def _check_label(label: str) -> None:
    rows.check_text(label, "label")
    if not 1 <= len(label) <= _MAX_LABEL or not label.isprintable():
        raise InvalidInput(f"must be 1 to {_MAX_LABEL} printable characters", "label")


def _check_per_minute(limit: int | None, field: str) -> None:
    if limit is not None and (type(limit) is not int or not 1 <= limit <= MAX_PER_MINUTE):
        raise InvalidInput(f"must be an integer in 1 to {MAX_PER_MINUTE}", field)


def _checked_scopes(scopes: Sequence[Scope], *, bound: bool) -> tuple[Scope, ...]:
    """The scopes, each once, in the order of SCOPES."""
    if not scopes or isinstance(scopes, str) or not all(scope in SCOPES for scope in scopes):
        raise InvalidInput(f"must be one or more of {', '.join(SCOPES)}", "scopes")
    if bound and "admin" in scopes:
        raise InvalidInput("must not hold admin if the key is bound to a user", "scopes")
    return tuple(scope for scope in SCOPES if scope in scopes)


def _key(row: Any) -> Key:
    expires_at, used_at, revoked_at = (
        None if at is None else rows.moment(at) for at in (row.expires_at, row.used_at, row.revoked_at)
    )
    return Key(
        row.id,
        row.tenant,
        row.user_id,
        tuple(row.scopes.split(",")),
        row.label,
        rows.moment(row.created_at),
        expires_at,
        used_at,
        revoked_at,
        row.requests_per_minute,
        row.tokens_per_minute,
    )
