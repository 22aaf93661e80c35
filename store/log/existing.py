"""What the log holds already of the memories that a batch of appends brings: one look-up for all of them."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

from sqlalchemy import Connection, bindparam, func, select

from store.log.schema import CHUNK, history, memories
from store.log.users import User
from store.log.writing import bury


@dataclass(frozen=True, slots=True)
class State:
    """What an append needs to know of the memory that has an id, before it or after an earlier request of its batch."""

    id: str
    version: int
    digest: bytes
    expires_at: int | None
    deleted_at: int | None
    first: int  # version of its oldest state; of a memory that was known before this batch, only where its id was made


# Statements that every batch runs are made once: making one costs more than running it.
_STATE = (
    memories.c.key,
    memories.c.uid,
    memories.c.id,
    memories.c.version,
    memories.c.content_hash,
    memories.c.expires_at,
    memories.c.deleted,
    memories.c.updated_at,
)
_BY_KEYS = select(*_STATE).where(memories.c.key.in_(bindparam("wanted", expanding=True)))
_BY_HASHES = (
    select(*_STATE)
    .where(memories.c.content_hash.in_(bindparam("wanted", expanding=True)))
    .order_by(memories.c.uid, memories.c.version)
)

_OLDEST = (
    select(memories.c.key, func.min(history.c.version))
    .join(history, history.c.label == memories.c.label)
    .where(memories.c.key.in_(bindparam("wanted", expanding=True)))
    .group_by(memories.c.key)
)


def states(
    connection: Connection, keys: Set[bytes], hashes: Set[bytes], users: dict[int, User], now: int
) -> tuple[dict[bytes, State], dict[bytes, list[str]]]:
    """The memories that have these keys, or these content hashes; and the ids of the latter by content hash.

    A memory that has expired but is not purged yet is deleted on the way.

    Args:
        users: by uid, locked; whose memories they are.
    """
    known: dict[bytes, State] = {}
    twins: dict[bytes, list[str]] = {}
    for statement, wanted in ((_BY_KEYS, list(keys)), (_BY_HASHES, list(hashes))):
        for start in range(0, len(wanted), CHUNK):
            rows = connection.execute(statement, {"wanted": wanted[start : start + CHUNK]}).all()
            for key, uid, id, version, digest, expires_at, deleted, at in rows:
                if not deleted and expires_at is not None and expires_at <= now:
                    bury(connection, users[uid], [key], now)
                    if key in keys:
                        known[key] = State(id, users[uid].version, b"", None, expires_at, version)
                else:
                    known[key] = State(id, version, digest, expires_at, at if deleted else None, version)
                    if statement is _BY_HASHES:
                        twins.setdefault(digest, []).append(id)
    return known, twins


def find_oldest(connection: Connection, known: dict[bytes, State], keys: Set[bytes]) -> None:
    """Set `first` of those states that have one of these keys. No statement where none has."""
    wanted = [key for key in known if key in keys]
    for start in range(0, len(wanted), CHUNK):
        for key, version in connection.execute(_OLDEST, {"wanted": wanted[start : start + CHUNK]}):
            known[key] = replace(known[key], first=version)
