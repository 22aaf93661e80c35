"""Exports and imports as NDJSON, on SQLite and PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from store import (
    Append,
    Conflict,
    Deduplicator,
    Imported,
    InvalidInput,
    NewMemory,
    NotFound,
    Search,
    SearchResult,
    Store,
    parse_lines,
)
from store.log import export, importing
from store.log.database import Log
from store.log.export import PAGE
from store.log.maintenance import count, verify
from tests.store.conftest import DIM, Clock

T = "default"


def fill(store: Store, clock: Clock, count: int = 450) -> None:
    """Add several pages of memories with history, deleted ones among them, and awkward values."""
    rng = np.random.default_rng(1)
    vectors = (rng.normal(size=(count, DIM)) * rng.choice([1e-6, 1, 1e6], size=(count, 1))).astype(np.float32)
    for first in range(0, count, 150):
        made = tuple(
            NewMemory(
                f"id {n} ä",
                f'text "{n}"\n\u2028 日本',
                vectors[n],
                {"z": n, "a": [1.5, -0.0, 1e300, None, True], "ü": {"k": "\\"}} if n % 3 else {},
                clock.now + timedelta(days=n) if n % 5 == 0 and n else None,
            )
            for n in range(first, first + 150)
        )
        store.append([Append(T, "ann", made, issued_at=store._now())])
    for n in range(0, count, 7):
        store.update(T, "ann", f"id {n} ä", text=f"changed {n}", vector=vectors[n] * 2)
    for n in range(0, count, 14):
        store.update(T, "ann", f"id {n} ä", metadata={"again": n})
    for n in range(5, count, 11):
        store.delete(T, "ann", f"id {n} ä")
    for n in range(5, count, 22):
        store.append([Append(T, "ann", (NewMemory(f"id {n} ä", "back", vectors[n]),), issued_at=store._now())])


def test_pages_of_an_export_and_of_an_import_are_bounded_by_bytes(
    open_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts, superseded states and vectors count. A page has at least one line."""
    monkeypatch.setattr(export, "PAGE_BYTES", 10_000)
    monkeypatch.setattr(importing, "PAGE_BYTES", 10_000)
    store = open_store()
    sizes = [3000, 3000, 3000, 3000, 40_000, 10, 10]
    made = tuple(NewMemory(str(n), "ä" * (size // 2), np.ones(DIM, np.float32)) for n, size in enumerate(sizes))
    store.append([Append(T, "ann", made, issued_at=store._now())])
    for n in range(4):
        store.update(T, "ann", "5", text=f"{n}" * 4000, vector=np.ones(DIM, np.float32))
    pages, cursor = [], None
    while not pages or cursor is not None:
        page = store.export_page(T, "ann", cursor)
        pages.append([orjson.loads(line)["id"] for line in page.lines])
        cursor = page.next_cursor
    assert pages == [["0", "1", "2", "3"], ["4"], ["6", "5"], []]
    lines = list(store.export(T, "ann"))
    parsed = list(parse_lines(lines, store._now))
    assert [[line.id for line in page] for page in importing.pages(parsed)] == [["0", "1", "2", "3", "4"], ["6", "5"]]
    assert store.import_lines(T, "bob", lines) == Imported(7, 0)
    assert list(store.export(T, "bob")) == lines


def test_export_import_export_is_the_same_byte_for_byte(
    open_store: Callable[..., Store], clock: Clock, tmp_path: Path, url: str
) -> None:
    store = open_store()
    fill(store, clock)
    first = b"".join(store.export(T, "ann"))
    lines = first.splitlines(keepends=True)
    assert len(lines) == store.user(T, "ann").memories

    assert store.import_lines(T, "bob", lines) == Imported(len(lines), 0)
    assert b"".join(store.export(T, "bob")) == first
    assert store.import_lines(T, "bob", lines) == Imported(0, len(lines))

    query = np.ones(DIM, np.float32)
    before = store.search([Search(T, "ann", query, 50)])[0]
    store.erase_user(T, "ann")
    assert store.import_lines(T, "ann", lines) == Imported(len(lines), 0)
    assert b"".join(store.export(T, "ann")) == first
    after = store.search([Search(T, "ann", query, 50)])[0]
    assert isinstance(before, SearchResult)
    assert isinstance(after, SearchResult)
    assert after.results == before.results

    other = Store.open(f"sqlite:///{tmp_path}/other.db", dim=DIM, model="fake", now=clock)
    parts = [lines[at : at + 100] for at in range(0, len(lines), 100)]  # as a gateway sends them
    assert sum(other.import_lines("t2", "carl", part).imported for part in parts) == len(lines)
    assert b"".join(other.export("t2", "carl")) == first
    assert other.history("t2", "carl", "id 14 ä") == store.history(T, "ann", "id 14 ä")
    other.close()
    log = Log.open(url)
    assert list(verify(log)) == []
    log.close()


def test_an_export_holds_each_memory_once_while_others_write(open_store: Callable[..., Store], clock: Clock) -> None:
    store, writer = open_store(), open_store()
    fill(store, clock)
    ids = {orjson.loads(line)["id"] for line in store.export(T, "ann")}
    lines = store.export(T, "ann")
    given = [next(lines)]  # the first page is read
    for n in range(0, 420, 3):
        if f"id {n} ä" in ids:
            writer.update(T, "ann", f"id {n} ä", metadata={"late": n})
    gone = [f"id {n} ä" for n in (400, 401)]
    for id in gone:
        writer.delete(T, "ann", id)
    writer.append([Append(T, "ann", (NewMemory("late", "late", np.ones(DIM)),), issued_at=clock())])
    given += lines
    assert sorted(orjson.loads(line)["id"] for line in given) == sorted(ids - set(gone))
    versions = [orjson.loads(line)["version"] for line in given]
    assert versions == sorted(set(versions))

    assert store.import_lines(T, "bob", given) == Imported(len(given), 0)
    assert list(store.export(T, "bob")) == given


def test_an_export_of_a_user_that_is_erased_meanwhile_fails(store: Store, clock: Clock) -> None:
    fill(store, clock)
    lines = store.export(T, "ann")
    next(lines)
    store.erase_user(T, "ann")
    with pytest.raises(Conflict):
        list(lines)


def test_each_page_starts_after_the_one_before(store: Store, clock: Clock) -> None:
    fill(store, clock)
    deduplicator, given, cursor = Deduplicator(), [], None
    while True:
        page = store.export_page(T, "ann", cursor)
        given += deduplicator.new_lines(page)
        if (cursor := page.next_cursor) is None:
            break
    assert given == list(store.export(T, "ann"))


def test_an_import_does_not_restore_what_was_erased_after_it_was_sent(store: Store) -> None:
    line, other = (orjson.dumps({"id": id, "text": "tea", "vector": [1.0] * DIM}) for id in "12")
    sent = store._now()
    store.import_lines(T, "ann", [line, other], issued_at=sent)
    store.delete(T, "ann", "1")
    with pytest.raises(Conflict) as late:
        store.import_lines(T, "ann", [other, line], first=7, begin=False, issued_at=sent)
    assert (late.value.param, late.value.code) == ("8.id", "deleted")
    assert store.import_lines(T, "ann", [line], begin=False, issued_at=store._now()) == Imported(1, 0)
    store.erase_user(T, "ann")
    with pytest.raises(Conflict) as late:
        store.import_lines(T, "ann", [other], first=9, begin=False, issued_at=sent)
    assert (late.value.param, late.value.code) == ("9", "erased")
    assert store.user(T, "ann").memories == 0


def test_a_line_holds_everything(store: Store, clock: Clock) -> None:
    vector = np.array([0.1, -0.0, 1e-30, 3, 0, 0, 0, 16777216], np.float32)
    store.append([Append(T, "ann", (NewMemory("1", "old", vector),), issued_at=store._now())])
    store.update(T, "ann", "1", text="new", vector=vector, metadata={"b": 1, "a": 2})
    (line,) = store.export(T, "ann")
    memory = store.get(T, "ann", "1")

    def written(moment: Any) -> str:
        return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")

    assert line.endswith(b"\n")
    assert orjson.loads(line) == {
        "id": "1",
        "text": "new",
        "metadata": {"b": 1, "a": 2},
        "created_at": written(memory.created_at),
        "updated_at": written(memory.updated_at),
        "expires_at": None,
        "version": 2,
        "event": "updated",
        "history": [{"event": "added", "at": written(memory.created_at), "version": 1, "text": "old", "metadata": {}}],
        "model": "fake",
        "vector": [0.1, -0.0, 1e-30, 3.0, 0.0, 0.0, 0.0, 16777216.0],
    }


def test_importing_into_a_user_with_memories_gives_new_versions(store: Store, clock: Clock) -> None:
    fill(store, clock)
    lines = list(store.export(T, "ann"))
    store.append([Append(T, "bob", tuple(NewMemory(str(n), "own", np.ones(DIM)) for n in range(9)), issued_at=clock())])
    assert store.search([Search(T, "bob", np.ones(DIM), 100)])[0].version == 9  # type: ignore[union-attr]
    assert store.import_lines(T, "bob", lines) == Imported(len(lines), 0)
    result = store.search([Search(T, "bob", np.ones(DIM), 1000)])[0]
    assert isinstance(result, SearchResult)
    assert len(result.results) == len(lines) + 9
    mine = [(event.event, event.text) for event in store.history(T, "ann", "id 14 ä")]
    theirs = [(event.event, event.text) for event in store.history(T, "bob", "id 14 ä")]
    assert mine == theirs
    assert [event.text for event in store.history(T, "bob", "3")] == ["own"]


def test_searches_find_a_deleted_memory_that_is_imported_again(open_store: Callable[..., Store], clock: Clock) -> None:
    stores = open_store(), open_store()
    vectors = np.eye(DIM, dtype=np.float32)
    made = tuple(NewMemory(f"m{n}", f"text {n}", vectors[n]) for n in range(3))
    stores[0].append([Append(T, "ann", made, issued_at=clock())])
    lines = list(stores[0].export(T, "ann"))

    def found(store: Store) -> list[str]:
        (answer,) = store.search([Search(T, "ann", vectors[1])])
        assert isinstance(answer, SearchResult)
        return sorted(memory.id for memory in answer.results)

    assert found(stores[0]) == found(stores[1]) == ["m0", "m1", "m2"]  # both indexes are resident
    stores[0].delete(T, "ann", "m1")
    assert stores[0].import_lines(T, "ann", lines) == Imported(1, 2)
    assert found(stores[0]) == found(stores[1]) == ["m0", "m1", "m2"]
    assert [event.event for event in stores[0].history(T, "ann", "m1")] == ["added"]
    assert list(verify(stores[0].log)) == []


def test_the_exports_of_two_users_can_be_imported_as_one(store: Store, clock: Clock) -> None:
    vectors = np.eye(DIM, dtype=np.float32)
    lines = []
    for user, versions in (("ann", (1, 3)), ("bob", (3, 8))):  # a version of ann's memory is in bob's history as well
        made = tuple(NewMemory(f"{user} {n}", f"{user} {n}", vectors[n]) for n in range(versions[0]))
        store.append([Append(T, user, made, issued_at=clock())])
        for n in range(versions[1] - versions[0]):
            store.update(T, user, f"{user} {versions[0] - 1}", text=f"{user} again {n}", vector=vectors[n])
        lines += list(store.export(T, user))
    assert store.import_lines(T, "eva", lines) == Imported(4, 0)
    assert {memory.id for memory in store.list(T, "eva").memories} == {"ann 0", "bob 0", "bob 1", "bob 2"}
    assert [event.text for event in store.history(T, "eva", "bob 2")] == [
        "bob 2",
        *(f"bob again {n}" for n in range(5)),
    ]
    assert list(verify(store.log)) == []


def test_an_erased_state_gets_no_text_from_another_history(store: Store, clock: Clock) -> None:
    vectors = np.eye(DIM, dtype=np.float32)

    def add(user: str, id: str) -> None:
        store.append([Append(T, user, (NewMemory(id, f"{user} {id}", vectors[0]),), issued_at=clock())])

    add("ann", "x")
    store.delete(T, "ann", "x")
    add("ann", "x")  # 3, after 1 and 2 without a text
    add("bob", "y")
    store.update(T, "bob", "y", text="bob again", vector=vectors[1])
    add("bob", "other")
    store.delete(T, "bob", "other")
    store.update(T, "bob", "y", text="bob at last", vector=vectors[2])  # 5, after 1 and 2
    pasts = {
        (user, id): [(event.event, event.text) for event in store.history(T, user, id)]
        for user, id in (("ann", "x"), ("bob", "y"))
    }
    assert [text for _, text in pasts["ann", "x"]] == [None, None, "ann x"]
    for name, first, then in (("eva", "ann", "bob"), ("fay", "bob", "ann")):
        for user in (first, then):
            assert store.import_lines(T, name, store.export(T, user)) == Imported(1, 0)
        for (_, id), past in pasts.items():
            assert [(event.event, event.text) for event in store.history(T, name, id)] == past
        store.delete(T, name, "x")
        assert [event.text for event in store.history(T, name, "y")] == ["bob y", "bob again", "bob at last"]
    both = [*store.export(T, "ann"), *store.export(T, "bob")]
    assert store.import_lines(T, "gil", both) == Imported(2, 0)  # in one page
    assert [(event.event, event.text) for event in store.history(T, "gil", "x")] == pasts["ann", "x"]
    assert list(verify(store.log)) == []


def test_a_history_with_the_version_of_a_tombstone_gets_new_versions(store: Store, clock: Clock) -> None:
    vector = np.ones(DIM, np.float32)
    for id in ("kept", "gone"):
        store.append([Append(T, "ann", (NewMemory(id, id, vector),), issued_at=clock())])
    store.delete(T, "ann", "gone")  # 3
    past = {"event": "added", "at": "2026-01-01T00:00:00Z", "version": 3, "text": "old", "metadata": {}}
    line = {"id": "new", "text": "new", "vector": [1.0] * DIM, "version": 9, "event": "updated", "history": [past]}
    assert store.import_lines(T, "ann", [orjson.dumps(line)]) == Imported(1, 0)
    events = [(event.version, event.text) for event in store.history(T, "ann", "new")]
    assert events == [(4, "old"), (5, "new")]
    assert [event.text for event in store.history(T, "ann", "gone")] == [None, None]


def test_times_of_a_line_may_be_ahead_by_the_difference_of_two_clocks(store: Store, clock: Clock) -> None:
    at = (clock.now + timedelta(minutes=0.9)).isoformat()
    past = [{"event": "added", "at": at, "version": 1, "text": "t", "metadata": {}}]
    line = {"id": "1", "text": "tea", "vector": [1.0] * DIM, "version": 2, "history": past}
    line |= {"created_at": at, "updated_at": at, "expires_at": "2100-01-01T00:00:00Z"}
    assert store.import_lines(T, "ann", [orjson.dumps(line)]) == Imported(1, 0)


def test_a_minimal_line_is_enough(store: Store) -> None:
    line = orjson.dumps({"id": "1", "text": "tea", "vector": [1.0] * DIM})
    assert store.import_lines(T, "ann", [line, b"\n", b""]) == Imported(1, 0)
    assert store.get(T, "ann", "1").text == "tea"


def test_null_in_a_line_stands_for_a_field_that_is_left_out(store: Store) -> None:
    line = {"id": "1", "text": "tea", "vector": [1.0] * DIM}
    names = ("metadata", "created_at", "updated_at", "expires_at", "version", "event", "history", "model")
    store.import_lines(T, "ann", [json.dumps(line).encode()])
    store.import_lines(T, "bob", [json.dumps({**line, **dict.fromkeys(names)}).encode()])
    (plain,), (nulls,) = (list(store.export(T, user)) for user in ("ann", "bob"))
    fields, given = json.loads(plain), json.loads(nulls)
    for name in ("created_at", "updated_at"):
        assert fields.pop(name) <= given.pop(name)
    assert given == fields


def test_an_expired_line_is_imported_and_then_deleted(store: Store, clock: Clock) -> None:
    """An old export can be imported. The memories that have expired since are gone at once."""
    memories = tuple(
        NewMemory(id, f"text {id}", np.ones(DIM, np.float32), expires_at=clock.now + timedelta(seconds=seconds))
        for id, seconds in (("1", 5), ("2", 500))
    )
    store.append([Append(T, "ann", memories, issued_at=clock.now)])
    lines = list(store.export(T, "ann"))
    clock.advance(10)
    assert store.import_lines(T, "bob", lines) == Imported(2, 0)
    assert list(store.export(T, "bob")) == lines[1:]
    while store.background_step():
        pass
    assert store.user(T, "bob").memories == 1


def purge(store: Store, clock: Clock) -> None:
    """Delete expired memories, as an idle store does each second."""
    clock.advance(2)
    while store.background_step():
        pass


def expiring(clock: Clock, id: str, seconds: float | None) -> bytes:
    end = None if seconds is None else (clock.now + timedelta(seconds=seconds)).isoformat()
    return orjson.dumps({"id": id, "text": f"text {id}", "vector": [1.0] * DIM, "expires_at": end})


@pytest.mark.parametrize("kept", [True, False])
def test_an_import_is_repeated_after_some_of_its_memories_have_expired(store: Store, clock: Clock, kept: bool) -> None:
    lines = [expiring(clock, "1", 5), expiring(clock, "2", 500 if kept else 6)]
    sent = clock()
    assert store.import_lines(T, "ann", lines, issued_at=sent) == Imported(2, 0)
    clock.advance(10)
    purge(store, clock)
    left = list(store.export(T, "ann"))
    history = store.history(T, "ann", "1")
    for again in (sent, clock(), None):
        for begin in (True, False):
            done = store.import_lines(T, "ann", lines, begin=begin, issued_at=again)
            assert done.imported + done.unchanged == 2
            if again == sent:
                assert done == Imported(0, 2)
                assert store.history(T, "ann", "1") == history
            purge(store, clock)
            assert list(store.export(T, "ann")) == left
    assert list(verify(store.log)) == []


def test_an_import_is_not_refused_because_another_memory_has_expired(store: Store, clock: Clock) -> None:
    """If a user's last memory expires after the import was sent, the user was not erased."""
    store.import_lines(T, "ann", [expiring(clock, "old", 5)], issued_at=clock())
    sent = clock()
    clock.advance(10)
    purge(store, clock)
    assert store.import_lines(T, "ann", [expiring(clock, "new", None)], issued_at=sent) == Imported(1, 0)


def test_an_expired_line_is_never_seen_even_if_the_log_has_forgotten_the_memory(store: Store, clock: Clock) -> None:
    """An hour after a memory expired its tombstone is gone. A repeated import then writes it until the next purge."""
    lines = [expiring(clock, "1", 5), expiring(clock, "2", None)]
    store.import_lines(T, "ann", lines, issued_at=clock())
    clock.advance(10)
    purge(store, clock)
    clock.advance(4000)
    purge(store, clock)
    assert count(store.log).tombstones == 0
    left = list(store.export(T, "ann"))
    for issued_at in (clock(), None):
        assert store.import_lines(T, "ann", lines, issued_at=issued_at) == Imported(1, 1)
        assert list(store.export(T, "ann")) == left
        assert [memory.id for memory in store.list(T, "ann").memories] == ["2"]
        (found,) = store.search([Search(T, "ann", np.ones(DIM, np.float32), 5)])
        assert isinstance(found, SearchResult) and [memory.id for memory in found.results] == ["2"]
        for read in (store.get, store.history):
            with pytest.raises(NotFound):
                read(T, "ann", "1")
        purge(store, clock)
        assert store.user(T, "ann").memories == 1
        assert store.import_lines(T, "ann", lines, issued_at=clock()) == Imported(0, 2)
        clock.advance(4000)
        purge(store, clock)
    assert list(verify(store.log)) == []


def test_an_import_of_more_than_an_hour_goes_on_although_memories_were_deleted(store: Store, clock: Clock) -> None:
    ids = [str(n) for n in range(PAGE + 1)]
    sent = clock()

    def lines() -> Iterator[bytes]:
        for id in ids:
            if id == ids[-1]:
                store.delete(T, "ann", "0")
                clock.advance(4000)
                purge(store, clock)
                assert count(store.log).tombstones == 0
            yield expiring(clock, id, None)

    assert store.import_lines(T, "ann", lines(), issued_at=sent) == Imported(PAGE + 1, 0)
    assert {memory.id for memory in store.list(T, "ann", limit=1000).memories} == {*ids[1:]}


@pytest.mark.parametrize("emptied", ["erased", "deleted, and another import begins"])
def test_an_import_is_refused_after_its_user_was_erased_however_long_it_takes(
    store: Store, clock: Clock, emptied: str
) -> None:
    first, second, other = (list(parse_lines([expiring(clock, id, None)], clock)) for id in "123")
    sent = clock()
    epoch = store.import_page(T, "ann", first, issued_at=sent).epoch
    if emptied == "erased":
        store.erase_user(T, "ann")
    else:
        store.delete(T, "ann", "1")
        store.import_page(T, "ann", other, issued_at=clock())
    for _ in range(2):
        with pytest.raises(Conflict) as late:
            store.import_page(T, "ann", second, begin=False, issued_at=sent, epoch=epoch)
        assert (late.value.param, late.value.code) == ("0", "erased")
        clock.advance(4000)
        purge(store, clock)


@pytest.mark.parametrize("begin", [True, False])
def test_an_expired_line_restores_nothing_that_was_erased(store: Store, clock: Clock, begin: bool) -> None:
    lines = [expiring(clock, "1", 5), expiring(clock, "2", None), expiring(clock, "3", 500)]
    sent = clock()
    store.import_lines(T, "ann", lines, issued_at=sent)
    for id in "23":
        store.delete(T, "ann", id)
    clock.advance(10)
    purge(store, clock)
    for line in lines[1:]:  # deleted before it expired
        with pytest.raises(Conflict) as late:
            store.import_lines(T, "ann", [lines[0], line], begin=begin, issued_at=sent)
        assert (late.value.param, late.value.code) == ("1.id", "deleted")
    store.erase_user(T, "ann")
    for line in lines:
        with pytest.raises(Conflict) as late:
            store.import_lines(T, "ann", [line], begin=begin, issued_at=sent)
        assert (late.value.param, late.value.code) == ("0", "erased")
    assert store.user(T, "ann").memories == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"id": ""}, "1.id"),
        ({"id": "."}, "1.id"),
        ({"id": ".."}, "1.id"),
        ({"text": None}, "1.text"),
        ({"text": " \n\t"}, "1.text"),
        ({"vector": [1.0]}, "1.vector"),
        ({"vector": "x"}, "1.vector"),
        ({"vector": ["x"] * DIM}, "1.vector"),
        ({"metadata": []}, "1.metadata"),
        ({"model": "other"}, "1.model"),
        ({"created_at": "yesterday"}, "1.created_at"),
        ({"created_at": "0001-01-01T00:00:00+14:00"}, "1.created_at"),
        ({"updated_at": "9999-12-31T23:59:59-14:00"}, "1.updated_at"),
        ({"created_at": "2100-01-01T00:00:00Z"}, "1.created_at"),
        ({"updated_at": "2100-01-01T00:00:00Z"}, "1.updated_at"),
        ({"history": [{"event": "deleted", "at": "2100-01-01T00:00:00Z", "version": 1}]}, "1.history.0.at"),
        ({"expires_at": 5}, "1.expires_at"),
        ({"version": -1}, "1.version"),
        ({"event": "deleted"}, "1.event"),
        ({"history": {}}, "1.history"),
        ({"history": [{"event": "lost"}]}, "1.history.0.event"),
        ({"history": [{"event": "added", "at": "2026-01-01T00:00:00Z", "version": 9}]}, "1.history.0.version"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_of_its_page_is_written(
    store: Store, change: dict[str, Any], param: str
) -> None:
    right = {"id": "1", "text": "tea", "vector": [1.0] * DIM, "version": 5}
    lines = [orjson.dumps(right), orjson.dumps({**right, "id": "2", **change})]
    with pytest.raises(InvalidInput) as caught:
        store.import_lines(T, "ann", lines)
    assert caught.value.param == param
    assert store.user(T, "ann").memories == 0


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**63) - 1, 10**30])
def test_an_integer_of_more_than_64_bits_is_named(store: Store, number: int) -> None:
    right = {"id": "1", "text": "tea", "vector": [1.0] * DIM, "version": 5}
    past = {"event": "added", "at": "2026-01-01T00:00:00Z", "version": 1, "text": "t", "metadata": {"k": number}}
    for change, param in (
        ({"metadata": {"k": number}}, "1.metadata.k"),
        ({"metadata": {"a": [1, {"k": number}]}}, "1.metadata.a.1.k"),
        ({"history": [past]}, "1.history.0.metadata.k"),
    ):
        lines = [json.dumps(line).encode() for line in (right, {**right, "id": "2", **change})]
        with pytest.raises(InvalidInput) as caught:
            store.import_lines(T, "ann", lines)
        assert (caught.value.param, caught.value.message) == (
            param,
            "must be an integer of at most 64 bits",
        )
    assert store.user(T, "ann").memories == 0


def test_numbers_come_back_as_they_were(store: Store) -> None:
    metadata = {"n": [2**63 - 1, -(2**63), 2.0**64, 1e300, 5e-324, -0.0, 0.1, 1.0, 0, True]}
    line = {"id": "1", "text": "tea", "vector": [1.0] * DIM, "metadata": metadata}
    assert store.import_lines(T, "ann", [json.dumps(line).encode()]) == Imported(1, 0)
    assert repr(store.get(T, "ann", "1").metadata) == repr(metadata)
    exported = list(store.export(T, "ann"))
    store.import_lines(T, "bob", exported)
    assert list(store.export(T, "bob")) == exported


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff", b'"x"', b'{"id": NaN}'])
def test_a_line_that_is_not_a_json_object_is_refused(store: Store, line: bytes) -> None:
    with pytest.raises(InvalidInput) as caught:
        store.import_lines(T, "ann", [line])
    assert caught.value.param == "0"


def test_an_id_with_other_content_is_a_conflict(store: Store) -> None:
    line = {"id": "1", "text": "tea", "vector": [1.0] * DIM}
    store.import_lines(T, "ann", [orjson.dumps(line)])
    with pytest.raises(Conflict) as caught:
        store.import_lines(T, "ann", [orjson.dumps({**line, "id": "2"}), orjson.dumps({**line, "text": "rain"})])
    assert caught.value.param == "1.id"
    with pytest.raises(Conflict):
        store.import_lines(T, "bob", [orjson.dumps(line), orjson.dumps({**line, "text": "rain"})])
    assert store.user(T, "bob").memories == 0
