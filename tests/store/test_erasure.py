"""After a deletion no file of the data folder contains the text. The tests search the bytes of all files."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import update

from store import Append, IndexOptions, LogDamaged, NewMemory, Search, SearchResult, Store
from store.index.tokens import keys_of
from store.log.maintenance import compact, verify
from store.log.rows import micros
from store.log.schema import contents
from tests.store.conftest import DIM, Clock

T = "default"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/log.db"


def files_with(folder: Path, secret: bytes) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]


def settle(clock: Clock, *stores: Store) -> None:
    """Run the background work of the next 60 s."""
    for _ in range(5):
        clock.advance(11)
        for store in stores:
            while store.background_step():
                pass


def put(store: Store, user: str, id: str, text: str, vector: np.ndarray, **fields: object) -> None:
    memory = NewMemory(id, text, vector, **fields)  # type: ignore[arg-type]
    (result,) = store.append([Append(T, user, (memory,), upsert=True, issued_at=store._now())])
    assert not isinstance(result, Exception), result


def test_no_file_holds_a_deleted_memory_or_an_erased_user(
    open_store: Callable[..., Store], tmp_path: Path, clock: Clock, rng: np.random.Generator
) -> None:
    one, other = open_store(index=IndexOptions(switch=60)), open_store(index=IndexOptions(switch=60))
    chance = random.Random(5)
    vectors = rng.normal(size=(400, DIM)).astype(np.float32)
    for n in range(400):  # two users in turn, and texts of many sizes, so that pages split and rows move
        user = ("keep", "gone")[n % 2]
        filler = "x" * chance.randrange(0, 900)
        put(
            one, user, str(n), f"secret-{user}-{n}-text {filler}", vectors[n], metadata={"m": f"secret-{user}-{n}-meta"}
        )
    for n in chance.sample(range(400), 200):
        user = ("keep", "gone")[n % 2]
        filler = "y" * chance.randrange(0, 1800)
        one.update(T, user, str(n), text=f"secret-{user}-{n}-new {filler}", vector=vectors[n] + 1)
    for store in (one, other):
        store.search([Search(T, user, vectors[0], 5) for user in ("keep", "gone")])
        settle(clock, store)
    deleted = [n for n in range(0, 400, 2) if chance.random() < 0.3]
    for n in deleted:
        one.delete(T, "keep", str(n))
    one.erase_user(T, "gone")
    settle(clock, one, other)

    assert files_with(tmp_path, b"secret-keep-") == ["log.db"]
    left = (tmp_path / "log.db").read_bytes()
    assert left.count(b"secret-gone") == 0
    for n in deleted:
        assert f"secret-keep-{n}-".encode() not in left
    for n in [*range(1, 400, 2), *deleted]:
        for vector in (vectors[n], vectors[n] + 1):
            assert files_with(tmp_path, vector.astype("<f4").tobytes()) == []


def test_no_file_holds_the_name_of_a_thread_that_no_memory_is_in(
    open_store: Callable[..., Store], tmp_path: Path, clock: Clock, rng: np.random.Generator
) -> None:
    one, other = open_store(index=IndexOptions(switch=60)), open_store(index=IndexOptions(switch=60))
    vectors = rng.normal(size=(240, DIM)).astype(np.float32)
    for n in range(240):
        user = ("keep", "gone")[n % 2]
        filler = "x" * (n % 50)
        put(one, user, str(n), f"text {n}", vectors[n], thread=f"secret-{user}-{n // 8}-thread {filler}")
    for store in (one, other):
        store.search([Search(T, user, vectors[0], 5) for user in ("keep", "gone")])
        settle(clock, store)
    assert (tmp_path / "log.db").read_bytes().count(b"secret-keep-29-thread") > 0
    for n in range(0, 80, 2):  # the threads 0 to 9
        one.delete(T, "keep", str(n))
    for n in range(80, 160, 2):  # 10 to 19 have moved
        one.update(T, "keep", str(n), thread=f"secret-keep-{n // 8}-moved")
    for n in range(160, 238, 2):  # 20 to 28 have ended, and the last memory of 29 is left
        other.update(T, "keep", str(n), thread=None)
    one.erase_user(T, "gone")
    settle(clock, one, other)

    assert files_with(tmp_path, b"secret-gone") == []
    left = (tmp_path / "log.db").read_bytes()
    for n in range(29):
        assert f"secret-keep-{n}-thread".encode() not in left, n
    assert one.get(T, "keep", "238").thread == f"secret-keep-29-thread {'x' * 38}"
    assert one.get(T, "keep", "80").thread == "secret-keep-10-moved"
    assert list(verify(one.log)) == []


def test_a_compaction_gives_space_back_and_leaves_no_deleted_text(store: Store, tmp_path: Path, clock: Clock) -> None:
    chance = random.Random(3)
    for n in range(600):
        put(store, "ann", str(n), f"secret-{n}-text " + "x" * chance.randrange(0, 1500), np.ones(DIM, np.float32))
    gone = chance.sample(range(600), 400)
    for n in gone:
        store.delete(T, "ann", str(n))
    settle(clock, store)
    before = (tmp_path / "log.db").stat().st_size
    clock.advance(7200)
    assert compact(store.log, micros(clock(), "")) == 400
    store.delete(T, "ann", str(next(n for n in range(600) if n not in gone)))  # the compaction has moved this row
    settle(clock, store)
    left = (tmp_path / "log.db").read_bytes()
    assert len(left) < before / 2
    assert left.count(b"secret-") == 199
    assert files_with(tmp_path, b"secret-") == ["log.db"]
    assert list(verify(store.log)) == []


def test_no_file_holds_an_expired_memory(store: Store, tmp_path: Path, clock: Clock) -> None:
    soon = clock.now + timedelta(seconds=5)
    put(store, "ann", "1", "secret-expired", np.ones(DIM, np.float32), expires_at=soon)
    settle(clock, store)
    assert files_with(tmp_path, b"secret-expired") == []


def test_snapshots_of_other_stores_are_removed(
    open_store: Callable[..., Store], tmp_path: Path, clock: Clock, rng: np.random.Generator
) -> None:
    one, other = open_store(), open_store()
    vectors = rng.normal(size=(100, DIM)).astype(np.float32)
    for n, vector in enumerate(vectors):
        put(one, "ann", str(n), f"text {n}", vector)
    for store in (one, other):
        store.search([Search(T, "ann", vectors[0], 5)])
        settle(clock, store)
    folders = [tmp_path / "snapshots0" / "0", tmp_path / "snapshots1" / "0"]
    assert [len(list(folder.iterdir())) for folder in folders] == [3, 3]
    one.delete(T, "ann", "7")
    assert [len(list(folder.iterdir())) for folder in folders] == [1, 3]
    settle(clock, one, other)
    assert [len(list(folder.iterdir())) for folder in folders] == [1, 1]
    unit = vectors[7] / np.linalg.norm(vectors[7].astype(np.float64))
    assert files_with(tmp_path, unit.astype("<f4").tobytes()[:16]) == []


def test_one_damaged_user_does_not_keep_the_erased_data_of_another(
    open_store: Callable[..., Store], tmp_path: Path, clock: Clock, rng: np.random.Generator
) -> None:
    one, other = open_store(), open_store()
    vectors = rng.normal(size=(100, DIM)).astype(np.float32)
    for user in ("ann", "bob"):
        for n, vector in enumerate(vectors):
            put(one, user, str(n), f"text {n}", vector)
        other.search([Search(T, user, vectors[0], 5)])
    settle(clock, other)
    folder = tmp_path / "snapshots1" / "0"
    assert len(list(folder.iterdir())) == 5
    for user in ("ann", "bob"):
        one.delete(T, user, "7")
    put(one, "ann", "new", "text", vectors[0])
    with one.log.write() as connection:  # damage ann's newest memory
        connection.execute(update(contents).where(contents.c.uid == 1, contents.c.version == 102).values(vector_crc=0))
    settle(clock, other)
    assert [path.name for path in folder.iterdir()] == ["lock"]
    damaged, found = other.search([Search(T, "ann", vectors[0], 5), Search(T, "bob", vectors[7], 1)])
    assert isinstance(damaged, LogDamaged)
    assert isinstance(found, SearchResult) and found.results[0].id != "7"


@pytest.mark.parametrize("whole", [False, True])
def test_a_closing_store_saves_nothing_that_another_store_erased(
    open_store: Callable[..., Store], tmp_path: Path, clock: Clock, rng: np.random.Generator, whole: bool
) -> None:
    one, other = open_store(), open_store()
    vectors = rng.normal(size=(101, DIM)).astype(np.float32)
    for n, vector in enumerate(vectors[:100]):
        put(one, "ann", str(n), f"text {n}", vector)
    other.search([Search(T, "ann", vectors[0], 5)])
    settle(clock, other)
    put(one, "ann", "100", "text 100", vectors[100])
    other.search([Search(T, "ann", vectors[0], 5)])  # the graph has grown since it was saved
    while other.background_step():
        pass
    folder = tmp_path / "snapshots1" / "0"
    assert sorted(path.name for path in folder.iterdir()) == ["1-0-100.hnsw", "1-0-100.rows", "lock"]
    if whole:
        one.erase_user(T, "ann")
    else:
        one.delete(T, "ann", "7")
    other.close()
    left = ["lock"] if whole else ["1-0-102.hnsw", "1-0-102.rows", "lock"]
    assert sorted(path.name for path in folder.iterdir()) == left
    unit = vectors[7] / np.linalg.norm(vectors[7].astype(np.float64))
    assert files_with(folder, unit.astype("<f4").tobytes()[:16]) == []


def word(text: str) -> bytes:
    """The bytes of the hash of a word, as a snapshot holds it."""
    (key,) = keys_of(text)
    return key.to_bytes(8, "little", signed=True)


@pytest.mark.parametrize("how", ["deleted", "erased", "expired"])
def test_no_snapshot_holds_the_hash_of_a_word_that_was_erased(
    open_store: Callable[..., Store], tmp_path: Path, clock: Clock, rng: np.random.Generator, how: str
) -> None:
    one, other = open_store(), open_store()
    vectors = rng.normal(size=(100, DIM)).astype(np.float32)
    end = clock.now + timedelta(hours=1) if how == "expired" else None
    put(one, "ann", "secret", "tea with kowalski", vectors[0], expires_at=end)
    for n, vector in enumerate(vectors[1:]):
        put(one, "ann", str(n), f"tea {n}", vector)
    for store in (one, other):
        store.search([Search(T, "ann", vectors[0], 5, query="kowalski", mode="hybrid")])
        settle(clock, store)
    assert files_with(tmp_path, word("kowalski")) == files_with(tmp_path, word("tea")) == ["1-0-100.rows"] * 2
    if how == "deleted":
        one.delete(T, "ann", "secret")
    elif how == "erased":
        one.erase_user(T, "ann")
    else:
        clock.advance(3600)
    settle(clock, one, other)
    assert files_with(tmp_path, word("kowalski")) == []
    for store in (one, other):
        (found,) = store.search([Search(T, "ann", None, 5, query="kowalski", mode="words")])
        assert isinstance(found, SearchResult)
        assert found.results == []
        store.close()
    assert files_with(tmp_path, word("kowalski")) == []
    assert files_with(tmp_path, word("tea")) == ([] if how == "erased" else ["1-0-101.rows"] * 2)
