"""Counting, verifying, compacting and reembedding, on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update

from store import (
    Append,
    Imported,
    InvalidInput,
    LogDamaged,
    LogUnavailable,
    ModelMismatch,
    NewMemory,
    Search,
    SearchResult,
    Store,
)
from store.log.database import Log
from store.log.maintenance import Counts, compact, count, reembed, served, verify
from store.log.rows import micros
from store.log.schema import contents, memories, users
from store.log.users import lock_users
from tests.store.conftest import DIM, Clock

T = "default"
EYE = np.eye(DIM, dtype=np.float32)
NEW_DIM = 4


def fill(store: Store, user: str = "ann", count: int = 20) -> None:
    made = tuple(NewMemory(str(n), f"{user} {n}", EYE[n % DIM] + n * EYE[0], {"n": n}) for n in range(count))
    store.append([Append(T, user, made, issued_at=store._now())])


def new_vectors(texts: Sequence[str]) -> Any:
    """Vectors of a model with four dimensions."""
    return [[len(text), text.count("1") + 1, hash(text[-1]) % 7, 1] for text in texts]


def blank(log: Log, erased: int) -> int:
    """The number of blank rows after that many rows were erased: PostgreSQL deletes them."""
    return erased if log.path is not None else 0


@pytest.fixture
def log(store: Store, url: str) -> Any:
    opened = Log.open(url)
    yield opened
    opened.close()


def test_a_sound_log_has_no_problems(store: Store, log: Log) -> None:
    fill(store)
    store.update(T, "ann", "3", metadata={})
    store.delete(T, "ann", "4")
    assert list(verify(log)) == []
    assert count(log) == Counts(1, 19, 1, 2, blank(log, 2), "fake", DIM)


@pytest.mark.parametrize(
    ("table", "change", "problem"),
    [
        (contents, {"text": "tampered"}, "memory '5' of user 'ann': its text or metadata are not what was written"),
        (contents, {"metadata": "{"}, "memory '5' of user 'ann': its text or metadata are not what was written"),
        (contents, {"embedding": b"1234"}, "memory '5' of user 'ann': its vector is not what was written"),
        (contents, {"embedding": b"\0" * 4 * DIM}, "memory '5' of user 'ann': its vector is not what was written"),
        (contents, {"version": 99}, "memory '5' of user 'ann': its text or metadata are not what was written"),
        (memories, {"id": "other"}, "memory 'other' of user 'ann': its key is not the hash of its id"),
        (memories, {"deleted": 1}, "user 'ann': 19 memories where 20 were written"),
        (users, {"live": 7}, "user 'ann': 20 memories where 7 were written"),
    ],
)
def test_damage_is_found_and_never_served(
    store: Store, log: Log, table: Any, change: dict[str, Any], problem: str
) -> None:
    fill(store)
    with log.write() as connection:
        where = table.c.version == (20 if table is users else 6)
        connection.execute(update(table).where(where).values(**change))
    assert problem in list(verify(log))
    fill(store, "bob", 3)
    damaged, sound = store.search([Search(T, "ann", EYE[0], 1000, include_vectors=True), Search(T, "bob", EYE[0])])
    assert isinstance(damaged, LogDamaged)
    assert isinstance(sound, SearchResult)
    assert len(sound.results) == 3


def test_a_wrong_size_of_a_user_is_found(store: Store, log: Log) -> None:
    fill(store)
    size = store.user(T, "ann").bytes - 20 * 4 * DIM
    with log.write() as connection:
        connection.execute(update(users).values(text_bytes=7))
    assert list(verify(log)) == [
        f"user 'ann': {size} bytes of texts where 7 were written",
        f"tenant '{T}': its users have 20 memories and 7 bytes of texts where 20 and {size} were written",
    ]


def test_a_compaction_removes_tombstones_and_remembers_the_deletions(store: Store, log: Log, clock: Clock) -> None:
    fill(store)
    before = clock.now
    store.search([Search(T, "ann", EYE[0], 5)])
    store.delete_where(T, "ann", {"n": {"lt": 5}})
    assert compact(log, micros(clock(), "")) == 0  # the tombstones are too young
    clock.advance(7200)
    assert compact(log, micros(clock(), "")) == 5
    assert count(log) == Counts(1, 15, 0, 0, 0, "fake", DIM)
    assert list(verify(log)) == []
    (result,) = store.search([Search(T, "ann", EYE[0], 100)])
    assert isinstance(result, SearchResult)
    assert len(result.results) == 15
    late = store.append([Append(T, "ann", (NewMemory("1", "ann 1", EYE[1]),), issued_at=before)])
    assert "after this write" in str(late[0])
    fill(store, "bob")
    assert store.append([Append(T, "ann", (NewMemory("1", "x", EYE[1]),), issued_at=clock())])[0].version == 26


def test_reembedding(store: Store, log: Log, url: str, open_store: Callable[..., Store]) -> None:
    fill(store)
    fill(store, "bob", 3)
    store.update(T, "ann", "7", metadata={"n": 70})
    store.delete(T, "ann", "8")
    with pytest.raises(ModelMismatch, match="memserve log reembed"):
        open_store(model="new", dim=NEW_DIM)
    seen: list[str] = []

    def embed(texts: Sequence[str]) -> Any:
        seen.extend(texts)
        if len(seen) == 12:  # stores keep serving the old model meanwhile
            store.update(T, "ann", "0", text="written meanwhile 1", vector=EYE[0])
            store.delete(T, "ann", "9")
            store.append([Append(T, "bob", (NewMemory("9", "came meanwhile", EYE[0]),), issued_at=store._now())])
            assert len(store.search([Search(T, "ann", EYE[0], 100)])[0].results) == 18
        return new_vectors(texts)

    done = reembed(log, "new", embed, batch=6)
    assert done == 19 + 3 + 2 - 1
    assert set(seen) >= {"written meanwhile 1", "came meanwhile"}
    assert served(log) == ("new", NEW_DIM)
    for call in (
        lambda: store.search([Search(T, "ann", EYE[0], 5)]),
        lambda: store.append([Append(T, "ann", (NewMemory("x", "x", EYE[0]),), issued_at=store._now())]),
        lambda: store.update(T, "ann", "1", metadata={}),
        lambda: store.delete(T, "ann", "1"),
        lambda: store.get(T, "ann", "1"),
        lambda: store.history(T, "ann", "1"),
        lambda: store.list(T, "ann", filter={"n": {"exists": True}}),
        lambda: store.user(T, "ann"),
        lambda: store.users(T),
        lambda: list(store.export(T, "ann")),
    ):
        with pytest.raises(ModelMismatch, match="switched to new"):
            call()
    fresh = open_store(model="new", dim=NEW_DIM)
    query = np.array(new_vectors(["written meanwhile 1"])[0], np.float32)
    (result,) = fresh.search([Search(T, "ann", query, 100, include_vectors=True)])
    assert isinstance(result, SearchResult)
    assert len(result.results) == 18
    assert (result.results[0].id, result.results[0].score) == ("0", 1.0)
    for memory in result.results:
        assert memory.vector is not None
        assert memory.vector.tolist() == [float(x) for x in new_vectors([memory.text])[0]]
    assert [event.text for event in fresh.history(T, "ann", "0")] == ["ann 0", "written meanwhile 1"]
    assert list(verify(log)) == []
    assert fresh.erase_user(T, "ann")[0] == 18
    with pytest.raises(InvalidInput, match="nothing to do"):
        reembed(log, "new", embed)


def test_a_blank_text_of_an_older_log_is_kept(store: Store, log: Log, open_store: Callable[..., Store]) -> None:
    blank = " \n"
    memories = (NewMemory("1", blank, EYE[0]), NewMemory("2", "tea", EYE[1]))
    store.append([Append(T, "ann", memories, issued_at=store._now())])
    lines = list(store.export(T, "ann"))
    assert store.import_lines(T, "bob", lines) == Imported(2, 0)
    assert list(store.export(T, "bob")) == lines
    seen: list[str] = []

    def embed(texts: Sequence[str]) -> Any:
        seen.extend(texts)
        return new_vectors(texts)

    assert reembed(log, "new", embed) == 4
    assert sorted(seen) == [".", ".", "tea", "tea"]
    assert list(verify(log)) == []
    moved = open_store(model="new", dim=NEW_DIM)
    got = moved.get(T, "bob", "1", include_vector=True)
    assert (got.text, np.asarray(got.vector).tolist()) == (blank, new_vectors(["."])[0])


def test_an_interrupted_reembedding_continues(store: Store, log: Log) -> None:
    fill(store)
    calls: list[int] = []

    def failing(texts: Sequence[str]) -> Any:
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return new_vectors(texts)

    with pytest.raises(KeyboardInterrupt):
        reembed(log, "new", failing, batch=5)
    assert served(log) == ("fake", DIM)
    assert len(store.search([Search(T, "ann", EYE[0], 100)])[0].results) == 20
    store.delete(T, "ann", "0")
    assert reembed(log, "new", new_vectors, batch=5) == 10
    assert list(verify(log)) == []


def test_a_reembedding_that_was_interrupted_after_the_switch_is_completed(
    store: Store, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)

    def dies(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("store.log.maintenance._blank_replaced", dies)
        reembed(log, "new", new_vectors)
    assert (served(log), count(log).blank) == (("new", NEW_DIM), 0)
    assert reembed(log, "new", new_vectors) == 0
    assert count(log).blank == blank(log, 20)
    with pytest.raises(InvalidInput, match="nothing to do"):
        reembed(log, "new", new_vectors)
    assert list(verify(log)) == []


def test_old_vectors_are_blanked_under_the_locks_of_their_users(
    store: Store, log: Log, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    with monkeypatch.context() as patched:
        patched.setattr("store.log.maintenance._blank_replaced", lambda log, model: 0)
        reembed(log, "new", new_vectors)
    hasty = Log.open(url, lock_timeout_s=0.2)
    with log.write() as connection:
        assert list(lock_users(connection, [1])) == [1]
        with pytest.raises(LogUnavailable):
            reembed(hasty, "new", new_vectors)
    assert count(log).blank == 0
    assert reembed(hasty, "new", new_vectors) == 0
    assert count(log).blank == blank(log, 20)
    hasty.close()


def test_users_that_are_added_while_a_log_is_verified_are_no_problem(store: Store, log: Log) -> None:
    fill(store, count=500)
    assert list(verify(log, lambda rows: fill(store, "bob") if rows == 500 else None)) == []
    assert count(log).users == 2


@pytest.mark.parametrize("wrong", [[[1.0]], [[0.0] * 4] * 20, [[float("nan")] * 4] * 20, [[1.0, 2.0]] * 19])
def test_unusable_vectors_stop_a_reembedding(store: Store, log: Log, wrong: Any) -> None:
    fill(store)
    with pytest.raises(InvalidInput):
        reembed(log, "new", lambda texts: wrong)
    assert served(log) == ("fake", DIM)
    assert list(verify(log)) == []


def test_a_log_without_memories_takes_any_model(store: Store, open_store: Callable[..., Store]) -> None:
    fill(store)
    store.erase_user(T, "ann")
    open_store(model="new", dim=NEW_DIM)
    with pytest.raises(ModelMismatch):
        store.append([Append(T, "ann", (NewMemory("x", "x", EYE[0]),), issued_at=store._now())])
