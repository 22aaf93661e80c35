"""Writes that two stores try at the same moment, or whose first store dies, are made once and get the same answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from store import Appended, AppendResult, LogUnavailable, Store
from store.log import users
from store.log.database import Log
from store.log.maintenance import verify
from store.log.schema import writes
from tests.repetitions import repetitions
from tests.store.conftest import DIM, Clock
from tests.store.log.test_receipts import T, new, put, records, texts

WRITES: dict[str, Callable[[Store], object]] = {
    "update": lambda store: store.update(T, "ann", "1", metadata={"by": "me"}, write_id="w"),
    "upsert": lambda store: put(store, "ann", new("1", "mine"), upsert=True, write_id="w"),
    "delete": lambda store: store.delete(T, "ann", "1", write_id="w"),
    "delete_where": lambda store: store.delete_where(T, "ann", {"k": 1}, write_id="w"),
    "erase": lambda store: store.erase_user(T, "ann", write_id="w"),
    "add": lambda store: put(store, "ann", new("9", generated_id=True)),
}
ANSWERS = {
    "update": lambda answer: answer.version == 3 and answer.metadata == {"by": "me"},
    "upsert": lambda answer: answer == AppendResult([Appended("1", "updated", 3)], 3),
    "delete": lambda answer: answer == 3,
    "delete_where": lambda answer: answer == 2,
    "erase": lambda answer: answer == (2, 3),
    "add": lambda answer: answer == AppendResult([Appended("9", "added", 3)], 3),
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_write_whose_store_died_before_answering_is_made_once(
    pair: tuple[Store, Store], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    put(one, "ann", new("1", metadata={"k": 1}), new("2", metadata={"k": 1}))

    def die(uids: object) -> None:  # called right after the commit
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(one._users, "_remember", die)
        WRITES[kind](one)
    put(other, "ann", new("1", "another's", metadata={"k": 1}), upsert=True)
    version = other.user(T, "ann").version
    assert ANSWERS[kind](WRITES[kind](other))
    assert texts(other)["1"] == "another's"
    assert other.user(T, "ann").version == version


@pytest.fixture
def race(url: str) -> Iterator[Callable[[Callable[[Store], object]], list[object]]]:
    """A function that runs a call on two stores at the same moment, in a thread each, and returns both results."""
    together = threading.Barrier(2)

    def run(store: Store, call: Callable[[Store], object]) -> object:
        together.wait(timeout=30)
        return call(store)

    with ThreadPoolExecutor(2) as pool:
        racing = [Store.open(url, dim=DIM, model="fake", lock_timeout_s=30) for _ in range(2)]
        yield lambda call: [job.result(60) for job in [pool.submit(run, store, call) for store in racing]]
    for store in racing:
        store.close()
    log = Log.open(url)
    assert list(verify(log)) == []
    log.close()


@pytest.mark.parametrize("kind", WRITES)
def test_one_write_on_two_stores_at_the_same_moment(race: Any, store: Store, kind: str) -> None:
    for round in range(repetitions(25, quick=8)):
        store.erase_user(T, "ann")
        with store.log.write() as connection:
            connection.execute(writes.delete())
        put(store, "ann", new("1", metadata={"k": 1}), new("2", metadata={"k": 1}))
        version = store.user(T, "ann").version
        first, second = race(WRITES[kind])
        assert first == second, round
        assert store.user(T, "ann").version == version + (2 if kind == "delete_where" else 1)


def test_the_first_write_of_a_user_on_two_stores_at_the_same_moment(race: Any, store: Store) -> None:
    def upsert(user: str) -> Callable[[Store], Any]:
        return lambda store: put(store, user, new("1"), upsert=True, write_id="w")

    rounds = repetitions(25, quick=8)
    for round in range(rounds):
        assert race(lambda store, n=round: store.delete_where(T, f"a{n}", {"k": 1}, write_id="w")) == [0, 0]
        assert race(lambda store, n=round: store.erase_user(T, f"b{n}", write_id="w")) == [(0, 1), (0, 1)]
        added = AppendResult([Appended("1", "added", 1)], 1)
        assert race(upsert(f"c{round}")) == [added, added]
    assert [store.user(T, f"{letter}{rounds - 1}").version for letter in "abc"] == [0, 1, 1]


@pytest.mark.parametrize("kind", WRITES)
def test_the_second_attempt_waits_for_the_first(
    postgres_url: str, clock: Clock, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL, which allows two writers at once: the second begins before the first has committed."""
    one, other = (Store.open(postgres_url, dim=DIM, model="fake", now=clock, lock_timeout_s=30) for _ in range(2))
    put(one, "ann", new("1", metadata={"k": 1}), new("2", metadata={"k": 1}))
    other.get(T, "ann", "1")
    made, waits = threading.Event(), threading.Event()
    save_users = users.save_users

    def save_late(*arguments: Any) -> None:
        if not made.is_set():
            made.set()
            assert waits.wait(30)
        save_users(*arguments)

    monkeypatch.setattr(users, "save_users", save_late)
    with ThreadPoolExecutor(2) as pool, psycopg.connect(postgres_url, autocommit=True) as watcher:
        first = pool.submit(WRITES[kind], one)
        assert made.wait(30)
        second = pool.submit(WRITES[kind], other)
        deadline = time.monotonic() + 30
        while not watcher.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()[0]:  # type: ignore[index]
            assert time.monotonic() < deadline
        waits.set()
        assert first.result(60) == second.result(60)
    assert ANSWERS[kind](first.result())
    assert one.user(T, "ann").version == (4 if kind == "delete_where" else 3)
    for store in (one, other):
        store.close()


def test_a_write_that_was_rolled_back_leaves_no_record(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "ann", new("1"))

    def fail(*arguments: Any) -> None:
        raise LogUnavailable("lost")

    with monkeypatch.context() as patch:
        patch.setattr(users, "save_users", fail)
        for call in WRITES.values():
            with pytest.raises(LogUnavailable):
                call(store)
    assert records(store) == 0
    assert texts(store) == {"1": "text 1"}
