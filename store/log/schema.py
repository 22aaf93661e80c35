"""The tables of the log, as this program's statements use them. `store/log/migrations` makes them.

One definition serves SQLite and PostgreSQL. Times are integers, in microseconds since 1970 UTC, so that both databases
compare them alike. JSON is stored as the text that was accepted, so that an export is byte-identical.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite

CHUNK = 5000  # look-ups and changes a statement: below every driver's limit of parameters
metadata = MetaData()
_Int = BigInteger().with_variant(Integer, "sqlite")  # the name that SQLite knows, and numbers rows by

_Name = Text().with_variant(Text(collation="C"), "postgresql")  # sorted by code points, as SQLite does
_EXPIRES = text("expires_at IS NOT NULL")
_WRITTEN = text("blank = 0")

meta = Table(
    "meta",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
    sqlite_strict=True,
)
"""schema_version; model and dim of the vectors that are served; log_id, which snapshots carry."""

users = Table(
    "users",
    metadata,
    Column("uid", _Int, primary_key=True),
    Column("tenant", _Name, nullable=False),
    Column("user_id", _Name, nullable=False),
    Column("version", _Int, nullable=False),  # of the newest write; every row it stamped has its own
    Column("epoch", _Int, nullable=False),  # changes where an index cannot catch up and must be dropped
    Column("live", _Int, nullable=False),  # memories that are not deleted
    Column("removed_version", _Int, nullable=False),  # of the newest deletion: older snapshots must go
    Column("erased_at", _Int, nullable=False),  # 0: never
    UniqueConstraint("tenant", "user_id"),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)

memories = Table(
    "memories",
    metadata,
    Column("label", _Int, primary_key=True),
    Column("uid", _Int, nullable=False),
    Column("key", LargeBinary, nullable=False),  # hash of uid and id: any number of ids in one look-up
    Column("version", _Int, nullable=False),
    Column("event", Text, nullable=False),  # what made this state: added, updated or deleted
    Column("created_at", _Int, nullable=False),
    Column("updated_at", _Int, nullable=False),
    Column("expires_at", _Int),
    Column("deleted", _Int, nullable=False),
    Column("content_hash", LargeBinary, nullable=False),  # of uid, text and metadata: finds duplicates and damage
    Column("id", Text, nullable=False),
    Index("memories_key", "key", unique=True),
    Index("memories_version", "uid", "version", unique=True),
    Index("memories_created", "uid", "created_at", "label"),
    Index("memories_content", "content_hash"),
    Index("memories_expiry", "expires_at", sqlite_where=_EXPIRES, postgresql_where=_EXPIRES),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)
"""One row a memory, deleted ones as tombstones until they are compacted away. What it says is in `contents`."""

contents = Table(
    "contents",
    metadata,
    Column("cid", _Int, primary_key=True),
    Column("blank", _Int, nullable=False),
    Column("uid", _Int, nullable=False),
    Column("version", _Int, nullable=False),  # of the state, of a memory of that user, that said this
    Column("model", _Int, nullable=False),
    Column("vector_crc", _Int, nullable=False),
    Column("text", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("embedding", LargeBinary, nullable=False),  # (dim,) float32, little-endian, as the model made it
    Index("contents_state", "uid", "version", "model", unique=True, sqlite_where=_WRITTEN, postgresql_where=_WRITTEN),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)
"""What the states of memories say, with a vector of one model each.

Rows are only ever added at the end, and erased by overwriting them in place with blanks of the same size. SQLite's
secure_delete does not overwrite the copies that stay behind in a page when a row moves to another; these rows never
move, because nothing grows, shrinks or is removed beside them (but by VACUUM, which writes every page anew).
"""

history = Table(
    "history",
    metadata,
    Column("label", _Int, primary_key=True, autoincrement=False),
    Column("version", _Int, primary_key=True, autoincrement=False),
    Column("uid", _Int, nullable=False),
    Column("event", Text, nullable=False),
    Column("at", _Int, nullable=False),
    Index("history_uid", "uid"),
    sqlite_strict=True,
)
"""The states that were superseded; the newest state of a memory is its row in `memories`."""

models = Table(
    "models",
    metadata,
    Column("model", _Int, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    sqlite_strict=True,
)
"""Every model that a vector in this log was made by."""

writes = Table(
    "writes",
    metadata,
    Column("key", LargeBinary, primary_key=True),  # hash of uid, write id, and number of the request in its call
    Column("uid", _Int, nullable=False),
    Column("at", _Int, nullable=False),
    Column("kind", Text, nullable=False),
    Column("answer", Text),  # JSON of numbers and ids of memories; NULL: the user was erased since
    Index("writes_uid", "uid"),
    Index("writes_at", "at"),
    sqlite_strict=True,
)
"""What the writes that carried a write id have done, for as long as one of them may be sent again."""

index_snapshots = Table(
    "index_snapshots",
    metadata,
    Column("number", _Int, primary_key=True),
    Column("uid", _Int, nullable=False),
    Column("token", Text, nullable=False),
    Index("index_snapshots_uid", "uid"),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)
"""The snapshots that were made of what this log holds; see store/vouching.py."""


def insert_ignore(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    """Insert rows, leaving those that are there already."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    connection.execute(dialect.insert(table).on_conflict_do_nothing(), rows)
