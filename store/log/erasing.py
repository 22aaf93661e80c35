"""The erasure of rows of `contents`, and copies of rows in their place.

Guarantees: after the transaction no page of the database holds an erased value. On PostgreSQL that is so once the table
is vacuumed. On SQLite rows are overwritten in place with blanks of the same size, since the copies that SQLite leaves
behind when it moves or shrinks a row are not overwritten: see `schema.contents`.

All functions run inside a caller's write transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Executable,
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

_TEXTS = "length(CAST(contents.text AS BLOB)) + length(CAST(contents.metadata AS BLOB))"
_SIZE = f"({_TEXTS} + length(contents.embedding) + 30)"
BLANK_SPACE = literal_column(f"4096 * ({_SIZE} / 4096) + 4096 / max(1, 4088 / ({_SIZE} % 4096 + 4))", BigInteger)
"""SQLite: the bytes that a row takes in pages of 4 KiB. A row of 2.1 kB takes a page: no second one fits.

Lengths are in bytes, so that a row takes as much before it is blanked as after. Otherwise the sum in `meta` drifts.
"""

_WRITTEN = contents.c.blank == literal_column("0")
_COPIED = ("uid", "version", "model", "vector_crc", "text", "metadata", "embedding")


class Erasure(NamedTuple):
    """A condition on rows of `contents` that are to be erased, as a statement for each database."""

    sqlite: Executable
    postgresql: Executable


def erasure(which: ColumnElement[bool]) -> Erasure:
    """The statements that erase the rows that meet a condition. Build them once: it takes longer than running them."""
    blank = update(contents).where(which, _WRITTEN)
    blank = blank.values(
        blank=1,
        text=func.printf("%*s", func.length(sql_cast(contents.c.text, LargeBinary)), ""),
        metadata=func.printf("%*s", func.length(sql_cast(contents.c.metadata, LargeBinary)), ""),
        embedding=func.zeroblob(func.length(contents.c.embedding)),
    )
    return Erasure(blank.returning(BLANK_SPACE), delete(contents).where(which).returning(contents.c.cid))


_ROWS = contents.c.cid.in_(bindparam("cids", expanding=True))
OF_ROWS = erasure(_ROWS)
"""The rows `cids`."""
_EMPTY_VECTORS = update(contents).where(_ROWS).values(vector_crc=0, embedding=b"")
_ERASED = select(sql_cast(meta.c.value, BigInteger)).where(meta.c.name == "erased_bytes")
_COUNT = (
    update(meta)
    .where(meta.c.name == "erased_bytes")
    .values(value=sql_cast(sql_cast(meta.c.value, BigInteger) + bindparam("more", type_=BigInteger), String))
)
_CURRENT = (
    select(contents.c.cid)
    .join(memories, (memories.c.uid == contents.c.uid) & (memories.c.version == contents.c.version))
    .where(memories.c.key.in_(bindparam("keys", expanding=True)), _WRITTEN, func.length(contents.c.embedding) > 0)
)


def _copy(**instead: ColumnElement[Any]) -> Executable:
    values = {name: instead.get(name, contents.c[name]) for name in _COPIED}
    originals = select(literal(1), *values.values()).where(_ROWS).order_by(contents.c.cid)
    return insert(contents).from_select(["blank", *values], originals).returning(contents.c.cid)


_COPY = _copy()
_COPY_WITHOUT_VECTOR = _copy(vector_crc=literal(0), embedding=literal(b""))
_WRITE_COPIES = update(contents).where(contents.c.cid >= bindparam("first")).values(blank=0)


def erase_contents(connection: Connection, which: Erasure, parameters: dict[str, Any]) -> int:
    """Erase the text, metadata and vector of rows. Returns their number."""
    if connection.dialect.name == "postgresql":
        return len(connection.execute(which.postgresql, parameters).all())
    spaces = connection.execute(which.sqlite, parameters).scalars().all()
    count_erased(connection, sum(spaces))
    return len(spaces)


def count_erased(connection: Connection, bytes: int) -> None:
    """SQLite: add to the space that blank rows take."""
    if bytes:
        connection.execute(_COUNT, {"more": bytes})


def erased_bytes(connection: Connection) -> int:
    """SQLite: the space that blank rows take."""
    return int(connection.execute(_ERASED).scalar_one())


def erase_vectors(connection: Connection, keys: Sequence[bytes]) -> None:
    """Erase the vectors of the current states of memories, which are about to be superseded."""
    for start in range(0, len(keys), CHUNK):
        cids = connection.execute(_CURRENT, {"keys": keys[start : start + CHUNK]}).scalars().all()
        if not cids:
            continue
        if connection.dialect.name == "postgresql":
            connection.execute(_EMPTY_VECTORS, {"cids": cids})
        else:
            replace(connection, cids, with_vectors=False)


def replace(connection: Connection, cids: Sequence[int], *, with_vectors: bool) -> None:
    """SQLite: copy rows to the end of the table, then erase the originals.

    The copies are blank at first: two written rows of one state would violate the unique index. The database copies the
    values without decoding them, so damaged rows are copied as they are.
    """
    copies = connection.execute(_COPY if with_vectors else _COPY_WITHOUT_VECTOR, {"cids": cids}).scalars().all()
    erase_contents(connection, OF_ROWS, {"cids": cids})
    connection.execute(_WRITE_COPIES, {"first": min(copies)})
