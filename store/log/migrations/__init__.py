"""The migrations that lead to the log's schema, in order.

Guarantees: a log is brought from its schema version to this program's when it is opened. All steps run in one
transaction, so a log that a step fails on stays as it was. A log with a newer schema is refused. A new log is made by
the same steps, so it cannot differ from one that was migrated.

To add a step: write `m009_NAME.py` with its DDL for both databases, append it to `MIGRATIONS`, change
`store/log/schema.py` to match, and add a log of the new version to the tests' fixtures. A step is plain SQL. It is
never edited after its release, because there are logs that it has made.
"""

from __future__ import annotations

from typing import Protocol

from sqlalchemy import Connection, inspect, select

from store.errors import SchemaMismatch
from store.log.migrations import (
    m001_begin,
    m002_writes,
    m003_index_snapshots,
    m004_sizes,
    m005_space,
    m006_keys,
    m007_audit,
    m008_threads,
)
from store.log.schema import meta, metadata


class Migration(Protocol):
    """A module with the DDL of one step: statements that end in a semicolon and hold no other."""

    SQLITE: str
    POSTGRESQL: str


MIGRATIONS: tuple[Migration, ...] = (
    m001_begin,
    m002_writes,
    m003_index_snapshots,
    m004_sizes,
    m005_space,
    m006_keys,
    m007_audit,
    m008_threads,
)
"""The step at index n leads from schema version n to n + 1."""


def version_of(connection: Connection) -> int:
    """The schema version of the log in a database; 0 if the database holds no log and one can be made.

    Raises:
        SchemaMismatch: the log was written by a newer program, or another program's tables have the names of a log's.
    """
    inspector = inspect(connection)
    tables = set(inspector.get_table_names())  # read once: another process may make the log between two queries
    if "meta" not in tables:
        foreign = next((name for name in metadata.tables if name in tables), None)
        if foreign is not None:
            raise SchemaMismatch(f"The database has a table {foreign!r} and no 'meta': it is not a memory log.")
        return 0
    value = None
    if {"name", "value"} <= {column["name"] for column in inspector.get_columns("meta")}:
        value = connection.execute(select(meta.c.value).where(meta.c.name == "schema_version")).scalar()
    if not isinstance(value, str) or not value.isdigit():
        raise SchemaMismatch("The database has a table 'meta' without a schema version: it is not a memory log.")
    if int(value) > len(MIGRATIONS):
        raise SchemaMismatch(
            f"The log has schema version {value}, but this program supports versions up to {len(MIGRATIONS)}: "
            "use a newer program."
        )
    return int(value)


def migrate(connection: Connection) -> None:
    """Bring the log to this program's schema, inside the caller's write transaction.

    Raises:
        SchemaMismatch: see `version_of`.
    """
    found = version_of(connection)
    for step in MIGRATIONS[found:]:
        ddl = step.POSTGRESQL if connection.dialect.name == "postgresql" else step.SQLITE
        for statement in ddl.split(";")[:-1]:
            connection.exec_driver_sql(statement)
    if found == 0:
        connection.execute(meta.insert(), [{"name": "schema_version", "value": str(len(MIGRATIONS))}])
    elif found < len(MIGRATIONS):
        connection.execute(meta.update().where(meta.c.name == "schema_version").values(value=str(len(MIGRATIONS))))
