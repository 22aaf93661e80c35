"""The erasure of rows of `contents`, and copies of rows in their place.

Guarantees: after the transaction no page of the database holds an erased value. On PostgreSQL that is so once the table
is vacuumed. On SQLite rows are overwritten in place with blanks of the same size, since the copies that SQLite leaves
behind when it moves or shrinks a row are not overwritten: see `schema.contents`.

All functions run inside a caller's write transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    bindparam,
    delete,
    func,
    insert,
    literal,
    literal_column,
    select,
    update,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.types import BigInteger, LargeBinary, String

from store.log.schema import CHUNK, contents, memories, meta

_SIZE = f"(length({contents.name}.text) + length({contents.name}.metadata) + length({contents.name}.embedding) + 30)"
BLANK_SPACE = literal_column(f"4096 * ({_SIZE} / 4096) + 4096 / max(1, 4088 / ({_SIZE} % 4096 + 4))", BigInteger)
"""SQLite: the bytes that a blank row takes in pages of 4 KiB. A row of 2.1 kB takes a page: no second one fits."""

_WRITTEN = contents.c.blank == literal_column("0")
_BLANK = (
    update(contents)
    .values(
        blank=1,
        text=func.printf("%*s", func.length(sql_cast(contents.c.text, LargeBinary)), ""),
        metadata=func.printf("%*s", func.length(sql_cast(contents.c.metadata, LargeBinary)), ""),
        embedding=func.zeroblob(func.length(contents.c.embedding)),
    )
    .returning(BLANK_SPACE)
)
_COUNT = update(meta).where(meta.c.name == "erased_bytes")
_ERASED = select(sql_cast(meta.c.value, BigInteger)).where(meta.c.name == "erased_bytes")
_COPIED = ("uid", "version", "model", "vector_crc", "text", "metadata", "embedding")


def erase_contents(connection: Connection, which: ColumnElement[bool]) -> int:
    """Erase the text, metadata and vector of the rows that meet a condition. Returns the number of rows."""
    if connection.dialect.name == "postgresql":
        return connection.execute(delete(contents).where(which)).rowcount
    spaces = connection.execute(_BLANK.where(which, _WRITTEN)).scalars().all()
    count_erased(connection, sum(spaces))
    return len(spaces)


def count_erased(connection: Connection, bytes: int) -> None:
    """SQLite: add to the space that blank rows take."""
    if bytes:
        connection.execute(_COUNT.values(value=sql_cast(sql_cast(meta.c.value, BigInteger) + bytes, String)))


def erased_bytes(connection: Connection) -> int:
    """SQLite: the space that blank rows take."""
    return int(connection.execute(_ERASED).scalar_one())


_CURRENT = (
    select(contents.c.cid)
    .join(memories, (memories.c.uid == contents.c.uid) & (memories.c.version == contents.c.version))
    .where(memories.c.key.in_(bindparam("keys", expanding=True)), _WRITTEN, func.length(contents.c.embedding) > 0)
)


def erase_vectors(connection: Connection, keys: Sequence[bytes]) -> None:
    """Erase the vectors of the current states of memories, which are about to be superseded."""
    for start in range(0, len(keys), CHUNK):
        cids = connection.execute(_CURRENT, {"keys": keys[start : start + CHUNK]}).scalars().all()
        if not cids:
            continue
        if connection.dialect.name == "postgresql":
            connection.execute(update(contents).where(contents.c.cid.in_(cids)).values(vector_crc=0, embedding=b""))
        else:
            replace(connection, cids, with_vectors=False)


def replace(connection: Connection, cids: Sequence[int], *, with_vectors: bool) -> None:
    """SQLite: copy rows to the end of the table, then erase the originals.

    The copies are blank at first: two written rows of one state would violate the unique index. The database copies the
    values without decoding them, so damaged rows are copied as they are.
    """
    newest = connection.execute(select(func.max(contents.c.cid))).scalar_one()
    values: dict[str, ColumnElement[Any]] = {name: contents.c[name] for name in _COPIED}
    if not with_vectors:
        values |= {"vector_crc": literal(0), "embedding": literal(b"")}
    originals = select(literal(1), *values.values()).where(contents.c.cid.in_(cids)).order_by(contents.c.cid)
    connection.execute(insert(contents).from_select(["blank", *values], originals))
    erase_contents(connection, contents.c.cid.in_(cids))
    connection.execute(update(contents).where(contents.c.cid > newest).values(blank=0))
