"""Today's store opens a log of every older schema version and reads what was written.

The logs are in `fixtures`; `fixtures/seed.py` describes how they were made.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, select, text

from store import Append, Conflict, Event, Key, NewMemory, Store, StoreError, credential_of
from store.log import migrations
from store.log.database import Log
from store.log.maintenance import verify
from store.log.migrations import MIGRATIONS
from store.log.quotas import Size, sizes
from store.log.schema import meta, metadata
from store.log.vouching import vouches
from tests.store.log.fixtures import seed

pytestmark = pytest.mark.usefixtures("without_log")

FIXTURES = Path(seed.__file__).parent
VERSIONS = (1, 2, 3, 4, 5, 6, 7, 8)
AFTER = seed.BEGIN + timedelta(hours=13, minutes=1)  # the records of writes are still kept, and one memory has expired


def load(url: str, version: int) -> None:
    """Load the dump of a log that was written by an older program into an empty database."""
    dump = (FIXTURES / f"v{version}.{url.partition(':')[0]}.sql").read_text()
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            connection.executescript(dump)
    else:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(dump.encode())


@pytest.fixture
def open_version(url: str) -> Iterator[Callable[[int], Store]]:
    """A function that opens the log that a store of some schema version wrote."""
    opened: list[Store] = []

    def open_one(version: int) -> Store:
        load(url, version)
        opened.append(seed.open_store(url, seed.Clock(AFTER)))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def empty(url: str) -> None:
    """Remove the log of a database."""
    if url.startswith("sqlite"):
        Path(url.removeprefix("sqlite:///")).unlink()
    else:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")


def schema_of(url: str) -> list[tuple[Any, ...]]:
    """All tables, columns, indexes, constraints and sequences of a database."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        return _of_sqlite(engine) if url.startswith("sqlite") else _of_postgresql(engine)
    finally:
        engine.dispose()


def _of_sqlite(engine: Engine) -> list[tuple[Any, ...]]:
    """Not the DDL of tables: a column that was added stands behind the constraints there."""
    queries = (
        "SELECT type, name, tbl_name, CASE type WHEN 'table' THEN sql LIKE '%AUTOINCREMENT%' ELSE sql END "
        "FROM sqlite_master ORDER BY 1, 2, 3",
        "SELECT name, type, ncol, wr, strict FROM pragma_table_list ORDER BY 1",
        "SELECT t.name, c.* FROM sqlite_master t, pragma_table_xinfo(t.name) c WHERE t.type = 'table' ORDER BY 1, 2",
        'SELECT t.name, i.name, i."unique", i.origin, i.partial, c.* FROM sqlite_master t, '
        "pragma_index_list(t.name) i, pragma_index_xinfo(i.name) c WHERE t.type = 'table' ORDER BY 1, 2, 6",
        "SELECT t.name, f.* FROM sqlite_master t, pragma_foreign_key_list(t.name) f ORDER BY 1, 2, 3",
    )
    with engine.connect() as connection:
        rows = [tuple(row) for query in queries for row in connection.execute(text(query))]
    return [tuple(" ".join(part.split()) if isinstance(part, str) else part for part in row) for row in rows]


def _of_postgresql(engine: Engine) -> list[tuple[Any, ...]]:
    queries = (
        "SELECT table_name, column_name, ordinal_position, data_type, is_nullable, column_default, collation_name "
        "FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 3",
        "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1, 2",
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2",
        "SELECT sequencename, data_type::text, start_value, increment_by, cycle FROM pg_sequences "
        "WHERE schemaname = 'public' ORDER BY 1",
        "SELECT objid::regclass::text, refobjid::regclass::text, refobjsubid, deptype::text FROM pg_depend "
        "WHERE classid = 'pg_class'::regclass AND refclassid = 'pg_class'::regclass AND refobjsubid > 0 "
        "AND objid IN (SELECT oid FROM pg_class WHERE relkind = 'S') ORDER BY 1, 2",
    )
    with engine.connect() as connection:
        return [tuple(row) for query in queries for row in connection.execute(text(query))]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_newest_store_reads_what_an_older_one_read(open_version: Callable[[int], Store], version: int) -> None:
    """Users, memories with their vectors, histories, exports and searches, to the last byte."""
    expected = json.loads((FIXTURES / f"v{version}.json").read_text())
    if version == 1:  # the store of version 1 still returned the history of an expired memory
        assert len(expected["default ann"]["history"]["passing"]) == 1
        expected["default ann"]["history"]["passing"] = []
    store = open_version(version)
    assert json.loads(json.dumps(seed.read(store))) == expected
    assert list(verify(store.log)) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_an_older_log_holds_what_was_written(open_version: Callable[[int], Store], version: int) -> None:
    """Some of the memories are checked by hand, independently of the recorded answers."""
    store = open_version(version)
    nested = store.get("default", "ann", "nested", include_vector=True)
    assert nested.text == "quotes ' \" and\nlines, 漢字 🎈"
    assert nested.metadata["a"] == {"b": [1, 2.5, None, True, "ü"]}
    assert (nested.metadata["big"], nested.metadata["small"]) == (2**62, -(2**63))
    assert nested.vector is not None and nested.vector.tolist() == seed.vector(2).tolist()
    assert [(e.event, e.text, e.metadata) for e in store.history("default", "ann", "updated")] == [
        ("added", "Ann lives in Rome.", {"city": "Rome"}),
        ("updated", "Ann lives in Oslo.", {"city": "Rome"}),
        ("updated", "Ann lives in Oslo.", {"city": "Oslo"}),
    ]
    assert [(e.event, e.text) for e in store.history("default", "ann", "again")] == [
        ("added", None),
        ("deleted", None),
        ("added", "It is there again."),
    ]
    listed = {memory.id: memory.expires_at for memory in store.list("default", "ann").memories}
    assert sorted(listed) == ["again", "lasting", "nested", "plain", "updated", "upserted"]
    assert str(listed["lasting"]) == "2099-12-31 23:59:59.999999+00:00"
    assert store.user("default", "eve").memories == 0
    assert [memory.id for memory in store.list("acme", "ann").memories] == ["plain"]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_older_log_is_written_on(open_version: Callable[[int], Store], version: int) -> None:
    """New memories are added, a write that is older than a deletion is refused, and an expired memory is removed."""
    store = open_version(version)
    before = store.user("default", "ann")
    late = Append("default", "ann", (NewMemory("deleted", "Ann's secret.", seed.vector(5)),), issued_at=seed.BEGIN)
    new = Append("default", "ann", (NewMemory("new", "Ann is new.", seed.vector(15)),), issued_at=AFTER)
    refused, written = store.append([late, new])
    assert isinstance(refused, Conflict) and refused.code == "deleted"
    assert not isinstance(written, Exception) and written.version == before.version + 1
    while store.background_step():
        pass
    assert store.user("default", "ann").memories == before.memories  # one was added, one has expired
    assert list(verify(store.log)) == []


@pytest.mark.parametrize("version", [2, 3, 4, 5, 6, 7, 8])
def test_a_write_that_an_older_store_made_is_not_made_again(open_version: Callable[[int], Store], version: int) -> None:
    store = open_version(version)
    before = [store.user("default", user).version for user in ("bob", "eve")]
    memory = NewMemory("7", "Bob 7", seed.vector(7))
    (appended,) = store.append([Append("default", "bob", (memory,), issued_at=AFTER, write_id="append")])
    assert not isinstance(appended, Exception)
    assert (appended.version, [one.status for one in appended.memories]) == (10, ["added"])
    updated = store.update("default", "bob", "7", metadata={"lucky": True}, write_id="update")
    assert (updated.version, updated.text, updated.metadata) == (11, "Bob 7", {"lucky": True})
    assert store.delete("default", "bob", "4", write_id="delete") == 12
    assert store.delete_where("default", "bob", {"even": True}, write_id="delete_where") == 2
    assert store.erase_user("default", "eve", write_id="erase") == (0, 3)
    assert [store.user("default", user).version for user in ("bob", "eve")] == before


def test_an_older_log_vouches_for_its_snapshots(open_version: Callable[[int], Store]) -> None:
    store = open_version(3)
    with store.log.read() as connection:
        assert [vouches(connection, 1, seed.TOKEN), vouches(connection, 1, "another")] == [True, False]


@pytest.mark.parametrize(("version", "limits"), [(6, (None, None)), (7, (60, 100_000))])
def test_the_keys_of_an_older_log_are_found(
    open_version: Callable[[int], Store], version: int, limits: tuple[int | None, int | None]
) -> None:
    store = open_version(version)
    credential = credential_of(seed.KEY)
    assert credential is not None
    (key,) = store.find_keys([credential])
    assert key == Key(
        id="0123456789abcdef",
        tenant="acme",
        user_id="ann",
        scopes=("read", "write"),
        label="Ann’s phone",
        created_at=seed.BEGIN,
        expires_at=datetime(2100, 1, 1, tzinfo=UTC),
        used_at=seed.BEGIN + timedelta(hours=1),
        requests_per_minute=limits[0],
        tokens_per_minute=limits[1],
    )


def test_the_events_of_an_older_log_are_read(open_version: Callable[[int], Store]) -> None:
    store, key_id = open_version(7), seed.KEY[3:19]
    assert store.events("acme").events == [
        Event(seed.BEGIN, "memories.added", key_id, "ann", ("plain",), 1),
        Event(seed.BEGIN, "request.refused", key_id, None, (), 3, 403, "insufficient_scope"),
    ]
    assert store.events("default").events == []


@pytest.mark.parametrize("version", VERSIONS)
def test_an_older_log_knows_the_sizes_of_its_tenants(open_version: Callable[[int], Store], version: int) -> None:
    """They are the sums of the sizes of the users, which `verify` compares."""
    with open_version(version).log.read() as connection:
        found = sizes(connection, ["acme", "default", "nobody"])
    assert found["acme"] == Size(1, 29)
    assert found.keys() == {"acme", "default"}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_migrated_schema_equals_a_fresh_one(open_version: Callable[[int], Store], url: str, version: int) -> None:
    with closing(Log.open(url)):
        fresh = schema_of(url)
    empty(url)
    log = open_version(version).log
    with log.read() as connection:
        found = connection.execute(select(meta.c.value).where(meta.c.name == "schema_version")).scalar()
    assert found == str(len(MIGRATIONS))
    assert schema_of(url) == fresh


def test_the_migrations_create_the_tables_that_the_program_declares(url: str) -> None:
    """The migrations lead to the tables that the program's statements are written for."""
    with closing(Log.open(url)):
        migrated = schema_of(url)
    empty(url)
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        metadata.create_all(connection)
    engine.dispose()
    assert schema_of(url) == migrated


@pytest.mark.parametrize("number", range(len(MIGRATIONS)))
def test_the_steps_are_numbered_in_order(number: int) -> None:
    assert MIGRATIONS[number].__name__.rpartition(".")[2].startswith(f"m{number + 1:03}_")  # type: ignore[attr-defined]


def test_a_step_that_fails_leaves_the_log_as_it_was(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps run in one transaction."""
    load(url, 1)
    before = schema_of(url)
    broken = SimpleNamespace(
        SQLITE="CREATE TABLE half (x); NONSENSE;", POSTGRESQL="CREATE TABLE half (x int); NONSENSE;"
    )
    monkeypatch.setattr(migrations, "MIGRATIONS", (*MIGRATIONS, broken))
    with pytest.raises(StoreError, match="NONSENSE"):
        Log.open(url)
    assert schema_of(url) == before
