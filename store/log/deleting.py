"""Deletions of one user's memories, each made once under its write id.

All functions run inside a caller's write transaction, under the lock of the user's row.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from store.errors import NotFound
from store.log import audit, reading, receipts, rows, writing
from store.log.schema import memories
from store.log.users import User
from store.records import Filter


def delete(
    connection: Connection, user: User, id: str, *, model_id: int, now: int, write_id: str | None, by: str | None
) -> int:
    """Delete one memory. Returns the user's version after the deletion.

    Raises:
        NotFound: the user has no such memory.
    """

    def make() -> receipts.Answer:
        key = rows.user_key(user.uid, id)
        if reading.by_key(connection, key, model_id, now) is None:
            raise NotFound(f"there is no memory {id!r}", "id")
        writing.delete_memories(connection, user, [key], now)
        audit.write(connection, audit.of_write(user, by, "memories.deleted", [id]), now)
        return [user.version]

    (version,) = receipts.make_once(connection, user.uid, "delete", make, write_id=write_id, now=now)
    return int(version)


def delete_many(
    connection: Connection,
    user: User,
    ids: Sequence[str],
    *,
    model_id: int,
    now: int,
    write_id: str | None,
    by: str | None,
) -> tuple[int, list[str]]:
    """Delete the memories with these ids, each given once. Returns how many there were, and the ids of no memory."""

    def make() -> receipts.Answer:
        keys = [rows.user_key(user.uid, id) for id in ids]
        found = reading.by_keys(connection, keys, model_id, now)
        if found:
            writing.delete_memories(connection, user, [key for key in keys if key in found], now)
            deleted = [id for id, key in zip(ids, keys, strict=True) if key in found]
            audit.write(connection, audit.of_write(user, by, "memories.deleted", deleted), now)
        return [len(found), [n for n, key in enumerate(keys) if key not in found]]

    deleted, missing = receipts.make_once(connection, user.uid, "delete_many", make, write_id=write_id, now=now)
    if deleted + len(missing) != len(ids):
        raise receipts.write_id_reused()
    return int(deleted), [ids[n] for n in missing]


def delete_where(
    connection: Connection,
    user: User,
    filter: Filter,
    *,
    model_id: int,
    now: int,
    write_id: str | None,
    by: str | None,
) -> int:
    """Delete the memories that match a checked filter. Returns their number."""

    def make() -> receipts.Answer:
        ids = reading.matching(connection, user.uid, memories.c.id, filter=filter, model=model_id, now=now)
        if ids:
            writing.delete_memories(connection, user, [rows.user_key(user.uid, id) for id in ids], now)
            audit.write(connection, audit.of_write(user, by, "memories.deleted", ids), now)
        return [len(ids)]

    (deleted,) = receipts.make_once(connection, user.uid, "delete_where", make, write_id=write_id, now=now)
    return int(deleted)


def erase(connection: Connection, user: User, *, now: int, write_id: str | None, by: str | None) -> tuple[int, int]:
    """Delete everything of a user. Returns the number of its memories, and its version after the erasure."""

    def make() -> receipts.Answer:
        erased, changed = writing.erase_user(connection, user, now)
        if by is not None and changed:
            audit.write(connection, [audit.NewEvent(user.tenant, by, "user.deleted", None, None, erased)], now)
        return [erased, user.version]

    deleted, version = receipts.make_once(connection, user.uid, "erase", make, write_id=write_id, now=now)
    return int(deleted), int(version)
