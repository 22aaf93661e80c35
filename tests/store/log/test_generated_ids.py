"""Appends with generated ids: an append that is sent again returns the answer of the first time."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from store import (
    Append,
    Appended,
    AppendResult,
    Conflict,
    Store,
)
from store.log.maintenance import compact
from store.log.rows import micros
from tests.store.conftest import Clock
from tests.store.log.test_receipts import T, new, put, texts


def test_a_generated_id_is_added_once(pair: tuple[Store, Store], clock: Clock) -> None:
    one, other = pair
    put(one, "ann", new("0"))
    sent = one._now()
    made = [new(id, generated_id=True, expires_at=clock.now + timedelta(minutes=5)) for id in "abc"]

    def add(store: Store, **options: Any) -> Any:
        return put(store, "ann", *made, **{"issued_at": sent, **options})

    first = add(one)
    assert first == AppendResult([Appended("a", "added", 2), Appended("b", "added", 3), Appended("c", "added", 4)], 4)
    assert add(other) == first
    other.update(T, "ann", "a", metadata={"by": "another"})
    other.update(T, "ann", "a", metadata={"by": "a third"})
    other.delete(T, "ann", "b")
    put(other, "ann", new("b", "again"))
    other.delete(T, "ann", "c")
    before, version = texts(one), one.user(T, "ann").version
    for options in ({}, {"issued_at": one._now()}, {"upsert": True}, {"on_duplicate": "skip"}):
        assert add(other, **options) == first
    assert (texts(one), one.user(T, "ann").version) == (before, version)
    assert one.get(T, "ann", "a").metadata == {"by": "a third"}
    clock.advance(600)
    assert add(other) == first  # "a" has expired and is not removed yet
    assert set(texts(one)) == {"0", "b"}
    one.erase_user(T, "ann")
    late = add(other)
    assert isinstance(late, Conflict)
    assert (late.param, late.code) == ("0.user_id", "erased")


def test_a_batch_contains_a_generated_id_twice(store: Store) -> None:
    at = store._now()
    add = [Append(T, "ann", (new("a", generated_id=True), new("b", generated_id=True)), issued_at=at)]
    upsert = [Append(T, "ann", (new("a", "another's"),), upsert=True, issued_at=at)]
    first, _, again, late = store.append_together([add, upsert, add, [*upsert, *add]])
    assert first == again == [AppendResult([Appended("a", "added", 1), Appended("b", "added", 2)], 2)]
    assert late == [AppendResult([Appended("a", "unchanged", 3)], 3), *first]
    assert texts(store) == {"a": "another's", "b": "text b"}


def test_a_first_attempt_is_found_before_a_duplicate(store: Store) -> None:
    put(store, "ann", new("0", "tea"))
    sent = store._now()
    skip = {"on_duplicate": "skip", "issued_at": sent}
    assert put(store, "ann", new("a", "tea", generated_id=True), **skip).memories == [Appended("0", "unchanged", 1)]
    assert put(store, "ann", new("a", "tea", generated_id=True), **skip).memories == [Appended("0", "unchanged", 1)]
    for _ in range(2):
        result = put(store, "ann", new("b", "rain", generated_id=True), **skip)
        assert result == AppendResult([Appended("b", "added", 2)], 2)


def test_a_memory_that_a_compaction_removed_is_not_added_again(store: Store, clock: Clock) -> None:
    sent = store._now()
    for id in "ab":
        put(store, "ann", new(id, generated_id=True), issued_at=sent)
    store.delete(T, "ann", "a")
    clock.advance(7200)
    assert compact(store.log, micros(clock(), "")) == 1
    late = put(store, "ann", new("a", generated_id=True), issued_at=sent)
    assert isinstance(late, Conflict)
    assert late.code == "erased"
    assert texts(store) == {"b": "text b"}
