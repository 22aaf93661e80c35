"""The tables of the log, and the migrations that led to them, in order, as history.

One definition serves SQLite and PostgreSQL. Times are integers, microseconds since 1970 UTC, so that both databases
compare them alike; JSON is kept as the text that was accepted, so that an export is byte-identical.

Guarantees: a log whose schema is older than this program is brought forward when it is opened, each step in its own
transaction; one that is newer is refused.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    inspect,
    select,
    text,
)

from store.errors import SchemaMismatch

metadata = MetaData()
_Label = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself only in an INTEGER PRIMARY KEY

_Name = Text().with_variant(Text(collation="C"), "postgresql")  # sorted by code points, as SQLite does
_EXPIRES = text("expires_at IS NOT NULL")

meta = Table("meta", metadata, Column("name", Text, primary_key=True), Column("value", Text, nullable=False))
"""schema_version; model and dim of the vectors that are served; log_id, which snapshots carry."""

users = Table(
    "users",
    metadata,
    Column("uid", _Label, primary_key=True),
    Column("tenant", _Name, nullable=False),
    Column("user_id", _Name, nullable=False),
    Column("version", BigInteger, nullable=False),  # of the newest write; every row it stamped has its own
    Column("epoch", BigInteger, nullable=False),  # changes where an index cannot catch up and must be dropped
    Column("live", BigInteger, nullable=False),  # memories that are not deleted
    Column("removed_version", BigInteger, nullable=False),  # of the newest deletion: older snapshots must go
    Column("erased_at", BigInteger, nullable=False),  # 0: never
    UniqueConstraint("tenant", "user_id"),
    sqlite_autoincrement=True,
)

memories = Table(
    "memories",
    metadata,
    Column("label", _Label, primary_key=True),
    Column("uid", BigInteger, nullable=False),
    Column("key", LargeBinary, nullable=False),  # hash of uid and id: any number of ids in one look-up
    Column("version", BigInteger, nullable=False),
    Column("event", Text, nullable=False),  # what made this state: added, updated or deleted
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("deleted", SmallInteger, nullable=False),
    Column("content_hash", LargeBinary, nullable=False),  # of uid, text and metadata: finds duplicates and damage
    Column("model", Text, nullable=False),
    Column("vector_crc", BigInteger, nullable=False),
    Column("id", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("embedding", LargeBinary, nullable=False),  # (dim,) float32, little-endian, as the model made it
    Index("memories_key", "key", unique=True),
    Index("memories_version", "uid", "version", unique=True),
    Index("memories_created", "uid", "created_at", "label"),
    Index("memories_content", "content_hash"),
    Index("memories_expiry", "expires_at", sqlite_where=_EXPIRES, postgresql_where=_EXPIRES),
    sqlite_autoincrement=True,
)
"""One row a memory, deleted ones as tombstones without content until they are compacted away."""

history = Table(
    "history",
    metadata,
    Column("label", BigInteger, primary_key=True, autoincrement=False),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("uid", BigInteger, nullable=False),
    Column("event", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("text", Text),
    Column("metadata", Text),
    Index("history_uid", "uid"),
)
"""The states that were superseded; the newest state of a memory is its row in `memories`."""

reembedded = Table(
    "reembedded",
    metadata,
    Column("label", BigInteger, primary_key=True, autoincrement=False),
    Column("uid", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),  # of the memory whose text was embedded
    Column("model", Text, nullable=False),
    Column("vector_crc", BigInteger, nullable=False),
    Column("embedding", LargeBinary, nullable=False),
    Index("reembedded_uid", "uid"),
)
"""Vectors of a model that is to be, or has just been, switched to, on their way into `memories`."""


def _first(connection: Connection) -> None:
    metadata.create_all(connection)


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_first,)
"""Step n leads from schema version n to n + 1. A step is never edited once it was released."""


def migrate(connection: Connection) -> None:
    """Bring the log to this program's schema, inside the caller's write transaction.

    Raises:
        SchemaMismatch: the log was written by a newer program, or holds tables that are not a log's.
    """
    found = 0
    if inspect(connection).has_table("meta"):
        value = connection.execute(select(meta.c.value).where(meta.c.name == "schema_version")).scalar()
        if value is None or not value.isdigit():
            raise SchemaMismatch("The database has a table 'meta' without a schema version: it is not a memory log.")
        found = int(value)
    if found > len(MIGRATIONS):
        raise SchemaMismatch(
            f"The log has schema version {found}, this program knows up to {len(MIGRATIONS)}: use a newer program."
        )
    for step in MIGRATIONS[found:]:
        step(connection)
    if found == 0:
        connection.execute(meta.insert(), [{"name": "schema_version", "value": str(len(MIGRATIONS))}])
    elif found < len(MIGRATIONS):
        connection.execute(meta.update().where(meta.c.name == "schema_version").values(value=str(len(MIGRATIONS))))
