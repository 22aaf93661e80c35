"""The log's database: opening, damage, schema versions, transactions and temporary logs."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from sqlalchemy import Connection, create_engine, insert, inspect, select, text, update

from store import (
    Append,
    AppendResult,
    InvalidInput,
    LogDamaged,
    LogUnavailable,
    ModelMismatch,
    NewMemory,
    SchemaMismatch,
    Search,
    Store,
    StoreError,
)
from store.log import users
from store.log.database import Log, discard
from store.log.maintenance import verify
from store.log.migrations import MIGRATIONS
from store.log.schema import meta
from tests.repetitions import repetitions
from tests.store.conftest import DIM

pytestmark = pytest.mark.usefixtures("without_log")

T = "default"
EYE = np.eye(DIM, dtype=np.float32)


def fill(store: Store, count: int, user: str = "ann") -> None:
    made = tuple(NewMemory(str(n), f"text {n} " + "x" * 200, EYE[n % DIM], {"n": n}) for n in range(count))
    store.append([Append(T, user, made, issued_at=store._now())])


def test_a_transaction_is_all_or_nothing(url: str) -> None:
    log = Log.open(url)
    with pytest.raises(ZeroDivisionError), log.write() as connection:
        connection.execute(insert(meta), [{"name": "x", "value": "1"}])
        raise ZeroDivisionError
    with log.read() as connection:
        assert connection.execute(select(meta.c.value).where(meta.c.name == "x")).first() is None
    log.close()


def test_a_read_sees_one_state_throughout(url: str) -> None:
    log, other = Log.open(url), Log.open(url)
    statement = select(meta.c.value).where(meta.c.name == "x")
    with log.read() as connection:
        assert connection.execute(statement).first() is None
        with other.write() as writing:
            writing.execute(insert(meta), [{"name": "x", "value": "1"}])
        assert connection.execute(statement).first() is None
    with log.read() as connection:
        assert connection.execute(statement).scalar() == "1"
    log.close()
    other.close()


def test_opening_again_migrates_nothing(url: str) -> None:
    first = Log.open(url)
    first.close()
    second = Log.open(url)
    with second.read() as connection:
        version = connection.execute(select(meta.c.value).where(meta.c.name == "schema_version")).scalar()
    assert (version, second.log_id) == (str(len(MIGRATIONS)), first.log_id)
    second.close()


def test_a_newer_schema_is_refused(url: str) -> None:
    log = Log.open(url)
    with log.write() as connection:
        connection.execute(update(meta).where(meta.c.name == "schema_version").values(value="999"))
    log.close()
    with pytest.raises(SchemaMismatch, match="999"):
        Log.open(url)


@pytest.mark.parametrize("mode", ["delete", "wal"])
@pytest.mark.parametrize(
    ("table", "make", "expected"),
    [
        ("meta (name TEXT, value TEXT)", True, SchemaMismatch),
        ("meta (name TEXT, value BLOB)", True, SchemaMismatch),
        ("meta (id INTEGER)", True, SchemaMismatch),
        ("users (id INTEGER)", True, SchemaMismatch),
        ("customers (id INTEGER)", False, LogUnavailable),
    ],
)
def test_a_file_of_another_program_is_refused_and_not_changed(
    tmp_path: Path, table: str, make: bool, expected: type[Exception], mode: str
) -> None:
    path = tmp_path / "other.db"
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA journal_mode={mode}")
    connection.execute(f"CREATE TABLE {table}")
    if "BLOB" in table:
        connection.execute("INSERT INTO meta VALUES ('schema_version', x'31')")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(expected):
        Log.open(f"sqlite:///{path}", make=make)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["other.db"]


def test_a_table_of_another_program_is_not_used(url: str) -> None:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE users (id INTEGER, email TEXT)"))
    with pytest.raises(SchemaMismatch, match="'users'"):
        Log.open(url)
    assert inspect(engine).get_table_names() == ["users"]
    engine.dispose()


def test_a_log_is_created_in_a_database_with_tables_with_other_names(url: str) -> None:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE customers (id INTEGER)"))
    Log.open(url).close()
    tables = [
        "customers",
        "contents",
        "events",
        "history",
        "index_snapshots",
        "keys",
        "memories",
        "meta",
        "models",
        "tenants",
        "users",
        "writes",
    ]
    assert sorted(inspect(engine).get_table_names()) == sorted(tables)
    engine.dispose()


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://x/y", "sqlite://", "memory://a/b"])
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Log.open(url)
    assert caught.value.param == "url"


def test_memory_logs() -> None:
    alone = Store.open("memory://", dim=DIM, model="fake")
    folder = alone.log.path.parent  # type: ignore[union-attr]
    fill(alone, 1)
    alone.close()
    assert not folder.exists()
    name = f"memory://test-{os.getpid()}"
    one, other = Store.open(name, dim=DIM, model="fake"), Store.open(name, dim=DIM, model="fake")
    fill(one, 3)
    assert len(other.search([Search(T, "ann", EYE[0])])[0].results) == 3  # type: ignore[union-attr]
    one.close()
    assert other.get(T, "ann", "1").text.startswith("text 1")
    other.close()
    discard(name)
    assert Store.open(name, dim=DIM, model="fake").user(T, "ann").memories == 0
    discard(name)


def test_sqlite_runs_with_the_settings_that_durability_needs(tmp_path: Path) -> None:
    for wanted, level in (("FULL", 2), ("NORMAL", 1)):
        log = Log.open(f"sqlite:///{tmp_path}/{wanted}.db", synchronous=wanted)  # type: ignore[arg-type]
        with log.read() as connection:
            found = [
                connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "secure_delete")
            ]
        assert found == ["wal", level, 1]
        log.close()
    with pytest.raises(InvalidInput):
        Log.open(f"sqlite:///{tmp_path}/x.db", synchronous="OFF")  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["header", "noise", "truncated", "zeros"])
def test_a_damaged_file_is_noticed_at_open(tmp_path: Path, damage: str, rng: np.random.Generator) -> None:
    path = tmp_path / "log.db"
    store = Store.open(f"sqlite:///{path}", dim=DIM, model="fake")
    fill(store, 300)
    store.close()
    data = bytearray(path.read_bytes())
    match damage:
        case "header":
            data[:16] = b"not a database!!"
        case "noise":
            for at in range(4096 * 4, len(data) - 512, 4096 * 2):
                data[at : at + 64] = rng.bytes(64)
        case "truncated":
            del data[len(data) // 2 :]
        case "zeros":
            data[8192 : 8192 + 4096 * 8] = bytes(4096 * 8)
    path.write_bytes(data)
    with pytest.raises(LogDamaged, match="memserve log verify"):
        Store.open(f"sqlite:///{path}", dim=DIM, model="fake")


def test_flipped_bits_are_never_served(tmp_path: Path, rng: np.random.Generator) -> None:
    """With bits flipped anywhere in the file, a store either answers correctly or raises an error."""
    path = tmp_path / "log.db"
    store = Store.open(f"sqlite:///{path}", dim=DIM, model="fake")
    fill(store, 60)
    expected = {memory.id: memory for memory in store.list(T, "ann", limit=1000).memories}
    store.close()
    sound = path.read_bytes()
    found = 0
    tries = repetitions(400, quick=80)
    for _ in range(tries):
        data = bytearray(sound)
        for bit in rng.integers(0, 8 * len(data), 8).tolist():
            data[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        for left in tmp_path.glob("log.db-*"):
            left.unlink()
        try:
            opened = Store.open(f"sqlite:///{path}", dim=DIM, model="fake")
        except StoreError:
            found += 1
            continue
        try:
            (result,) = opened.search([Search(T, "ann", EYE[0], 100)])
            if isinstance(result, StoreError):
                raise result
            assert len(result.results) == 60
            for memory in result.results:
                own = expected[memory.id]
                assert (memory.text, memory.metadata) == (own.text, own.metadata)
        except StoreError:
            found += 1
        finally:
            opened.log.engine.dispose()
    assert found > tries // 8


def test_verify_reports_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    store = Store.open(f"sqlite:///{path}", dim=DIM, model="fake")
    fill(store, 300)
    store.close()
    data = path.read_bytes()
    path.write_bytes(data.replace(b"text 77 x", b"text 78 x"))
    log = Log.open(f"sqlite:///{path}")
    assert list(verify(log)) == ["memory '77' of user 'ann': its text or metadata are not what was written"]
    log.close()


def test_a_locked_log_is_unavailable_for_writes_and_open_for_reads(open_store: Callable[..., Store]) -> None:
    one, other = open_store(), open_store(lock_timeout_s=0.2)
    fill(one, 3)
    with one._users.writing([(T, "ann")]):
        with pytest.raises(LogUnavailable):
            fill(other, 1)
        assert len(other.search([Search(T, "ann", EYE[0])])[0].results) == 3  # type: ignore[union-attr]
    fill(other, 3)


def test_a_failed_checkpoint_leaves_the_lock_timeout_of_writes_as_it_was(tmp_path: Path) -> None:
    log = Log.open(f"sqlite:///{tmp_path}/log.db", lock_timeout_s=3.0)

    def refuse(_: int, name: str | None, *__: object) -> int:
        return sqlite3.SQLITE_DENY if name == "wal_checkpoint" else sqlite3.SQLITE_OK

    raw = log.engine.raw_connection()
    raw.dbapi_connection.set_authorizer(refuse)
    raw.close()
    with pytest.raises(StoreError):
        log.truncate_wal()
    with log.read() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 3000
    log.close()


def test_a_lost_server_is_noticed_within_half_a_minute(postgres_url: str) -> None:
    log = Log.open(postgres_url)
    with log.read() as connection:
        asked = connection.connection.dbapi_connection.info.get_parameters()
    log.close()
    idle, interval, count = (int(asked[f"keepalives_{name}"]) for name in ("idle", "interval", "count"))
    assert idle + interval * count <= 30
    assert int(asked["tcp_user_timeout"]) <= 30_000


def test_a_commit_without_an_answer_has_an_unknown_outcome(postgres_url: str) -> None:
    with closing(Log.open(postgres_url)) as log, psycopg.connect(postgres_url, autocommit=True) as other:

        def lose(connection: Connection) -> None:
            process = connection.execute(text("SELECT pg_backend_pid()")).scalar()
            other.execute("SELECT pg_terminate_backend(%s, 10000)", [process])

        with pytest.raises(LogUnavailable) as unknown, log.write() as connection:
            lose(connection)
        assert unknown.value.code == "outcome_unknown"
        with pytest.raises(LogUnavailable) as undone, log.write() as connection:
            lose(connection)
            connection.execute(text("SELECT 1"))
        assert undone.value.code == "log_unavailable"


def test_a_log_does_not_change_its_model_under_a_writer(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL: a store that finds the log empty may have to wait for a writer, and must then look again."""
    old = Store.open(postgres_url, dim=DIM, model="old")
    written, waits = threading.Event(), threading.Event()
    save_users = users.save_users

    def save_late(*arguments: Any) -> None:
        written.set()
        assert waits.wait(30)
        save_users(*arguments)

    monkeypatch.setattr(users, "save_users", save_late)
    memory = NewMemory("1", "text", np.ones(DIM, np.float32))
    with ThreadPoolExecutor(2) as pool, psycopg.connect(postgres_url, autocommit=True) as watcher:
        append = pool.submit(old.append, [Append("default", "ann", (memory,))])
        assert written.wait(30)
        new = pool.submit(Store.open, postgres_url, dim=DIM, model="new")
        deadline = time.monotonic() + 30
        while not watcher.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()[0]:  # type: ignore[index]
            assert time.monotonic() < deadline
        waits.set()
        with pytest.raises(ModelMismatch, match="memserve log reembed"):
            new.result(60)
        assert isinstance(append.result(60)[0], AppendResult)
    assert old.get("default", "ann", "1").text == "text"
    old.close()


def test_a_full_disk_is_unavailable(tmp_path: Path) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/log.db", dim=DIM, model="fake")
    fill(store, 1)
    with store.log.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 2}")
    with pytest.raises(LogUnavailable, match="full"):
        fill(store, 200, "bob")
    assert store.user(T, "bob").memories == 0
    assert len(store.search([Search(T, "ann", EYE[0])])[0].results) == 1  # type: ignore[union-attr]
    store.close()
