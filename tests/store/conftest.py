"""Fixtures: logs in SQLite, in a temporary folder, and in a PostgreSQL server that is started for the test run."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pytest

from store import IndexOptions, Store

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


@pytest.fixture
def postgres_url(postgres: str) -> Iterator[str]:
    """URL of an empty PostgreSQL database. All tests use one, and empty it: to make another takes 0.3 s of CPU."""
    url = f"{postgres}/postgres"
    yield url
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a new log: the test runs once with SQLite and once with PostgreSQL."""
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
