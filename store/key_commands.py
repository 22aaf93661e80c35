"""The work of `memserve keys`: make, list and revoke keys on the log itself, and print the result.

A server may use the log meanwhile. Each gateway refuses a revoked key as soon as it has asked the log again.
All functions raise StoreError if the log cannot be used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from store.log import rows
from store.log.database import Log
from store.log.keys import Keys
from store.records import Key, Scope

_JSON = orjson.OPT_INDENT_2 | orjson.OPT_UTC_Z
_HEADER = ("ID", "TENANT", "USER", "SCOPES", "STATE", "LAST USED", "LABEL")
_PAGE = 1_000


def create(
    url: str,
    tenant: str,
    *,
    user: str | None,
    scopes: Sequence[Scope],
    label: str | None,
    expires: timedelta | None,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    as_json: bool,
) -> str:
    """Make a key, in a log that is made if there is none. Print the key alone, or all that is known of it as JSON.

    Returns:
        a line that describes the key, without the key itself.
    """
    now = datetime.now(UTC)
    with _keys(url, make=True) as keys:
        made = keys.create(
            tenant,
            rows.micros(now, "now"),
            user_id=user,
            scopes=scopes,
            label=label,
            expires_at=None if expires is None else now + expires,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            by=None,
            most=None,
        )
    _print({**asdict(made.key), "key": made.secret} if as_json else made.secret)
    key = made.key
    reach = "all users" if key.user_id is None else f"user {key.user_id}"
    until = "until it is revoked" if key.expires_at is None else f"until {_time(key.expires_at)}"
    return f"key {key.id} of tenant {key.tenant}, for {reach}, with {', '.join(key.scopes)}, {until}"


def show(url: str, tenant: str | None, *, as_json: bool) -> None:
    """Print the keys of a tenant, or of all tenants, the newest first: a table, or JSON."""
    with _keys(url) as keys:
        found = list(_all(keys, tenant))
    if as_json:
        _print([asdict(key) for key in found])
        return
    now = datetime.now(UTC)
    table = [_HEADER, *(_row(key, now) for key in found)]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEADER))]
    for row in table:
        _print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def revoke(url: str, id: str) -> None:
    """Revoke a key of any tenant, and print when it was revoked. Raises NotFound."""
    with _keys(url) as keys:
        key = keys.revoke(None, id, rows.micros(datetime.now(UTC), "now"), None)
    assert key.revoked_at is not None
    _print(f"key {key.id} of tenant {key.tenant} was revoked at {_time(key.revoked_at)}")


@contextmanager
def _keys(url: str, *, make: bool = False) -> Iterator[Keys]:
    log = Log.open(url, make=make)
    try:
        yield Keys(log)
    finally:
        log.close()


def _all(keys: Keys, tenant: str | None) -> Iterator[Key]:
    cursor = None
    while True:
        page = keys.page(tenant, _PAGE, cursor)
        yield from page.keys
        cursor = page.next_cursor
        if cursor is None:
            return


def _row(key: Key, now: datetime) -> tuple[str, ...]:
    if key.revoked_at is not None:
        state = f"revoked {_time(key.revoked_at)}"
    elif key.expires_at is None:
        state = "valid"
    else:
        state = f"{'expired' if key.expires_at <= now else 'valid until'} {_time(key.expires_at)}"
    used = "never" if key.used_at is None else _time(key.used_at)
    return key.id, key.tenant, key.user_id or "(all)", ",".join(key.scopes), state, used, key.label or ""


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M")


def _print(value: Any) -> None:
    print(value if isinstance(value, str) else orjson.dumps(value, option=_JSON).decode())
