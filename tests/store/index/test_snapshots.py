"""Snapshots exist whole or not at all, and are never read before their checksum was verified."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store import Append, IndexOptions, LogDamaged, LogUnavailable, NewMemory, Search, SearchResult, Store
from store.index.snapshots import Name, Snapshots
from store.log.vouching import vouch, vouches
from tests.repetitions import repetitions
from tests.store.conftest import DIM, Clock

T = "default"
OPTIONS = IndexOptions(switch=50)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/log.db"


@pytest.fixture
def vectors(rng: np.random.Generator) -> Any:
    return rng.normal(size=(120, DIM)).astype(np.float32)


def fill(store: Store, vectors: Any) -> None:
    memories = tuple(NewMemory(str(n), f"text {n}", vector) for n, vector in enumerate(vectors))
    store.append([Append(T, "ann", memories, issued_at=store._now())])
    answers(store, vectors)
    while store.background_step():
        pass


def answers(store: Store, vectors: Any) -> list[list[str]]:
    results = store.search([Search(T, "ann", vector, 5) for vector in vectors[:10]])
    return [[memory.id for memory in result.results] for result in results if isinstance(result, SearchResult)]


def add(store: Store, user: str, vectors: Any, numbers: range) -> None:
    new = tuple(NewMemory(str(n), f"{user} {n}", vectors[n]) for n in numbers)
    store.append([Append(T, user, new, issued_at=store._now())])


def grown_since_a_backup(
    open_store: Callable[..., Store], tmp_path: Path, vectors: Any, options: dict[str, Any]
) -> tuple[Store, bytes]:
    """A store in which ann's 50 memories are indexed, and its log as it was when they were 30."""
    store = open_store(**options)
    add(store, "ann", vectors, range(30))
    store.close()
    backup = (tmp_path / "log.db").read_bytes()
    store = open_store(**options)
    add(store, "ann", vectors, range(30, 50))
    store.search([Search(T, "ann", vectors[0], 5)])
    return store, backup


@pytest.mark.parametrize("still_open", [False, True])
def test_after_a_restored_backup_nobody_finds_another_users_memories(
    open_store: Callable[..., Store], tmp_path: Path, vectors: Any, still_open: bool
) -> None:
    """A log that is older than an index gives labels of the index again, to another user."""
    options = {"index": IndexOptions(switch=20), "snapshot_dir": tmp_path / "snapshots"}
    store, backup = grown_since_a_backup(open_store, tmp_path, vectors, options)
    while store.background_step():
        pass
    assert (tmp_path / "snapshots" / "0" / "1-0-50.rows").exists()
    if still_open:
        store.log.engine.dispose()
        (tmp_path / "log.db").write_bytes(backup)
    else:
        store.close()
        (tmp_path / "log.db").write_bytes(backup)
        store = open_store(**options)
    add(store, "bob", vectors, range(20))
    add(store, "ann", vectors, range(50, 75))
    if still_open:
        (first,) = store.search([Search(T, "ann", vectors[0], 100)])
        assert isinstance(first, LogDamaged)
    (result,) = store.search([Search(T, "ann", vectors[0], 100)])
    assert isinstance(result, SearchResult)
    assert {memory.text for memory in result.results} == {f"ann {n}" for n in [*range(30), *range(50, 75)]}


def test_after_a_restored_backup_no_group_of_similar_memories_has_another_users(
    open_store: Callable[..., Store], tmp_path: Path, vectors: Any
) -> None:
    store, backup = grown_since_a_backup(open_store, tmp_path, vectors, {"index": IndexOptions(switch=20)})
    store.log.engine.dispose()
    (tmp_path / "log.db").write_bytes(backup)
    add(store, "bob", vectors, range(20))
    add(store, "ann", vectors, range(50, 75))
    with pytest.raises(LogDamaged):
        store.duplicates(T, "ann", score=0.01, limit=100)
    found = store.duplicates(T, "ann", score=0.01, limit=100)
    assert found.groups
    assert {memory.text.split()[0] for group in found.groups for memory in group} == {"ann"}


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("again", [15, 20, 40])
def test_a_label_that_is_given_again_is_found_by_its_own_vector(
    open_store: Callable[..., Store], tmp_path: Path, vectors: Any, again: int, at_the_end: bool
) -> None:
    """A log that was restored from a backup gives a label again to the same user, while a newer snapshot has it."""
    options = {"index": IndexOptions(switch=20), "snapshot_dir": tmp_path / "snapshots"}
    store, backup = grown_since_a_backup(open_store, tmp_path, vectors, options)
    while store._background._maintain_index() if at_the_end else store.background_step():
        pass
    store.close()
    assert (tmp_path / "snapshots" / "0" / "1-0-50.rows").exists()
    (tmp_path / "log.db").write_bytes(backup)
    store = open_store(**options)
    add(store, "ann", vectors, range(50, 50 + again))
    there = [*range(30), *range(50, 50 + again)]
    for n in there:
        (result,) = store.search([Search(T, "ann", vectors[n], 1)])
        assert isinstance(result, SearchResult)
        assert [(memory.text, memory.score) for memory in result.results] == [(f"ann {n}", 1.0)]
    while store.background_step():
        pass
    store.close()
    kept = open_store(**options)  # snapshots that are saved from here on belong to this log
    (result,) = kept.search([Search(T, "ann", vectors[there[-1]], 100)])
    assert isinstance(result, SearchResult)
    assert (result.results[0].text, len(result.results)) == (f"ann {there[-1]}", len(there))
    assert kept.snapshots is not None
    assert (kept.snapshots.refused, result.index) == (0, "hnsw")


def test_the_log_keeps_the_tokens_of_a_users_newest_snapshots(open_store: Callable[..., Store]) -> None:
    store = open_store()
    with store.log.write() as connection:
        for n in range(70):
            for uid in (1, 2):
                vouch(connection, uid, str(n))
    with store.log.read() as connection:
        assert [n for n in range(70) if vouches(connection, 1, str(n))] == list(range(6, 70))
        assert not vouches(connection, 3, "69")


def test_a_snapshot_that_is_newer_than_the_log_is_removed(
    open_store: Callable[..., Store], tmp_path: Path, clock: Clock, vectors: Any
) -> None:
    store = open_store(index=OPTIONS, snapshot_dir=tmp_path / "snapshots")
    fill(store, vectors[:60])
    store.close()
    backup = (tmp_path / "log.db").read_bytes()
    store = open_store(index=OPTIONS, snapshot_dir=tmp_path / "snapshots")
    late = tuple(NewMemory(f"late {n}", "x", vectors[n]) for n in range(60))
    store.append([Append(T, "ann", late, issued_at=store._now())])
    answers(store, vectors)
    while store.background_step():
        pass
    store.close()
    assert (tmp_path / "snapshots" / "0" / "1-0-120.rows").exists()
    (tmp_path / "log.db").write_bytes(backup)
    store = open_store(index=OPTIONS, snapshot_dir=tmp_path / "snapshots")
    clock.advance(60)
    store.background_step()
    assert [path.name for path in (tmp_path / "snapshots" / "0").iterdir()] == ["lock"]


def test_a_restart_loads_the_snapshot(open_store: Callable[..., Store], tmp_path: Path, vectors: Any) -> None:
    shared, folder = tmp_path / "snapshots", tmp_path / "snapshots" / "0"
    first = open_store(index=OPTIONS, snapshot_dir=shared)
    fill(first, vectors)
    expected = answers(first, vectors)
    assert sorted(path.name for path in folder.iterdir()) == ["1-0-120.hnsw", "1-0-120.rows", "lock"]
    first.append([Append(T, "ann", (NewMemory("late", "x", vectors[0]),), issued_at=first._now())])
    first.close()
    second = open_store(index=OPTIONS, snapshot_dir=shared)
    result = second.search([Search(T, "ann", vectors[0], 2)])[0]
    assert isinstance(result, SearchResult)
    assert (result.index, [memory.id for memory in result.results]) == ("hnsw", ["late", "0"])
    second.delete(T, "ann", "late")
    assert answers(second, vectors) == expected
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_snapshot_of_something_else_is_refused(
    open_store: Callable[..., Store], tmp_path: Path, vectors: Any
) -> None:
    shared, folder = tmp_path / "snapshots", tmp_path / "snapshots" / "0"
    store = open_store(index=OPTIONS, snapshot_dir=shared)
    fill(store, vectors)
    name = Name(1, 0, 120)
    same = {"log_id": store.log.log_id, "model": "fake", "dim": DIM, "options": OPTIONS}
    store.close()

    def verify(name: Name, **other: Any) -> None:
        snapshots = Snapshots(shared, **{**same, **other})
        try:
            snapshots.verify(name)
        finally:
            snapshots.close()

    verify(name)
    for other in ({"log_id": "x"}, {"model": "x"}, {"dim": 4}, {"options": IndexOptions(m=8)}):
        with pytest.raises(ValueError, match="something else"):
            verify(name, **other)
    for suffix in ("rows", "hnsw"):
        (folder / f"1-0-120.{suffix}").rename(folder / f"2-0-120.{suffix}")
    with pytest.raises(ValueError, match="something else"):
        verify(Name(2, 0, 120))


def test_files_of_an_unfinished_write_are_removed(
    open_store: Callable[..., Store], tmp_path: Path, vectors: Any
) -> None:
    shared, folder = tmp_path / "snapshots", tmp_path / "snapshots" / "0"
    store = open_store(index=OPTIONS, snapshot_dir=shared)
    fill(store, vectors)
    store.close()
    for left in ("1-0-130.hnsw.part", "1-0-130.rows.part", "7-0-1.hnsw", "junk"):
        (folder / left).write_bytes(b"x")
    open_store(index=OPTIONS, snapshot_dir=shared)
    assert sorted(path.name for path in folder.iterdir()) == ["1-0-120.hnsw", "1-0-120.rows", "lock"]


def _damage(rng: np.random.Generator, data: bytes) -> bytes:
    """The data truncated, with flipped bits, with a stretch of noise, or with bytes added."""
    damaged = bytearray(data)
    match rng.integers(5):
        case 0:
            del damaged[rng.integers(len(data)) :]
        case 1 | 2:
            for bit in rng.integers(0, 8 * len(data), rng.integers(1, 4)).tolist():
                damaged[bit // 8] ^= 1 << (bit % 8)
        case 3:
            at, size = int(rng.integers(len(data))), int(rng.integers(1, 512))
            damaged[at : at + size] = rng.bytes(len(damaged[at : at + size]))
        case 4:
            damaged += rng.bytes(int(rng.integers(1, 64)))
    return bytes(damaged)


def test_every_damage_is_detected(
    open_store: Callable[..., Store], tmp_path: Path, vectors: Any, rng: np.random.Generator
) -> None:
    shared, folder = tmp_path / "snapshots", tmp_path / "snapshots" / "0"
    store = open_store(index=OPTIONS, snapshot_dir=shared)
    fill(store, vectors)
    store.close()
    snapshots = Snapshots(shared, log_id=store.log.log_id, model="fake", dim=DIM, options=OPTIONS)
    name = Name(1, 0, 120)
    snapshots.verify(name)
    files = [folder / "1-0-120.rows", folder / "1-0-120.hnsw"]
    for path in files:
        sound = path.read_bytes()
        for _ in range(repetitions(5000, quick=800)):
            damaged = _damage(rng, sound)
            if damaged == sound:
                continue
            path.write_bytes(damaged)
            with pytest.raises(ValueError):
                snapshots.verify(name)
        path.write_bytes(sound)
    snapshots.verify(name)
    snapshots.close()


def test_a_damaged_snapshot_is_replaced_from_the_log(
    open_store: Callable[..., Store], tmp_path: Path, vectors: Any, rng: np.random.Generator
) -> None:
    shared, folder = tmp_path / "snapshots", tmp_path / "snapshots" / "0"
    store = open_store(index=OPTIONS, snapshot_dir=shared)
    fill(store, vectors)
    expected = answers(store, vectors)
    store.close()
    sound = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    for round in range(repetitions(60, quick=20)):
        for name, data in sound.items():
            (folder / name).write_bytes(data)
        victim = folder / sorted(sound)[round % 2]
        victim.write_bytes(_damage(rng, victim.read_bytes()))
        if round % 10 == 9:
            victim.unlink()
        fresh = open_store(index=OPTIONS, snapshot_dir=shared)
        assert answers(fresh, vectors) == expected
        assert fresh.snapshots is not None
        if victim.name.endswith("hnsw") or round % 10 != 9:
            assert fresh.snapshots.refused <= 1
        fresh.close()


def test_stores_that_share_a_folder_use_separate_parts_of_it(
    open_store: Callable[..., Store], tmp_path: Path, vectors: Any
) -> None:
    shared = tmp_path / "snapshots"
    one, other = (open_store(index=OPTIONS, snapshot_dir=shared) for _ in range(2))
    fill(one, vectors)
    fill(other, vectors)
    whole = ["1-0-120.hnsw", "1-0-120.rows", "lock"]
    assert [sorted(path.name for path in (shared / n).iterdir()) for n in "01"] == [whole, whole]
    other.close()
    one.delete(T, "ann", "7")
    assert [sorted(path.name for path in (shared / n).iterdir()) for n in "01"] == [["lock"], whole]
    one._background._swept_at = 0
    one.background_step()  # removes stale snapshots from the folders that no store claims
    assert [path.name for path in (shared / "1").iterdir()] == ["lock"]


def test_unfinished_files_of_a_store_that_died_are_removed_by_another(
    open_store: Callable[..., Store], tmp_path: Path, vectors: Any
) -> None:
    shared = tmp_path / "snapshots"
    one, dead, alive = (open_store(index=OPTIONS, snapshot_dir=shared) for _ in range(3))
    fill(dead, vectors)
    dead.close()
    parts = ["1-0-130.hnsw.part", "1-0-130.rows.part", "7-0-1.hnsw"]
    for n in "12":
        for left in parts:
            (shared / n / left).write_bytes(b"x")
    one._background._swept_at = 0
    one.background_step()
    assert sorted(path.name for path in (shared / "1").iterdir()) == ["1-0-120.hnsw", "1-0-120.rows", "lock"]
    assert sorted(path.name for path in (shared / "2").iterdir()) == [
        *parts,
        "lock",
    ]  # this folder belongs to a store that is open
    alive.close()


def test_a_snapshot_holds_no_vector_of_a_dead_row(
    open_store: Callable[..., Store], tmp_path: Path, rng: np.random.Generator
) -> None:
    shared = tmp_path / "snapshots"
    vectors = rng.normal(size=(2000, DIM)).astype(np.float32)
    store = open_store(index=OPTIONS, snapshot_dir=shared)
    fill(store, vectors)
    gone = rng.choice(2000, 300, replace=False).tolist()
    for n in gone:
        store.delete(T, "ann", str(n))
    expected = answers(store, vectors)
    store.close()  # saves the index that was not saved yet
    (graph,) = (shared / "0").glob("*.hnsw")
    data = graph.read_bytes()
    unit = (vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)
    assert unit[next(n for n in range(2000) if n not in gone)].tobytes() in data
    assert not any(unit[n].tobytes() in data for n in gone)
    again = open_store(index=OPTIONS, snapshot_dir=shared)
    assert answers(again, vectors) == expected
    assert again.snapshots is not None
    assert again.snapshots.refused == 0
    left = [n for n in range(2000) if n not in gone]
    hits = again.search([Search(T, "ann", vectors[n], 1) for n in left])
    found = [int(hit.results[0].id) for hit in hits if isinstance(hit, SearchResult)]
    assert np.mean(np.array(found) == left) > 0.995


def test_a_store_works_without_the_folder_of_its_snapshots(
    open_store: Callable[..., Store], tmp_path: Path, vectors: Any, clock: Clock
) -> None:
    store = open_store(index=OPTIONS, snapshot_dir=tmp_path / "snapshots")
    shutil.rmtree(tmp_path / "snapshots")
    store.append([Append(T, "ann", tuple(NewMemory(str(n), "x", v) for n, v in enumerate(vectors)), issued_at=clock())])
    expected = answers(store, vectors)

    def settle() -> None:
        for _ in range(200):
            with suppress(LogUnavailable):  # there is no folder
                store.background_step()

    settle()
    assert answers(store, vectors) == expected
    assert store.user(T, "ann").index == "hnsw"
    store.delete(T, "ann", "7")
    assert store.log.wal_bytes() > 0
    clock.advance(20)
    settle()
    assert store.log.wal_bytes() == 0
    store.close()


def test_a_snapshot_that_could_not_be_written_is_written_on_close(
    open_store: Callable[..., Store], tmp_path: Path, vectors: Any, clock: Clock
) -> None:
    folder = tmp_path / "snapshots" / "0"
    store = open_store(index=OPTIONS, snapshot_dir=tmp_path / "snapshots")
    real = store.snapshots.finish

    def finish(pending: Any) -> None:
        real(pending)
        (folder / "1-0-120.hnsw.part").unlink()

    store.snapshots.finish = finish
    with pytest.raises(LogUnavailable, match="snapshot"):
        fill(store, vectors)
    store.snapshots.finish = real
    while store.background_step():
        pass
    assert [path.name for path in folder.iterdir()] == ["lock"]
    store.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1-0-120.hnsw", "1-0-120.rows", "lock"]


def by_words(store: Store, query: str) -> list[str]:
    (result,) = store.search([Search(T, "ann", None, 5, query=query, mode="words")])
    assert isinstance(result, SearchResult), result
    return [memory.id for memory in result.results]


def refuse_to_read_all_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.log.reading.texts", None)


def test_a_restart_loads_the_words(
    open_store: Callable[..., Store], tmp_path: Path, vectors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"index": OPTIONS, "snapshot_dir": tmp_path / "snapshots"}
    store = open_store(**options)
    add(store, "ann", vectors, range(120))
    assert by_words(store, "117") == ["117"]
    while store.background_step():
        pass
    store.update(T, "ann", "119", text="a heron", vector=vectors[119])
    store.close()
    refuse_to_read_all_texts(monkeypatch)
    again = open_store(**options)
    assert by_words(again, "herons") == ["119"]
    assert by_words(again, "117") == ["117"]
    again.delete(T, "ann", "117")
    assert by_words(again, "117") == []


@pytest.mark.parametrize("reason", ["no words were needed", "written before there were words", "other tokens"])
def test_words_that_a_snapshot_lacks_are_read_from_the_log_and_saved(
    open_store: Callable[..., Store], tmp_path: Path, vectors: Any, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    options = {"index": OPTIONS, "snapshot_dir": tmp_path / "snapshots"}
    with monkeypatch.context() as patched:
        if reason == "other tokens":
            patched.setattr("store.index.tokens.VERSION", "0")
        if reason == "written before there were words":
            patched.setattr("store.index.snapshots._names_and_lengths", lambda arrays: [*map(len, arrays.values())])
            patched.setattr("store.index.snapshots._PLACES", {})  # nor were there places
            patched.setattr("store.index.timeline.Timeline.places_of", lambda *_: ())
        store = open_store(**options)
        add(store, "ann", vectors, range(120))
        store.search([Search(T, "ann", vectors[0], 5)])
        if reason == "other tokens":
            by_words(store, "ann")
        while store.background_step():
            pass
        store.close()
    path = tmp_path / "snapshots" / "0" / "1-0-120.rows"
    before = path.read_bytes()
    store = open_store(**options)
    (found,) = store.search([Search(T, "ann", vectors[7], 1, query="ann 7", mode="hybrid")])
    assert isinstance(found, SearchResult)
    assert store.snapshots is not None
    assert (found.index, found.results[0].id, store.snapshots.refused) == ("hnsw", "7", 0)
    while store.background_step():
        pass
    assert path.read_bytes() != before
    store.close()
    refuse_to_read_all_texts(monkeypatch)
    assert by_words(open_store(**options), "7") == ["7"]
