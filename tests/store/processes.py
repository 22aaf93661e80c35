"""The processes of the crash tests: python -m tests.store.processes kill|again|stop URL FOLDER ..."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from store import Append, IndexOptions, LogUnavailable, NewMemory, NotFound, Search, SearchResult, Store
from store.log import users
from store.log.database import Log
from store.log.maintenance import verify

DIM = 8
T = "default"


def vector(n: int) -> Any:
    return np.random.default_rng(n).normal(size=DIM).astype(np.float32)


def open_store(url: str, folder: str, **options: Any) -> Store:
    return Store.open(
        url,
        dim=DIM,
        model="fake",
        index=IndexOptions(switch=40),
        snapshot_dir=Path(folder) / "snapshots",
        **options,
    )


def memory(batch: int, part: int) -> NewMemory:
    return NewMemory(f"{batch}-{part}", f"text {batch}-{part}", vector(batch), {"batch": batch})


def write_for_ever(url: str, folder: str, first: int, acknowledged: int) -> None:
    """Append three memories and delete the second, for ever. Report each write, search, and do background work."""
    store = open_store(url, folder)
    for batch in count(first):
        user = f"u{batch % 2}"
        (result,) = store.append([Append(T, user, tuple(memory(batch, part) for part in range(3)))])
        assert not isinstance(result, Exception), result
        os.write(acknowledged, b"a%d\n" % batch)
        store.delete(T, user, f"{batch}-1")
        os.write(acknowledged, b"d%d\n" % batch)
        store.search([Search(T, user, vector(batch), 3)])
        for _ in range(3):
            store.background_step()


def kill(url: str, folder: str, kills: int) -> None:
    """Kill a writer again and again. No acknowledged write may be lost, and none may be partly there."""
    chance = random.Random(kills)
    added: set[int] = set()
    deleted: set[int] = set()
    first = 0
    store: Store | None = None
    for round in range(kills):
        reading, acknowledged = os.pipe()
        child = os.fork()
        if child == 0:
            write_for_ever(url, folder, first, acknowledged)
        os.close(acknowledged)
        with os.fdopen(reading, "rb") as pipe:
            lines = [pipe.readline()]  # wait for the first write
            time.sleep(chance.random() * 0.03)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            lines += pipe.readlines()
        added |= {int(line[1:]) for line in lines if line.startswith(b"a")}
        deleted |= {int(line[1:]) for line in lines if line.startswith(b"d")}
        if store is None or round % 10 == 0:
            if store is not None:
                store.log.close()
            store = open_store(url, folder)
        for batch in range(first, max(added) + 3):
            check(store, batch, added, deleted)
        first = max(added) + 3
        if round % 50 == 49:
            log = Log.open(url)
            assert list(verify(log)) == []
            log.close()
    print(f"{kills} kills, {len(added)} appends and {len(deleted)} deletions acknowledged")


def check(store: Store, batch: int, added: set[int], deleted: set[int]) -> None:
    user = f"u{batch % 2}"
    there = []
    for part in range(3):
        try:
            found = store.get(T, user, f"{batch}-{part}")
        except NotFound:
            there.append(False)
        else:
            assert (found.text, found.metadata) == (f"text {batch}-{part}", {"batch": batch})
            there.append(True)
    if batch in deleted:
        assert there == [True, False, True], (batch, there)
    elif batch in added:
        assert there in ([True, True, True], [True, False, True]), (batch, there)
    else:
        assert there in ([True] * 3, [False] * 3, [True, False, True]), (batch, there)
    (result,) = store.search([Search(T, user, vector(batch), 3)])
    assert isinstance(result, SearchResult)
    best = {found.id for found in result.results if (found.score or 0) > 0.999}
    assert best == {f"{batch}-{part}" for part in range(3) if there[part]}, (batch, best, there)


def write_once(store: Store, number: int) -> int:
    """Make the write with that number under its write id: an upsert, an update or a deletion, in turn.

    Returns the user's version after it.
    """
    write_id = f"w{number}"
    if number % 3 == 0:
        request = Append(T, "ann", (NewMemory("m", f"text {number}", vector(1)),), upsert=True, write_id=write_id)
        (result,) = store.append([request])
        assert not isinstance(result, Exception), result
        return result.version
    if number % 3 == 1:
        return store.update(T, "ann", "m", metadata={"number": number}, write_id=write_id).version
    return store.delete(T, "ann", "m", write_id=write_id)


def write_once_for_ever(url: str, folder: str, first: int, acknowledged: int) -> None:
    store = open_store(url, folder)
    for number in count(first):
        os.write(acknowledged, b"%d\n" % number)
        assert write_once(store, number) == number + 1
        time.sleep(0.003)  # as likely to be interrupted as the write: a kill here loses only the answer


def again(url: str, folder: str, kills: int) -> None:
    """Kill a writer again and again, and send its last write again. Each write must make exactly one version."""
    chance = random.Random(kills)
    store = open_store(url, folder)
    first = made = 0
    for _ in range(kills):
        reading, acknowledged = os.pipe()
        child = os.fork()
        if child == 0:
            write_once_for_ever(url, folder, first, acknowledged)
        os.close(acknowledged)
        with os.fdopen(reading, "rb") as pipe:
            lines = [pipe.readline()]
            time.sleep(chance.random() * 0.06)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            lines += pipe.readlines()
        last = int(lines[-1])
        made += store.user(T, "ann").version == last + 1
        assert write_once(store, last) == last + 1
        assert write_once(store, last) == last + 1
        first = last + 1
    assert store.user(T, "ann").version == first
    print(f"{kills} kills, {made} after the commit")


def stop(url: str, folder: str) -> None:
    """Stop in the middle of a write. When resumed, print how the write ended; send it again if it failed."""
    store = open_store(url, folder, lock_timeout_s=0.3)
    store.search([Search(T, "ann", vector(1), 3)])
    save_users = users.save_users

    def stop_first(*arguments: Any) -> None:
        users.save_users = save_users
        os.kill(os.getpid(), signal.SIGSTOP)
        save_users(*arguments)

    users.save_users = stop_first
    requests = [Append(T, "ann", tuple(memory(7, part) for part in range(3)))]
    try:
        print(store.append(requests)[0].version, flush=True)  # type: ignore[union-attr]
    except LogUnavailable:
        print("again", store.append(requests)[0].version, flush=True)  # type: ignore[union-attr]
    (result,) = store.search([Search(T, "ann", vector(7), 10)])
    print(sorted(found.id for found in result.results), flush=True)  # type: ignore[union-attr]
    store.close()


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        kill(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1] == "again":
        again(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        stop(sys.argv[2], sys.argv[3])
