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
    or_,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite

CHUNK = 5000  # keys or rows in one statement: below every driver's limit of parameters
metadata = MetaData()
_Int = BigInteger().with_variant(Integer, "sqlite")  # in SQLite only INTEGER PRIMARY KEY numbers rows by itself

_Name = Text().with_variant(Text(collation="C"), "postgresql")  # sorted by code points, as in SQLite
_EXPIRES = text("expires_at IS NOT NULL")
_WRITTEN = text("blank = 0")
_DELETED = text("deleted = 1")
_OF_A_USER = text("uid IS NOT NULL")
_THREADED = text("thread IS NOT NULL")

meta = Table(
    "meta",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
    sqlite_strict=True,
)
"""`schema_version`; `model` and `dim` of the vectors that are served; `log_id`, which index snapshots contain; on
SQLite `erased_bytes`, the space that erased rows take: see store/log/space.py."""

users = Table(
    "users",
    metadata,
    Column("uid", _Int, primary_key=True),
    Column("tenant", _Name, nullable=False),
    Column("user_id", _Name, nullable=False),
    Column("version", _Int, nullable=False),  # of the newest row; each row has its own version
    Column("epoch", _Int, nullable=False),  # changes if indexes cannot catch up and must be dropped
    Column("live", _Int, nullable=False),  # number of memories that are not deleted
    Column("removed_version", _Int, nullable=False),  # of the newest deletion: older index snapshots must be removed
    Column("erased_at", _Int, nullable=False),  # 0: never
    Column("text_bytes", _Int, nullable=False, server_default=text("0")),  # texts and metadata of these memories
    Column("forgotten_version", _Int, nullable=False, server_default=text("0")),  # indexes below it cannot catch up
    UniqueConstraint("tenant", "user_id"),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)

memories = Table(
    "memories",
    metadata,
    Column("label", _Int, primary_key=True),
    Column("uid", _Int, nullable=False),
    Column("key", LargeBinary, nullable=False),  # hash of uid and id: one statement can look up ids of many users
    Column("version", _Int, nullable=False),
    Column("event", Text, nullable=False),  # that began this state: added, updated or deleted
    Column("created_at", _Int, nullable=False),
    Column("updated_at", _Int, nullable=False),
    Column("expires_at", _Int),
    Column("deleted", _Int, nullable=False),
    Column("content_hash", LargeBinary, nullable=False),  # of uid, text and metadata, to find duplicates and damage
    Column("id", Text, nullable=False),
    Column("happened_at", _Int),  # NULL: as created_at
    Column("thread", _Int),  # the hash of its name: see `names`
    Index("memories_key", "key", unique=True),
    Index("memories_version", "uid", "version", unique=True),
    Index("memories_created", "uid", "created_at", "label"),
    Index("memories_updated", "uid", "updated_at", "version"),
    Index("memories_content", "content_hash"),
    Index("memories_expiry", "expires_at", sqlite_where=_EXPIRES, postgresql_where=_EXPIRES),
    Index("memories_tombstones", "updated_at", sqlite_where=_DELETED, postgresql_where=_DELETED),
    Index(
        "memories_thread",
        "uid",
        "thread",
        "created_at",
        "label",
        sqlite_where=_THREADED,
        postgresql_where=_THREADED,
    ),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)
"""One row per memory. Its contents are in `contents`. A deleted memory stays as a tombstone for an hour."""

contents = Table(
    "contents",
    metadata,
    Column("cid", _Int, primary_key=True),
    Column("blank", _Int, nullable=False),
    Column("uid", _Int, nullable=False),
    Column("version", _Int, nullable=False),  # of the memory's state that has these contents
    Column("model", _Int, nullable=False),
    Column("vector_crc", _Int, nullable=False),
    Column("text", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("embedding", LargeBinary, nullable=False),  # (dim,) float32, little-endian, as the model made it
    Index("contents_state", "uid", "version", "model", unique=True, sqlite_where=_WRITTEN, postgresql_where=_WRITTEN),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)
"""The texts and metadata of the states of memories, each with the vector of one model. The vector of a superseded
state is empty, since nothing reads it.

On PostgreSQL rows are erased by deleting them. On SQLite they are overwritten in place with blanks of the same size,
and `blank` is 1. If a row moves to another page, SQLite's secure_delete does not overwrite the copy that stays behind
in the old one. These rows never move: they are only added at the end, none grows or shrinks, and rows are only removed
at the beginning, several pages before the first that is not blank. VACUUM rewrites every page.
"""

THREAD_NAME = 0
"""In `contents.model`: the row has the name of a thread in place of a text. No model has this number."""

names = contents.alias("names")
"""Rows of `contents` with the names of threads, so that a name is erased as texts are. A user has one for each thread
that a live memory is in. Its `version`, which is that of no state, is the negative of the thread's hash."""

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
"""Superseded states of memories. The newest state is the row in `memories`."""

models = Table(
    "models",
    metadata,
    Column("model", _Int, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    sqlite_strict=True,
)
"""The models that made the vectors in this log."""

writes = Table(
    "writes",
    metadata,
    Column("key", LargeBinary, primary_key=True),  # hash of uid, write id and the number of the request in its call
    Column("uid", _Int, nullable=False),
    Column("at", _Int, nullable=False),
    Column("kind", Text, nullable=False),
    Column("answer", Text),  # JSON of numbers and ids of memories; NULL if the user was erased since
    Index("writes_uid", "uid"),
    Index("writes_at", "at"),
    sqlite_strict=True,
)
"""Records of writes with a write id, kept as long as such a write may be sent again."""

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
"""The tokens of index snapshots that were made from this log: see store/log/vouching.py."""

keys = Table(
    "keys",
    metadata,
    Column("kid", _Int, primary_key=True),
    Column("id", Text, nullable=False, unique=True),  # the public part of the key
    Column("digest", LargeBinary, nullable=False),  # SHA-256 of the key
    Column("tenant", _Name, nullable=False),
    Column("user_id", _Name),  # the only user that the key reaches; NULL if it reaches all of its tenant
    Column("scopes", Text, nullable=False),  # separated by commas
    Column("label", Text),
    Column("created_at", _Int, nullable=False),
    Column("expires_at", _Int),
    Column("used_at", _Int),  # the beginning of the last minute in which it was used
    Column("revoked_at", _Int),
    Column("requests_per_minute", _Int),  # NULL: as the settings say
    Column("tokens_per_minute", _Int),  # likewise
    Index("keys_tenant", "tenant", "kid"),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)
"""The keys of tenants. See store/log/keys.py."""

tenants = Table(
    "tenants",
    metadata,
    Column("tenant", _Name, primary_key=True),
    Column("part", _Int, primary_key=True, autoincrement=False),
    Column("memories", _Int, nullable=False),
    Column("text_bytes", _Int, nullable=False),
    sqlite_strict=True,
)
"""The sums of `live` and `text_bytes` over a tenant's users, in parts to be added up. See store/log/quotas.py."""

events = Table(
    "events",
    metadata,
    Column("eid", _Int, primary_key=True),
    Column("at", _Int, nullable=False),
    Column("tenant", _Name, nullable=False),  # empty if a request came with no tenant's key
    Column("key_id", Text),  # of the key that asked; NULL if it was none, or the command
    Column("action", Text, nullable=False),
    Column("uid", _Int),  # the user that was written; NULL if there is none, or if it was erased
    Column("ids", Text),  # JSON: of memories, or of a key; NULL if the user was erased
    Column("count", _Int, nullable=False),  # of memories, keys or refused requests
    Column("status", _Int),  # of a refusal
    Column("code", Text),  # of a refusal
    Index("events_tenant", "tenant", "eid"),
    Index("events_uid", "uid", sqlite_where=_OF_A_USER, postgresql_where=_OF_A_USER),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)
"""The audit: writes, keys that were made or revoked, and refused requests. See store/log/audit.py."""


def insert_ignore(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    """Insert those rows that are not in the table yet."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    connection.execute(dialect.insert(table).on_conflict_do_nothing(), rows)


def not_expired(column: Any, now: Any) -> Any:
    """The condition that the time in `column` is later than `now`, or NULL."""
    return or_(column.is_(None), column > now)
