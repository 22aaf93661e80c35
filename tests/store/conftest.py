"""Fixtures: logs in SQLite, in a temporary folder, and in a PostgreSQL server that is started for the test run."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from store import IndexOptions, Store
from store.log.database import Log

DIM = 8


class Clock:
    """A clock that advances by a millisecond whenever it is read, and by as much as a test says."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(milliseconds=1)
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def _postgres_bin() -> Path | None:
    found = shutil.which("postgres")
    if found:
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    return versions[-1] if versions else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server of this test run, without a database name."""
    binaries = _postgres_bin()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    user = "postgres" if os.getuid() == 0 else getpass.getuser()  # postgres refuses to run as root
    as_user = {"user": user} if os.getuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="memserve-postgres-") as folder, socket.socket() as probe:
        if as_user:
            shutil.chown(folder, user)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        data = f"{folder}/data"
        subprocess.run(
            [binaries / "initdb", "-D", data, "-U", "test", "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=folder,
            **as_user,
        )
        settings = {
            "port": port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": folder,
            "fsync": "off",
            "full_page_writes": "off",
            "synchronous_commit": "off",
            "shared_buffers": "32MB",
        }
        control = [binaries / "pg_ctl", "-D", data, "-w", "-l", f"{folder}/log"]
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        start = [*control, "-o", options, "start"]
        subprocess.run(start, check=True, stdout=subprocess.DEVNULL, cwd=folder, **as_user)
        # Stops the server when this process closes the pipe. The system does that if the process is killed, too.
        stop = ["sh", "-c", 'cat; exec "$@"', "sh", *control, "-m", "immediate", "stop"]
        stopper = subprocess.Popen(
            stop,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd=folder,
            start_new_session=True,
            **as_user,
        )
        try:
            yield f"postgresql://test@127.0.0.1:{port}"
        finally:
            stopper.communicate()
            assert stopper.returncode == 0


class PostgresDatabase:
    """The one database that all tests use in turn.

    To make another takes 0.3 s of CPU, and the tables of a log 0.1 s. So a test that begins with a new log gets the
    tables of the one before, if they are as they were made, without their rows.
    """

    _OTHERS = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    _SCHEMA = (
        "SELECT c.relname, c.relkind, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, "
        "pg_get_expr(d.adbin, d.adrelid) FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid "
        "LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum "
        "WHERE c.relnamespace = 'public'::regnamespace AND a.attnum > 0 ORDER BY c.relname, a.attnum"
    )

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection = psycopg.connect(url, autocommit=True)
        self._of_a_log: list[Any] = []
        self._clear = ""
        self._meta: list[Any] = []

    def empty(self) -> None:
        """Remove all tables."""
        if self._schema():
            self._connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")

    def hold_a_new_log(self) -> None:
        """Have the tables of a log that was never used."""
        if self._of_a_log and self._schema() == self._of_a_log:
            self._connection.execute(self._clear)
        else:
            self.empty()
            Log.open(self.url).close()
            self._of_a_log = self._schema()
            of_kind = {kind: {row[0] for row in self._of_a_log if row[1] == kind} for kind in ("r", "S")}
            held = {name for name in of_kind["r"] if self._connection.execute(f"SELECT 1 FROM {name}").fetchone()}
            assert held == {"meta"}
            self._meta = self._connection.execute("SELECT name, value FROM meta WHERE name <> 'log_id'").fetchall()
            restart = [f"SELECT setval('{name}', 1, false)" for name in of_kind["S"]]
            self._clear = "; ".join([*(f"DELETE FROM {name}" for name in of_kind["r"]), *restart])
            self._connection.execute("DELETE FROM meta")
        with self._connection.cursor() as cursor:
            cursor.executemany("INSERT INTO meta (name, value) VALUES (%s, %s)", self._meta)

    def disconnect_others(self) -> None:
        """End the connections that the test has left open."""
        self._connection.execute(f"SELECT pg_terminate_backend(pid) {self._OTHERS}")
        deadline = time.monotonic() + 10
        while self._connection.execute(f"SELECT 1 {self._OTHERS}").fetchone():
            assert time.monotonic() < deadline

    def _schema(self) -> list[Any]:
        return self._connection.execute(self._SCHEMA).fetchall()

    def close(self) -> None:
        self._connection.close()


@pytest.fixture(scope="session")
def postgres_database(postgres: str) -> Iterator[PostgresDatabase]:
    database = PostgresDatabase(f"{postgres}/postgres")
    yield database
    database.close()


@pytest.fixture
def without_log() -> None:
    """For tests that begin with a database without a log."""


@pytest.fixture
def postgres_url(request: pytest.FixtureRequest, postgres_database: PostgresDatabase) -> Iterator[str]:
    """URL of a PostgreSQL database with a new log, or without one if the test uses `without_log`."""
    if "without_log" in request.fixturenames:
        postgres_database.empty()
    else:
        postgres_database.hold_a_new_log()
    yield postgres_database.url
    postgres_database.disconnect_others()


# A server does the work of PostgreSQL, in processes of its own: with it the tests of the store take twice as long. In
# `make unit` only those tests use it that are about PostgreSQL alone.
@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a new log: the test runs once with SQLite and once with PostgreSQL. The file of SQLite is not made yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/log.db"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_store(url: str, clock: Clock, tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """A function that opens a store on the test's log. All stores are closed at the end."""
    opened: list[Store] = []

    def open_one(**options: object) -> Store:
        settings = {
            "dim": DIM,
            "model": "fake",
            "now": clock,
            "index": IndexOptions(switch=50),
            "snapshot_dir": tmp_path / f"snapshots{len(opened)}",
            **options,
        }
        opened.append(Store.open(url, **settings))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., Store]) -> Store:
    return open_store()


@pytest.fixture
def pair(open_store: Callable[..., Store]) -> tuple[Store, Store]:
    """Two stores on one log: a write is sent to one of them, and again to the other."""
    return open_store(), open_store()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
