"""The tables of the log, and the migrations that led to them, in order, as history.

One definition serves SQLite and PostgreSQL. Times are integers, microseconds since 1970 UTC, so that both databases
compare them alike; JSON is kept as the text that was accepted, so that an export is byte-identical.

Guarantees: a log whose schema is older than this program is brought forward when it is opened, all steps in one
transaction; one that is newer is refused.
"""

from __future__ import annotations

from collections.abc import Callable
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
    inspect,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite

from store.errors import SchemaMismatch

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


def _first(connection: Connection) -> None:
    metadata.create_all(connection, [meta, users, memories, contents, history, models])


def _second(connection: Connection) -> None:
    metadata.create_all(connection, [writes])


def _third(connection: Connection) -> None:
    metadata.create_all(connection, [index_snapshots])


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_first, _second, _third)
"""Step n leads from schema version n to n + 1. A step is never edited once it was released."""


def version_of(connection: Connection) -> int:
    """The schema version of the log that a database holds; 0 where it holds none, and one can be made.

    Raises:
        SchemaMismatch: the log was written by a newer program, or there are tables that are not a log's.
    """
    there = inspect(connection)
    tables = set(there.get_table_names())  # in one look: another program may make the log's between two
    if "meta" not in tables:
        foreign = next((name for name in metadata.tables if name in tables), None)
        if foreign is not None:
            raise SchemaMismatch(f"The database has a table {foreign!r} and no 'meta': it is not a memory log.")
        return 0
    value = None
    if {"name", "value"} <= {column["name"] for column in there.get_columns("meta")}:
        value = connection.execute(select(meta.c.value).where(meta.c.name == "schema_version")).scalar()
    if not isinstance(value, str) or not value.isdigit():
        raise SchemaMismatch("The database has a table 'meta' without a schema version: it is not a memory log.")
    if int(value) > len(MIGRATIONS):
        raise SchemaMismatch(
            f"The log has schema version {value}, this program knows up to {len(MIGRATIONS)}: use a newer program."
        )
    return int(value)


def migrate(connection: Connection) -> None:
    """Bring the log to this program's schema, inside the caller's write transaction.

    Raises:
        SchemaMismatch: see `version_of`.
    """
    found = version_of(connection)
    for step in MIGRATIONS[found:]:
        step(connection)
    if found == 0:
        connection.execute(meta.insert(), [{"name": "schema_version", "value": str(len(MIGRATIONS))}])
    elif found < len(MIGRATIONS):
        connection.execute(meta.update().where(meta.c.name == "schema_version").values(value=str(len(MIGRATIONS))))
