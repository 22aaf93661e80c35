"""The audit: who wrote which memories, who made or revoked a key, and which requests were refused.

Guarantees:
- The event of a write is committed in the transaction of the write: there are both or neither. A write that changes
  nothing leaves no event, and one that is sent again leaves no second one.
- An event holds ids, numbers and times, and no text, metadata or vector.
- Events are only added, until they are as old as the log is told to keep them. If a user is erased, its events lose the
  ids of the user and of its memories. Their times, keys, actions and counts stay.
- Who reads page after page from a cursor misses no event, and sees none twice. No reader makes a writer wait, and no
  writer a reader.

What may be lost: refusals, which each gateway counts and writes later.

An event names at most `IDS` memories. A larger write leaves several events.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import orjson
from sqlalchemy import Connection, delete, insert, select, text, update

from store.errors import InvalidInput
from store.log.database import Log
from store.log.listing import check_limit, decode_cursor, encode_cursor
from store.log.rows import damaged, micros, moment
from store.log.schema import events, keys, users
from store.log.users import User
from store.records import Action, Event, EventsPage, Refusals

IDS = 100
NO_TENANT = ""  # of refused requests that came with no tenant's key; a tenant has at least one character
_MINUTE_US = 60_000_000
_DAY_US = 86_400_000_000
_REMOVED = 1000  # events a step


class NewEvent(NamedTuple):
    """A row of `events` that is to be added."""

    tenant: str
    key_id: str | None
    action: Action
    uid: int | None
    ids: Sequence[str] | None
    number: int


def of_write(user: User, by: str | None, action: Action, ids: Sequence[str]) -> list[NewEvent]:
    """The events of a write of some memories of one user; none if no key asked for it or it changed nothing."""
    if by is None:
        return []
    parts = (ids[start : start + IDS] for start in range(0, len(ids), IDS))
    return [NewEvent(user.tenant, by, action, user.uid, part, len(part)) for part in parts]


def write(connection: Connection, new: Iterable[NewEvent], now: int) -> None:
    """Add events, in the transaction of what they are about."""
    rows = [
        {
            "at": now,
            "tenant": event.tenant,
            "key_id": event.key_id,
            "action": event.action,
            "uid": event.uid,
            "ids": None if event.ids is None else orjson.dumps(list(event.ids)).decode(),
            "count": event.number,
        }
        for event in new
    ]
    _insert(connection, rows)


def _insert(connection: Connection, rows: list[dict[str, Any]]) -> None:
    if rows:
        if connection.dialect.name == "postgresql":
            connection.execute(_BEGIN_WRITING)
        connection.execute(insert(events), rows)


def forget_user(connection: Connection, uid: int) -> int:
    """Remove the ids of a user, and of its memories, from its events. Returns the number of these events."""
    return connection.execute(update(events).where(events.c.uid == uid).values(uid=None, ids=None)).rowcount


def write_refusals(connection: Connection, refusals: Sequence[Refusals]) -> None:
    """Add refused requests. If only an id of a key is known, they belong to the tenant of that key, if there is one."""
    ids = {refusal.key_id for refusal in refusals if refusal.tenant is None and refusal.key_id is not None}
    owners: dict[str, str] = {}
    if ids:
        known = connection.execute(select(keys.c.id, keys.c.tenant).where(keys.c.id.in_(ids)))
        owners = {id: tenant for id, tenant in known}
    counts: dict[tuple[int, str, str | None, int, str | None], int] = {}
    for refusal in refusals:
        at = micros(refusal.at, "at")
        tenant = refusal.tenant if refusal.tenant is not None else owners.get(refusal.key_id or "", NO_TENANT)
        key_id = None if tenant == NO_TENANT else refusal.key_id  # no row for each id that a caller invents
        equal = at - at % _MINUTE_US, tenant, key_id, refusal.status, refusal.code
        counts[equal] = counts.get(equal, 0) + refusal.count
    rows = [
        {"at": at, "tenant": tenant, "key_id": key_id, "action": "request.refused", "status": status, "code": code}
        | {"count": count}
        for (at, tenant, key_id, status, code), count in counts.items()
    ]
    _insert(connection, rows)


_PAGE = (select(events, users.c.user_id).select_from(events.outerjoin(users, users.c.uid == events.c.uid))).order_by(
    events.c.eid
)


def page(log: Log, tenant: str, limit: int, after: str | None) -> EventsPage:
    """One page of a tenant's events, the oldest first.

    Raises:
        InvalidInput: the limit is not in 1 to 1000, or `after` is no cursor of events.
    """
    first = 0
    if after is not None:
        try:
            (first,) = decode_cursor(after, "events", (int,))
        except InvalidInput as error:
            raise error.at("after") from error
    statement = _PAGE.where(events.c.tenant == tenant, events.c.eid > first).limit(check_limit(limit) + 1)
    if log.path is None:
        with log.read() as connection:
            statement = statement.where(events.c.eid <= _last_complete(connection))
    with log.read() as connection:
        found = connection.execute(statement).all()
    shown = found[:limit]
    cursor = encode_cursor("events", [shown[-1].eid]) if shown else after
    return EventsPage([_event(row) for row in shown], cursor, len(found) > limit)


# PostgreSQL numbers an event before its transaction is committed. So a page could hold event 12 while event 11 is not
# committed yet, and the next page would begin after 12. Therefore a transaction says, before it adds its first event,
# which number was the last one then: it holds a shared advisory lock with that number, for which nobody ever waits. A
# reader shows no event above the smallest of these numbers.
_LOCKS = 1_163_284_558  # an arbitrary number that no other program should use for its advisory locks
_NUMBERS = 1 << 31  # numbers that a lock can tell apart
_LAST = "SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END AS number FROM events_eid_seq"
_BEGIN_WRITING = text(
    f"SELECT pg_advisory_xact_lock_shared({_LOCKS}, (number % {_NUMBERS})::int) FROM ({_LAST}) AS last"
)
_WRITING = text(
    "SELECT objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND granted "
    f"AND classid::bigint = {_LOCKS} AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


def _last_complete(connection: Connection) -> int:
    """PostgreSQL: a number up to which all events are committed. The caller must begin its own transaction after it."""
    last = int(connection.execute(text(_LAST)).scalar_one())  # before the locks are read: see above
    writing = connection.execute(_WRITING).scalars().all()
    return min([last, *(last - (last - number) % _NUMBERS for number in writing)])


def _event(row: Any) -> Event:
    try:
        ids = () if row.ids is None else tuple(orjson.loads(row.ids))
    except ValueError as error:
        raise damaged(f"the ids of an event are not JSON ({error})") from error
    return Event(moment(row.at), row.action, row.key_id, row.user_id, ids, row.count, row.status, row.code)


def remove_outdated(log: Log, now: int, keep_days: int) -> bool:
    """Remove some events that are older than `keep_days`. Returns True if there may be more.

    They are removed in the order in which they were added, so one that was added while a clock was ahead keeps later
    ones for as long.
    """
    with log.read() as connection:
        oldest = connection.execute(select(events.c.eid, events.c.at).order_by(events.c.eid).limit(_REMOVED)).all()
    before = now - keep_days * _DAY_US
    outdated = 0
    for _, at in oldest:
        if at >= before:
            break
        outdated += 1
    if outdated:
        with log.write() as connection:
            connection.execute(delete(events).where(events.c.eid <= oldest[outdated - 1].eid))
    return outdated == _REMOVED
