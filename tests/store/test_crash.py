"""Writers that are killed or stopped at any moment lose no acknowledged write and leave none half done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from store import Append, LogUnavailable, NewMemory, NotFound, Search, Store
from store.log.database import Log
from store.log.maintenance import verify
from tests.store.processes import memory, vector

T = "default"
ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.store.processes", *arguments]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_writer_that_is_killed_loses_no_acknowledged_write(url: str, tmp_path: Path) -> None:
    kills = 200 if url.startswith("sqlite") else 40
    done = subprocess.run(
        run("kill", url, str(tmp_path), str(kills)), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"{kills} kills")


@pytest.mark.slow
def test_the_last_write_of_a_killed_writer_is_made_once(url: str, tmp_path: Path) -> None:
    """The write is sent again, whether the writer was killed before or after its commit."""
    kills = 50
    done = subprocess.run(
        run("again", url, str(tmp_path), str(kills)), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    after_commit = int(done.stdout.split()[2])
    assert 0 < after_commit < kills, done.stdout


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.01)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def write(store: Store, user: str, id: str) -> None:
    store.append([Append(T, user, (NewMemory(id, "x", vector(1)),), issued_at=store._now())])


def test_a_writer_that_is_stopped_in_a_write_does_not_block_others(
    open_store: Callable[..., Store], url: str, tmp_path: Path
) -> None:
    store = open_store(lock_timeout_s=0.3, now=lambda: datetime.now(UTC))
    write(store, "ann", "first")
    process = subprocess.Popen(run("stop", url, str(tmp_path)), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: is_stopped(process.pid))
        result = store.search([Search(T, "ann", vector(1), 10)])[0]
        assert [found.id for found in result.results] == ["first"]  # type: ignore[union-attr]
        with pytest.raises(NotFound):
            store.get(T, "ann", "7-0")
        with pytest.raises(LogUnavailable):
            write(store, "ann", "second")
        if url.startswith("postgresql"):
            write(store, "bob", "other users go on")

            def released() -> bool:  # the server ends the transaction of a stopped process
                try:
                    write(store, "ann", "second")
                except LogUnavailable:
                    return False
                return True

            wait_until(released)
        os.kill(process.pid, signal.SIGCONT)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    if url.startswith("sqlite"):
        assert output.splitlines() == ["4", "['7-0', '7-1', '7-2', 'first']"]
        write(store, "ann", "second")
    else:
        assert output.splitlines() == ["again 5", "['7-0', '7-1', '7-2', 'first', 'second']"]
    result = store.search([Search(T, "ann", vector(7), 10)])[0]
    assert sorted(found.id for found in result.results) == ["7-0", "7-1", "7-2", "first", "second"]  # type: ignore[union-attr]
    assert store.user(T, "ann").version == 5
    assert store.get(T, "ann", "7-1").text == memory(7, 1).text
    log = Log.open(url)
    assert list(verify(log)) == []
    log.close()
