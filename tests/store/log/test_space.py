"""The space of erased rows is given back while stores serve the log, and no file keeps an erased text."""

from __future__ import annotations

import random
import re
import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import func, select

from store import Append, Conflict, IndexOptions, NewMemory, NotFound, Search, SearchResult, Store
from store.log import space
from store.log.database import Log
from store.log.erasing import BLANK_SPACE, erased_bytes
from store.log.maintenance import compact, count, verify
from store.log.rows import micros
from store.log.schema import contents
from tests.repetitions import repetitions
from tests.store.conftest import DIM, Clock

T = "default"
EYE = np.eye(DIM, dtype=np.float32)
SECRET = re.compile(rb"secret-[0-9]+-[tm]")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/log.db"


def settle(store: Store, clock: Clock, seconds: float = 20) -> None:
    """Run the background work of the next seconds, as a store does that is idle."""
    clock.advance(seconds / 2)
    for _ in range(2):
        while store.background_step():
            pass
        clock.advance(seconds / 2)


def secrets_in(folder: Path) -> set[bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {secret for path in files for secret in SECRET.findall(path.read_bytes())}


def readable_secrets(store: Store, users: list[str]) -> set[bytes]:
    """The secrets in the memories of these users and in their histories."""
    found: set[bytes] = set()
    for user in users:
        try:
            lines = list(store.export(T, user))
        except NotFound:
            continue
        found |= {secret for line in lines for secret in SECRET.findall(line)}
    return found


class History:
    """Random writes of two users. Each text and each metadata holds a secret of its own."""

    USERS = ("ann", "bob")

    def __init__(self, store: Store, seed: int) -> None:
        self.store = store
        self.chance = random.Random(seed)
        self.number = 0
        self.large = self.chance.choice([0.0, 0.02, 0.3])  # the share of texts that continue on overflow pages

    def memory(self, id: int) -> NewMemory:
        self.number += 1
        length = self.chance.randrange(6000) if self.chance.random() < self.large else self.chance.randrange(900)
        text = f"secret-{self.number}-t " + self.chance.choice("xyzä") * length
        vector = np.array([self.number, *self.chance.choices(range(1, 9), k=DIM - 1)], np.float32)
        return NewMemory(str(id), text, vector, {"m": f"secret-{self.number}-m"})

    def write(self) -> None:
        user = self.chance.choice(self.USERS)
        match self.chance.choices(["add", "delete", "delete_where", "erase"], [60, 30, 9, 1])[0]:
            case "add":
                ids = self.chance.sample(range(60), self.chance.randrange(1, 12))
                memories = tuple(self.memory(id) for id in ids)
                call = Append(T, user, memories, upsert=True, issued_at=self.store._now())
                (result,) = self.store.append([call])
                assert not isinstance(result, Exception), result
            case "delete":
                with suppress(NotFound):
                    self.store.delete(T, user, str(self.chance.randrange(60)))
            case "delete_where":
                ids = [str(id) for id in self.chance.sample(range(60), 20)]
                with suppress(NotFound):
                    self.store.delete_where(T, user, {"id": {"in": ids}})
            case "erase":
                with suppress(NotFound):
                    self.store.erase_user(T, user)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free even little space, in steps of a few rows."""
    monkeypatch.setattr(space, "_SPARE_BYTES", 0)
    monkeypatch.setattr(space, "_MOVED", 5)
    monkeypatch.setattr(space, "_TOMBSTONES", 3)
    monkeypatch.setattr(space, "_CUT_PAGES", 3)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("seed", range(repetitions(6, quick=3)))
def test_files_hold_the_texts_that_can_be_read_and_no_other(
    sqlite_url: str, tmp_path: Path, clock: Clock, seed: int
) -> None:
    store = Store.open(sqlite_url, dim=DIM, model="fake", now=clock, index=IndexOptions(switch=50))
    with closing(store):
        history = History(store, seed)
        steps = 0
        for _ in range(repetitions(12, quick=5)):
            for _ in range(25):
                history.write()
                if history.chance.random() < 0.3:
                    steps += space.Space(store.log).step(micros(clock(), ""))
            settle(store, clock, history.chance.choice([20, 4000]))
            readable = readable_secrets(store, list(History.USERS))
            assert secrets_in(tmp_path) == readable
        assert list(verify(store.log)) == []
        assert steps > 10
        with store.log.read() as connection:
            beginning = connection.execute(select(func.min(contents.c.cid))).scalar_one()
        assert beginning > 100  # the first pages were given back


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("seed", range(repetitions(4, quick=2)))
def test_a_crash_in_a_step_leaves_no_erased_text(sqlite_url: str, tmp_path: Path, clock: Clock, seed: int) -> None:
    """The machine stops while a step is written: the end of the write-ahead log is missing."""
    store = Store.open(sqlite_url, dim=DIM, model="fake", now=clock, index=IndexOptions(switch=50))
    crashes = 0
    with closing(store):
        history = History(store, seed)
        path, wal = tmp_path / "log.db", tmp_path / "log.db-wal"
        turns = repetitions(40, quick=12)
        for turn in range(turns):
            assert store.log.truncate_wal()
            for _ in range(10):
                history.write()
            before = path.read_bytes(), wal.read_bytes()
            space.Space(store.log).step(micros(clock(), ""))
            if path.read_bytes() != before[0] or wal.stat().st_size <= len(before[1]):
                continue  # there was nothing to do
            crashes += 1
            crashed = tmp_path / f"crashed{turn}"
            crashed.mkdir()
            shutil.copy(path, crashed / "log.db")
            cut = history.chance.randrange(len(before[1]), wal.stat().st_size)
            (crashed / "log.db-wal").write_bytes(wal.read_bytes()[:cut])
            again = Store.open(f"sqlite:///{crashed}/log.db", dim=DIM, model="fake", now=clock)
            with closing(again):
                assert readable_secrets(again, list(History.USERS)) == readable_secrets(store, list(History.USERS))
                settle(again, clock)
                assert list(verify(again.log)) == []
                assert secrets_in(crashed) == readable_secrets(again, list(History.USERS))
            shutil.rmtree(crashed)
    assert crashes > turns // 4


def refresh(store: Store, turn: int, count: int, dim: int, *, upsert: bool) -> None:
    """Add memories of about 2 kB each, as a caller does whose documents have changed."""
    rng = np.random.default_rng(turn)
    vectors = rng.normal(size=(count, dim)).astype(np.float32)
    for start in range(0, count, 100):
        part = range(start, start + 100)
        memories = tuple(NewMemory(str(n), f"{n} {turn} " + "word " * 90, vectors[n], {"n": n}) for n in part)
        (result,) = store.append([Append(T, "ann", memories, upsert=upsert, issued_at=store._now())])
        assert not isinstance(result, Exception), result


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def used_bytes(log: Log, *, with_history: bool) -> int:
    """The bytes of live texts, metadata and vectors, and of those in histories."""
    written = contents.c.blank == 0
    size = func.length(contents.c.text) + func.length(contents.c.metadata) + func.length(contents.c.embedding)
    with log.read() as connection:
        current = written if with_history else written & (func.length(contents.c.embedding) > 0)
        return int(connection.execute(select(func.sum(size)).where(current)).scalar_one())


@pytest.mark.parametrize("upsert", [False, True])
def test_changed_refreshes_use_the_space_of_what_they_replace(
    sqlite_url: str, tmp_path: Path, clock: Clock, upsert: bool
) -> None:
    """Once the file was 80 MB for 2 MB of live memories. Replaced texts stay in the history, without their vectors."""
    with closing(Store.open(sqlite_url, dim=384, model="fake", now=clock)) as store:
        for turn in range(repetitions(19, quick=8)):
            if turn and not upsert:
                store.delete_where(T, "ann", {"n": {"exists": True}})
            refresh(store, turn, 500, 384, upsert=upsert)
            settle(store, clock)
        live = used_bytes(store.log, with_history=False)
        assert 950_000 < live < 1_100_000
        assert file_bytes(tmp_path) < 3 * used_bytes(store.log, with_history=True) + (3 << 20)
        settle(store, clock, 7200)
        settle(store, clock)
        assert file_bytes(tmp_path) < 3 * used_bytes(store.log, with_history=True) + (3 << 20)
        assert list(verify(store.log)) == []


def test_many_deletions_make_the_file_small(sqlite_url: str, tmp_path: Path, clock: Clock) -> None:
    """Once the file stayed at 227 MB for 100 live memories after 100,000 deletions."""
    with closing(Store.open(sqlite_url, dim=384, model="fake", now=clock)) as store:
        refresh(store, 0, 5000, 384, upsert=False)
        full = file_bytes(tmp_path)
        assert store.delete_where(T, "ann", {"NOT": {"n": {"lt": 100}}}) == 4900
        settle(store, clock)
        settle(store, clock)
        assert file_bytes(tmp_path) < full / 3  # tombstones are kept for an hour
        settle(store, clock, 7200)
        settle(store, clock)
        assert file_bytes(tmp_path) < 3 * used_bytes(store.log, with_history=False) + (2 << 20)
        assert count(store.log).tombstones == 0
        assert len(store.list(T, "ann", limit=1000).memories) == 100
        assert list(verify(store.log)) == []


def test_the_steps_end_with_texts_whose_characters_take_several_bytes(sqlite_url: str, clock: Clock) -> None:
    """Once the space of each moved row was counted in characters, so that rows were moved for ever."""
    with closing(Store.open(sqlite_url, dim=384, model="fake", now=clock)) as store:
        vectors = np.random.default_rng(1).normal(size=(2000, 384)).astype(np.float32)
        for start in range(0, 2000, 500):
            part = tuple(NewMemory(str(n), f"{n} " + 300 * "漢", vectors[n]) for n in range(start, start + 500))
            store.append([Append(T, "ann", part, issued_at=store._now())])
        store.delete_many(T, "ann", [str(n) for n in range(2000) if n % 2])
        steps, freed = 0, space.Space(store.log)
        while freed.step(micros(clock(), "")):
            steps += 1
            assert steps < 100
        with store.log.read() as connection:
            blank = connection.execute(select(func.sum(BLANK_SPACE)).where(contents.c.blank == 1)).scalar_one()
            assert erased_bytes(connection) == blank


def test_rows_that_have_to_stay_are_looked_at_once(
    sqlite_url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few blank rows stay at the beginning, whatever their size. To look at them takes the lock and reads them."""
    looks: list[bool] = []
    move = space._move_the_beginning
    monkeypatch.setattr(space, "_move_the_beginning", lambda *given: looks.append(move(*given)) or looks[-1])
    with closing(Store.open(sqlite_url, dim=DIM, model="fake", now=clock)) as store:
        part = tuple(NewMemory(str(n), f"{n} " + 400_000 * "x", EYE[0]) for n in range(12))
        store.append([Append(T, "ann", part, issued_at=clock())])
        store.delete_many(T, "ann", [str(n) for n in range(11)])
        settle(store, clock)
        assert looks == [False]
        settle(store, clock)
        assert looks == [False]
        store.delete(T, "ann", "11")
        settle(store, clock)
        assert len(looks) == 2


@pytest.mark.usefixtures("eager")
def test_a_log_without_movable_pages_uses_its_free_pages_until_it_is_compacted(
    sqlite_url: str, tmp_path: Path, clock: Clock
) -> None:
    """Logs of older versions are such. Their files cannot be cut off while they are served."""
    Log.open(sqlite_url).close()
    with closing(sqlite3.connect(tmp_path / "log.db")) as connection:
        connection.executescript("PRAGMA journal_mode=DELETE; PRAGMA auto_vacuum=NONE; VACUUM")
    with closing(Store.open(sqlite_url, dim=DIM, model="fake", now=clock)) as store:
        assert not store.log.pages().can_be_cut
        full = 0
        for turn in range(6):
            refresh(store, turn, 200, DIM, upsert=False)
            full = full or file_bytes(tmp_path)
            store.delete_where(T, "ann", {"n": {"exists": True}})
            settle(store, clock)
        assert file_bytes(tmp_path) < 2 * full
        settle(store, clock, 7200)
        compact(store.log, micros(clock(), ""))
        assert store.log.pages().can_be_cut
        assert file_bytes(tmp_path) < full / 2


def test_old_tombstones_are_removed_while_stores_serve(
    pair: tuple[Store, Store], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late writes are still refused, and an index that missed the deletions is built again."""
    one, other = pair
    memories = tuple(NewMemory(str(n), f"ann {n}", EYE[n % DIM] + n * EYE[0]) for n in range(20))
    one.append([Append(T, "ann", memories, issued_at=one._now())])
    before = clock.now
    for store in pair:
        store.search([Search(T, "ann", EYE[0], 5)])
    one.delete(T, "ann", "3")
    version = one.delete(T, "ann", "4")
    settle(one, clock, 3000)
    assert count(one.log).tombstones == 2
    one.search([Search(T, "ann", EYE[0], 5)])
    kept = one.resident.get(1)
    settle(one, clock, 4000)  # the other store did nothing meanwhile
    assert (count(one.log).tombstones, count(one.log).superseded) == (0, 0)
    assert list(verify(one.log)) == []
    stale = other.resident.get(1)
    for store in pair:
        (result,) = store.search([Search(T, "ann", EYE[0], 100)])
        assert isinstance(result, SearchResult)
        assert {memory.id for memory in result.results} == {str(n) for n in range(20)} - {"3", "4"}
        assert result.version == version
    assert one.resident.get(1) is kept  # it had applied the deletions before
    assert other.resident.get(1) is not stale
    (late,) = other.append([Append(T, "ann", (NewMemory("3", "ann 3", EYE[3]),), issued_at=before)])
    assert isinstance(late, Conflict) and late.code == "erased"
    (new,) = other.append([Append(T, "ann", (NewMemory("3", "ann 3", EYE[3]),), issued_at=clock())])
    assert not isinstance(new, Exception) and [one.status for one in new.memories] == ["added"]


def test_postgresql_keeps_no_erased_rows(postgres_url: str, clock: Clock) -> None:
    """Rows are deleted, so that a vacuum can free their space, and no transaction stays open that would prevent it."""
    with closing(Store.open(postgres_url, dim=DIM, model="fake", now=clock)) as store:
        for turn in range(3):
            refresh(store, turn, 100, DIM, upsert=True)
        store.delete_where(T, "ann", {"n": {"gte": 10}})
        with store.log.read() as connection:
            sizes = select(func.length(contents.c.embedding), func.count()).group_by(func.length(contents.c.embedding))
            assert {size: number for size, number in connection.execute(sizes)} == {0: 20, 4 * DIM: 10}
        settle(store, clock, 7200)
        assert count(store.log).tombstones == 0
        with store.log.engine.connect() as connection:
            open_transactions = connection.exec_driver_sql(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND starts_with(state, 'idle in transaction') AND pid <> pg_backend_pid()"
            ).scalar_one()
        assert open_transactions == 0
