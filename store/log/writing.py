"""Every change of memories, in statements whose number does not grow with users or requests.

Guarantees: a row and the version that stamps it are written in one transaction, under the lock of the user's row. Each
row of a user has a version of its own, and the user's version is the newest of them. So a reader that knows version v
reads `version > v`, which are exactly the rows that it lacks.

All functions run inside a caller's write transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from sqlalchemy import (
    BigInteger,
    Connection,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal,
    literal_column,
    select,
    update,
)

from store.log import audit, receipts
from store.log.erasing import erase_contents, erase_vectors, erasure
from store.log.reading import byte_length
from store.log.schema import CHUNK, contents, history, memories
from store.log.threads import erase_unused_names, threads_of
from store.log.users import User


class Contents(Protocol):
    """The values that a row of `contents` is made from."""

    @property
    def text(self) -> str | None: ...
    @property
    def metadata(self) -> str: ...
    @property
    def embedding(self) -> bytes: ...
    @property
    def vector_crc(self) -> int: ...


_COPY_TO_HISTORY = insert(history).from_select(
    ["label", "version", "uid", "event", "at"],
    select(memories.c.label, memories.c.version, memories.c.uid, memories.c.event, memories.c.updated_at).where(
        memories.c.key == bindparam("of_key")
    ),
)
_CHANGED = ("version", "event", "updated_at", "expires_at", "deleted", "content_hash", "happened_at", "thread")
_CHANGE = (
    update(memories)
    .where(memories.c.key == bindparam("of_key"))
    .values({memories.c[name]: bindparam(name) for name in _CHANGED})
    .values(created_at=func.coalesce(bindparam("new_created_at", type_=BigInteger), memories.c.created_at))
)
_MAKE_TOMBSTONE = (
    update(memories)
    .where(memories.c.key == bindparam("of_key"))
    .values(
        version=bindparam("version"),
        updated_at=bindparam("updated_at"),
        event="deleted",
        deleted=1,
        expires_at=None,
        content_hash=literal(b""),
        happened_at=None,
        thread=None,
    )
)


_LABELS = select(memories.c.label).where(memories.c.key.in_(bindparam("keys", expanding=True)))
_OF_STATES = erasure(
    and_(
        contents.c.uid == bindparam("of_uid"),
        contents.c.version.in_(select(history.c.version).where(history.c.label.in_(_LABELS))),
    )
)
_OF_USER = erasure(contents.c.uid == bindparam("of_uid"))

# A state has a vector of a second model while a log is moved to it, with the same text.
_SIZES = (
    select(func.max(byte_length(contents.c.text) + byte_length(contents.c.metadata)).label("size"))
    .join(memories, (contents.c.uid == memories.c.uid) & (contents.c.version == memories.c.version))
    .where(memories.c.key.in_(bindparam("keys", expanding=True)), contents.c.blank == literal_column("0"))
    .group_by(memories.c.label)
    .subquery()
)
_TEXT_BYTES = select(func.coalesce(func.sum(_SIZES.c.size), 0))


def contents_row(memory: Contents, uid: int, version: int, model: int) -> dict[str, Any]:
    """The row of `contents` for one state of a memory."""
    return {
        "blank": 0,
        "uid": uid,
        "version": version,
        "model": model,
        "vector_crc": memory.vector_crc,
        "text": memory.text,
        "metadata": memory.metadata,
        "embedding": memory.embedding,
    }


def write_changes(connection: Connection, rows: list[dict[str, Any]]) -> None:
    """Give existing memories a new state, and copy the old one to the history, without its vector.

    Each key occurs at most once.
    """
    if rows:
        erase_vectors(connection, [row["of_key"] for row in rows])
        connection.execute(_COPY_TO_HISTORY, [{"of_key": row["of_key"]} for row in rows])
        connection.execute(_CHANGE, rows)


def write_contents(connection: Connection, rows: list[dict[str, Any]]) -> None:
    """Add the contents of new states."""
    if rows:
        connection.execute(insert(contents), rows)


def delete_memories(connection: Connection, user: User, keys: Sequence[bytes], now: int) -> None:
    """Delete live memories of one user: the contents of all their states, with every vector. Tombstones stay.

    The names of threads that no memory is left in go with them.
    """
    threads = threads_of(connection, keys)
    for start in range(0, len(keys), CHUNK):
        part = [{"of_key": key} for key in keys[start : start + CHUNK]]
        user.text_bytes -= int(connection.execute(_TEXT_BYTES, {"keys": keys[start : start + CHUNK]}).scalar_one())
        connection.execute(_COPY_TO_HISTORY, part)
        erase_contents(connection, _OF_STATES, {"of_uid": user.uid, "keys": keys[start : start + CHUNK]})
        connection.execute(_MAKE_TOMBSTONE, [{**row, "version": user.stamp(), "updated_at": now} for row in part])
    erase_unused_names(connection, user.uid, threads)
    user.live -= len(keys)
    user.removed_version = user.version


def erase_user(connection: Connection, user: User, now: int) -> tuple[int, bool]:
    """Delete everything of a user but its row. Returns how many live memories there were, and if there was anything."""
    removed = remove_memories(connection, user)
    removed += audit.forget_user(connection, user.uid)
    erased, user.live, user.text_bytes = user.live, 0, 0
    user.removed_version = user.stamp()
    user.epoch += 1
    user.erased_at = now
    return erased, removed > 0


def remove_memories(connection: Connection, user: User) -> int:
    """Remove every state of a user's memories, their contents, and the answers of writes that name them.

    Returns the number of states.
    """
    receipts.clear_answers(connection, user.uid)
    erase_contents(connection, _OF_USER, {"of_uid": user.uid})
    return sum(
        connection.execute(delete(table).where(table.c.uid == user.uid)).rowcount for table in (history, memories)
    )
