"""The keys of tenants, and the audit of what their keys did.

Guarantees: the secret of a key is in the answer of the call that makes it and nowhere else; the log holds its hash. A
key that was revoked is found by no later call. An event is written in the transaction of the write that it tells of.
Refused requests are counted by their callers, and lost with them if they were not recorded yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime

from store.log import audit, rows
from store.log.cursors import Cursors
from store.log.database import Log
from store.log.keys import Keys
from store.records import Credential, EventsPage, Key, KeysPage, NewKey, Refusals, Scope


class Access:
    """The part of a store that is about keys. Its calls need no vectors.

    Args:
        audited: whether events are recorded.
        most_keys: that a tenant may have, if one of its keys asks for another; None for no limit.
        now: the clock.
    """

    def __init__(self, log: Log, *, audited: bool, most_keys: int | None, now: Callable[[], datetime]) -> None:
        self.log = log
        self._now = now
        self._audited = audited
        self._most_keys = most_keys
        self._keys = Keys(log)
        self._cursors = Cursors(log.log_id)

    def create_key(
        self,
        tenant: str,
        *,
        user_id: str | None = None,
        scopes: Sequence[Scope] = ("read", "write"),
        label: str | None = None,
        expires_at: datetime | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        by: str | None = None,
    ) -> NewKey:
        """Make a key of a tenant. Its secret is in this answer and nowhere else.

        Args:
            user_id: the only user that the key reaches. With None it reaches all users of the tenant.
            label: 1 to 200 printable characters.
            expires_at: with None, the key can be used until it is revoked.
            requests_per_minute, tokens_per_minute: with None, the key has the limits of the settings.
            by: the id of the key that asks for it, for the audit; None if no key does.

        Raises:
            InvalidInput: `field` is the name of the argument.
            QuotaExceeded: a key asks for it, and the tenant has as many keys as it may.
        """
        return self._keys.create(
            tenant,
            self._micros(),
            user_id=user_id,
            scopes=scopes,
            label=label,
            expires_at=expires_at,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            by=by,
            most=None if by is None else self._most_keys,
        )

    def find_keys(self, credentials: Sequence[Credential]) -> Sequence[Key | None]:
        """The key of each credential, in order; None if there is none, or if it was revoked or has expired.

        Background steps save the minute in which a key was found last.
        """
        return self._keys.find(credentials, self._micros())

    def keys(self, tenant: str, *, limit: int = 100, cursor: str | None = None) -> KeysPage:
        """One page of a tenant's keys, those that were revoked or have expired included, the newest first.

        Raises:
            InvalidInput: the limit is not from 1 to 1000, or the cursor belongs to another list.
        """
        page = self._keys.page(tenant, limit, self._cursors.open(cursor, "keys", tenant))
        return replace(page, next_cursor=self._cursors.seal(page.next_cursor, "keys", tenant))

    def revoke_key(self, tenant: str, id: str, *, by: str | None = None) -> Key:
        """Revoke a key of a tenant: it is not found from then on. If it is revoked already, nothing changes.

        Args:
            by: the id of the key that asks for it, for the audit; None if no key does.

        Raises:
            NotFound: the tenant has no such key.
        """
        return self._keys.revoke(tenant, id, self._micros(), by)

    def record_refusals(self, refusals: Sequence[Refusals]) -> None:
        """Add refused requests to the audit, each minute's equal ones as one event."""
        if self._audited and refusals:
            with self.log.write() as connection:
                audit.write_refusals(connection, refusals)

    def events(self, tenant: str, *, limit: int = 100, after: str | None = None) -> EventsPage:
        """One page of a tenant's events, the oldest first.

        Args:
            after: the `next_cursor` of the page before.

        Raises:
            InvalidInput: the limit is not from 1 to 1000, or `after` is no cursor of events.
        """
        page = audit.page(self.log, tenant, limit, self._cursors.open(after, "events", tenant, field="after"))
        return replace(page, next_cursor=self._cursors.seal(page.next_cursor, "events", tenant))

    def _micros(self) -> int:
        return rows.micros(self._now(), "now")
