"""Pages of memories, of their states, and of users.

Each page begins after the last key of the one before, so others may write meanwhile. A page of texts holds at least
one, and ends early once they have PAGE_BYTES.

A cursor is opaque to callers but not secret: it holds the key of the last row of its page.
"""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import Generator, Iterable
from contextlib import closing
from typing import Any, NamedTuple

import orjson
from sqlalchemy import Connection, and_, literal_column, select, tuple_

from store.errors import InvalidInput
from store.log.filter_sql import condition
from store.log.reading import contents_of, with_names
from store.log.rows import CONTENT, moment
from store.log.schema import contents, history, memories, not_expired, users
from store.records import Filter, HistoryEvent, Order

_ORDERS: dict[str, tuple[Any, Any]] = {
    "created_at": (memories.c.created_at, memories.c.label),
    "updated_at": (memories.c.updated_at, memories.c.version),  # an import keeps times, and may give new versions
}
_STATS = (users.c.uid, users.c.user_id, users.c.live, users.c.version, users.c.text_bytes)
MAX_PAGE = 1000
PAGE_BYTES = 16 << 20  # of the texts and metadata of a page, as characters
_STREAMED = {"stream_results": True, "max_row_buffer": 50}  # PostgreSQL would send all rows of a page at once
_LAST = chr(sys.maxunicode) * 256  # a suffix that sorts after every other


def page_of_memories(
    connection: Connection,
    uid: int,
    *,
    model: int,
    limit: int,
    cursor: str | None,
    filter: Filter | None,
    order: Order,
    now: int,
) -> tuple[list[Any], str | None]:
    """Rows of CONTENT for a user's memories, and the cursor of the next page.

    Raises:
        InvalidInput: the limit is not in 1 to 1000, the order is unknown, or the cursor belongs to another order.
    """
    descending, name = order.startswith("-"), order.removeprefix("-")
    if name not in _ORDERS:
        raise InvalidInput("must be created_at, -created_at, updated_at or -updated_at", "order")
    keys = _ORDERS[name]
    kind = f"{order},version" if name == "updated_at" else order  # cursors of `updated_at` held versions alone before
    statement = select(*CONTENT).select_from(with_names(model))
    statement = statement.where(memories.c.uid == uid, memories.c.deleted == 0, not_expired(memories.c.expires_at, now))
    if filter is not None:
        statement = statement.where(condition(filter, connection.dialect.name))
    if cursor is not None:
        after = decode_cursor(cursor, kind, (int, int))
        here = tuple_(*keys)
        statement = statement.where(here < tuple_(*after) if descending else here > tuple_(*after))
    statement = statement.order_by(*(key.desc() if descending else key for key in keys)).limit(check_limit(limit) + 1)
    with connection.execute(statement.execution_options(**_STREAMED)) as rows:
        found, has_more = _page(rows, limit)
    if not has_more:
        return found, None
    last = found[-1]
    key = [last.created_at, last.label] if name == "created_at" else [last.updated_at, last.version]
    return found, encode_cursor(kind, key)


def page_of_states(
    connection: Connection, key: bytes, *, limit: int, cursor: str | None, now: int
) -> tuple[list[HistoryEvent], str | None]:
    """States of one memory, oldest first, and the cursor of the next page.

    There are none if there never was such a memory, or if it has expired and was not removed yet.

    Raises:
        InvalidInput: the limit is not in 1 to 1000, or the cursor belongs to another list.
    """
    after = 0 if cursor is None else decode_cursor(cursor, "history", (int,))[0]
    check_limit(limit)
    current = select(
        memories.c.label, memories.c.uid, memories.c.version, memories.c.event, memories.c.updated_at
    ).where(memories.c.key == key, not_expired(memories.c.expires_at, now))
    newest = connection.execute(current).first()
    if newest is None:
        return [], None
    with closing(_states(connection, newest, after)) as states:
        found, has_more = _page(states, limit)
    events = [
        HistoryEvent(event, moment(at), version, text, None if metadata is None else orjson.loads(metadata))
        for version, event, at, text, metadata in found
    ]
    return events, encode_cursor("history", [events[-1].version]) if has_more else None


class _State(NamedTuple):
    version: int
    event: Any
    at: int
    text: str | None
    metadata: str | None


def _states(connection: Connection, newest: Any, after: int) -> Generator[_State]:
    """The states of a memory above a version, oldest first. `newest` is the current one."""
    written = and_(
        contents.c.uid == history.c.uid,
        contents.c.version == history.c.version,
        contents.c.blank == literal_column("0"),
    )
    superseded = (
        select(history.c.version, history.c.event, history.c.at, contents.c.text, contents.c.metadata)
        .select_from(history.outerjoin(contents, written))
        .where(history.c.label == newest.label, history.c.version > after)
        .order_by(history.c.version)
    )
    with connection.execute(superseded.execution_options(**_STREAMED)) as rows:
        for row in rows:
            if row.version > after:  # while a log is moved to another model, a state may have two rows
                after = row.version
                yield _State(*row)
    if newest.version > after:
        content = contents_of(connection, newest.uid, [newest.version]).get((newest.uid, newest.version), (None, None))
        yield _State(newest.version, newest.event, newest.updated_at, *content)


def _page(rows: Iterable[Any], limit: int) -> tuple[list[Any], bool]:
    """The first rows, at most `limit` and about PAGE_BYTES, and whether there are more. Reads no more than it must."""
    found: list[Any] = []
    size = 0
    for row in rows:
        if len(found) == limit or size >= PAGE_BYTES:
            return found, True
        found.append(row)
        size += len(row.text or "") + len(row.metadata or "")
    return found, False


def page_of_users(
    connection: Connection, tenant: str, *, prefix: str, limit: int, cursor: str | None
) -> tuple[list[Any], str | None]:
    """Rows (uid, user_id, live, version, text_bytes) of users with memories, by id, and the cursor of the next page."""
    statement = select(*_STATS).where(users.c.tenant == tenant, users.c.live > 0)
    if prefix:
        statement = statement.where(users.c.user_id >= prefix, users.c.user_id < prefix + _LAST)
    if cursor is not None:
        statement = statement.where(users.c.user_id > decode_cursor(cursor, "users", (str,))[0])
    found = list(connection.execute(statement.order_by(users.c.user_id).limit(check_limit(limit) + 1)))
    more = len(found) > limit
    found = found[:limit]
    return found, encode_cursor("users", [found[-1].user_id]) if more else None


def one_user(connection: Connection, uid: int) -> Any:
    """The row (uid, user_id, live, version, text_bytes) of a user."""
    return connection.execute(select(*_STATS).where(users.c.uid == uid)).one()


def check_limit(limit: int) -> int:
    """The limit, if it is in 1 to 1000."""
    if not isinstance(limit, int) or not 1 <= limit <= MAX_PAGE:
        raise InvalidInput(f"must be an integer in 1 to {MAX_PAGE}", "limit")
    return limit


def encode_cursor(kind: str, key: list[Any]) -> str:
    """The cursor after the row with this key, in the list of this kind."""
    return base64.urlsafe_b64encode(orjson.dumps([kind, *key])).decode().rstrip("=")


def decode_cursor(cursor: str, kind: str, types: tuple[type, ...]) -> list[Any]:
    """The key that `encode_cursor` put into a cursor.

    Raises:
        InvalidInput: the cursor belongs to a list of another kind, or its key does not have these types.
    """
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        found_kind, *key = orjson.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, TypeError, binascii.Error) as error:
        raise InvalidInput("is not a cursor of this server", "cursor") from error
    well_formed = len(key) == len(types) and all(
        type(part) is expected for part, expected in zip(key, types, strict=True)
    )
    if found_kind != kind or not well_formed or not all(_is_comparable(part) for part in key):
        raise InvalidInput("was made for another list", "cursor")
    return key


def _is_comparable(part: int | str) -> bool:
    """Whether both databases can compare a key with this value."""
    return "\0" not in part if isinstance(part, str) else -(2**63) <= part < 2**63
