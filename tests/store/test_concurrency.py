"""Stores that use one log at the same time, each in its own thread, as replicas do in their processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from store import Append, AppendResult, Conflict, IndexOptions, LogUnavailable, NewMemory, Search, SearchResult, Store
from store.log.database import Log
from store.log.maintenance import verify
from tests.store.conftest import DIM

T = "default"
EYE = np.eye(DIM, dtype=np.float32)


def open_here(url: str) -> Store:
    return Store.open(url, dim=DIM, model="fake", index=IndexOptions(switch=30), lock_timeout_s=30)


def at_once(*jobs: Callable[[], object]) -> list[object]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(job) for job in jobs]]


def test_a_fresh_log_is_opened_by_many_at_once(tmp_path: Path) -> None:
    for n in range(20):
        stores = at_once(*[lambda n=n: open_here(f"sqlite:///{tmp_path}/{n}.db")] * 4)
        assert len({store.log.log_id for store in stores}) == 1  # type: ignore[attr-defined]
        for store in stores:
            store.close()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("without_log")
def test_a_fresh_postgresql_log_is_opened_by_many_at_once(postgres_url: str) -> None:
    logs = at_once(*[lambda: Log.open(postgres_url)] * 4)
    assert len({log.log_id for log in logs}) == 1  # type: ignore[attr-defined]
    for log in logs:
        log.close()  # type: ignore[attr-defined]


def test_batches_of_the_same_new_users_in_any_order(url: str) -> None:
    """The writers do not deadlock, and no row or version is lost or given twice."""
    batches = 15

    def write(writer: int) -> None:
        store = open_here(url)
        chance = np.random.default_rng(writer)
        for batch in range(batches):
            users = [f"u{n}" for n in chance.permutation(12)]
            results = store.append(
                [Append(T, user, (NewMemory(f"{writer}-{batch}", "x", EYE[writer]),)) for user in users]
            )
            assert all(isinstance(result, AppendResult) for result in results)
        store.close()

    at_once(*(lambda writer=writer: write(writer) for writer in range(3)))
    store = open_here(url)
    for n in range(12):
        memories = store.list(T, f"u{n}", limit=1000, order="updated_at").memories
        assert [memory.version for memory in memories] == list(range(1, 3 * batches + 1))
    store.close()
    log = Log.open(url)
    assert list(verify(log)) == []
    log.close()


def test_no_update_is_lost(url: str) -> None:
    first = open_here(url)
    first.append([Append(T, "ann", (NewMemory("counter", "x", EYE[0], {"n": 0}),))])

    def count() -> int:
        store, done = open_here(url), 0
        while done < 20:
            memory = store.get(T, "ann", "counter")
            try:
                store.update(T, "ann", "counter", metadata={"n": memory.metadata["n"] + 1}, if_version=memory.version)
                done += 1
            except (Conflict, LogUnavailable):
                continue
        store.close()
        return done

    assert at_once(count, count) == [20, 20]
    memory = first.get(T, "ann", "counter")
    assert (memory.metadata, memory.version) == ({"n": 40}, 41)
    assert len(first.history(T, "ann", "counter")) == 41
    first.close()


def test_a_reader_sees_whole_writes_and_never_an_older_version(url: str) -> None:
    batches, size = 30, 5

    def write() -> None:
        store = open_here(url)
        for batch in range(batches):
            made = tuple(NewMemory(f"{batch}-{n}", f"text {batch}", EYE[n], {"batch": batch}) for n in range(size))
            store.append([Append(T, "ann", made, issued_at=datetime.now(UTC))])
        store.close()

    def read() -> int:
        store, seen = open_here(url), 0
        while seen < batches * size:
            (result,) = store.search([Search(T, "ann", EYE[0], 1000)])
            assert isinstance(result, SearchResult)
            assert len(result.results) == result.version
            assert result.version % size == 0
            assert result.version >= seen
            seen = result.version
            store.background_step()
        store.close()
        return seen

    assert at_once(write, read, read)[1:] == [batches * size] * 2
