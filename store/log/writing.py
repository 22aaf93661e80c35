"""Every change of memories, in statements whose number does not grow with users or requests.

Guarantees: a row and the version that stamps it are written in one transaction, under the lock of the user's row; each
row of a user has a version of its own, and the user's version is the newest of them. So a reader that knows version v
asks for `version > v` and gets exactly what it lacks.

All functions run inside a caller's write transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    LargeBinary,
    Update,
    bindparam,
    delete,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from store.log import receipts
from store.log.schema import CHUNK, contents, history, memories
from store.log.users import User


class Said(Protocol):
    """What a row of `contents` is made from."""

    @property
    def text(self) -> str | None: ...
    @property
    def metadata(self) -> str: ...
    @property
    def embedding(self) -> bytes: ...
    @property
    def vector_crc(self) -> int: ...


class blanked(FunctionElement[Any]):
    """A value that says nothing, of the same size in SQLite's record, so that it takes the place of the old one."""

    inherit_cache = True


@compiles(blanked)
def _empty(element: blanked, compiler: SQLCompiler, **options: Any) -> str:
    return "''"


@compiles(blanked, "sqlite")
def _same_size(element: blanked, compiler: SQLCompiler, **options: Any) -> str:
    (column,) = element.clauses
    value = compiler.process(column, **options)
    if isinstance(column.type, LargeBinary):
        return f"zeroblob(length({value}))"
    return f"printf('%*s', length(CAST({value} AS BLOB)), '')"


_BLANK = update(contents).values(
    blank=1,
    vector_crc=contents.c.vector_crc,
    text=blanked(contents.c.text),
    metadata=blanked(contents.c.metadata),
    embedding=blanked(contents.c.embedding),
)


def blank(which: ColumnElement[bool]) -> Update:
    """Overwrite what the rows of `contents` say that meet a condition."""
    return _BLANK.where(which, contents.c.blank == literal_column("0"))


_KEEP_STATE = insert(history).from_select(
    ["label", "version", "uid", "event", "at"],
    select(memories.c.label, memories.c.version, memories.c.uid, memories.c.event, memories.c.updated_at).where(
        memories.c.key == bindparam("of_key")
    ),
)
_CHANGED = ("version", "event", "updated_at", "expires_at", "deleted", "content_hash")
_CHANGE = (
    update(memories)
    .where(memories.c.key == bindparam("of_key"))
    .values({memories.c[name]: bindparam(name) for name in _CHANGED})
    .values(created_at=func.coalesce(bindparam("born_at", type_=BigInteger), memories.c.created_at))
)
_BURY = (
    update(memories)
    .where(memories.c.key == bindparam("of_key"))
    .values(
        version=bindparam("version"),
        updated_at=bindparam("updated_at"),
        event="deleted",
        deleted=1,
        expires_at=None,
        content_hash=literal(b""),
    )
)
_BLANK_STATES = _BLANK.where(
    contents.c.uid == bindparam("of_uid"),
    contents.c.blank == literal_column("0"),
    contents.c.version.in_(
        select(history.c.version).where(
            history.c.label == select(memories.c.label).where(memories.c.key == bindparam("of_key")).scalar_subquery()
        )
    ),
)


def content_of(memory: Said, uid: int, version: int, model: int) -> dict[str, Any]:
    """The row of `contents` that holds what a memory says."""
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
    """Give memories that exist a new state, keeping the old one in the history. Each key at most once."""
    if rows:
        connection.execute(_KEEP_STATE, [{"of_key": row["of_key"]} for row in rows])
        connection.execute(_CHANGE, rows)


def write_contents(connection: Connection, rows: list[dict[str, Any]]) -> None:
    """Add what new states say."""
    if rows:
        connection.execute(insert(contents), rows)


def bury(connection: Connection, user: User, keys: Sequence[bytes], now: int) -> None:
    """Delete live memories of one user: what all their states say, with every vector; a tombstone stays."""
    for start in range(0, len(keys), CHUNK):
        part = [{"of_key": key} for key in keys[start : start + CHUNK]]
        connection.execute(_KEEP_STATE, part)
        connection.execute(_BLANK_STATES, [{**row, "of_uid": user.uid} for row in part])
        connection.execute(_BURY, [{**row, "version": user.stamp(), "updated_at": now} for row in part])
    user.live -= len(keys)
    user.removed_version = user.version


def erase(connection: Connection, user: User, now: int) -> int:
    """Delete everything of a user but its row. Returns how many live memories there were."""
    forget(connection, user)
    erased, user.live = user.live, 0
    user.removed_version = user.stamp()
    user.epoch += 1
    user.erased_at = now
    return erased


def forget(connection: Connection, user: User) -> None:
    """Remove every state of a user's memories, what they say, and what the records of writes say of them."""
    receipts.forget(connection, user.uid)
    connection.execute(blank(contents.c.uid == user.uid))
    for table in (history, memories):
        connection.execute(delete(table).where(table.c.uid == user.uid))


def or_never(column: Any, now: Any) -> Any:
    """Condition: the time in `column` is not over, or there is none."""
    return or_(column.is_(None), column > now)
