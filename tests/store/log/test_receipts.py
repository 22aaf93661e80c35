"""Writes that are sent again under their write id are made once and get the same answer."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from sqlalchemy import create_engine, event, func, inspect, select

from store import Append, Appended, AppendResult, Conflict, InvalidInput, LogDamaged, NewMemory, NotFound, Store
from store.log import migrations
from store.log.maintenance import compact, verify
from store.log.rows import micros
from store.log.schema import meta, writes
from tests.store.conftest import DIM, Clock
from tests.store.log.fixtures import seed
from tests.store.log.test_migrations import AFTER, FIXTURES, load

T = "default"
EYE = np.eye(DIM, dtype=np.float32)


def new(id: str, text: str | None = None, **fields: Any) -> NewMemory:
    return NewMemory(id, text or f"text {id}", EYE[0], **fields)


def put(store: Store, user: str, *memories: NewMemory, **options: Any) -> Any:
    options.setdefault("issued_at", store._now())
    return store.append([Append(T, user, memories, **options)])[0]


def texts(store: Store, user: str = "ann") -> dict[str, str]:
    return {memory.id: memory.text for memory in store.list(T, user).memories}


def records(store: Store) -> int:
    with store.log.read() as connection:
        return connection.execute(select(func.count()).select_from(writes)).scalar_one()


def test_an_update_is_made_once(pair: tuple[Store, Store], clock: Clock) -> None:
    one, other = pair
    put(one, "ann", new("1", metadata={"n": 0}))
    later = clock.now + timedelta(days=1)
    first = one.update(T, "ann", "1", metadata={"n": 1}, expires_at=later, write_id="w1")
    assert (first.metadata, first.version, first.expires_at) == ({"n": 1}, 2, later)
    again = {"metadata": {"n": 1}, "expires_at": later, "write_id": "w1"}
    assert other.update(T, "ann", "1", **again) == first
    between = other.update(T, "ann", "1", text="another's", vector=EYE[1], metadata={"n": 5}, expires_at=None)
    assert other.update(T, "ann", "1", **again) == first
    assert one.get(T, "ann", "1") == between
    assert one.user(T, "ann").version == 3
    assert records(one) == 1


def test_an_update_that_changed_nothing_changes_nothing_later(pair: tuple[Store, Store]) -> None:
    one, other = pair
    put(one, "ann", new("1", metadata={"n": 0}))
    first = one.update(T, "ann", "1", metadata={"n": 0}, write_id="w1")
    assert first.version == 1
    other.update(T, "ann", "1", metadata={"n": 5})
    assert other.update(T, "ann", "1", metadata={"n": 0}, write_id="w1") == first
    assert one.get(T, "ann", "1").metadata == {"n": 5}


@pytest.mark.parametrize("gone", ["deleted", "again", "erased", "expired", "imported"])
def test_an_update_whose_memory_was_deleted_since_is_a_conflict(
    pair: tuple[Store, Store], clock: Clock, gone: str
) -> None:
    one, other = pair
    put(one, "ann", new("1"))
    one.update(T, "ann", "1", metadata={"n": 1}, write_id="w1")
    lines = list(one.export(T, "ann"))
    match gone:
        case "deleted":
            other.delete(T, "ann", "1")
        case "again":
            other.delete(T, "ann", "1")
            put(other, "ann", new("1", "another's"))
        case "erased":
            other.erase_user(T, "ann")
            put(other, "ann", new("1", "another's"))
        case "expired":
            other.update(T, "ann", "1", expires_at=clock.now + timedelta(seconds=5))
            clock.advance(10)
        case "imported":  # the version exists again, but may belong to another state
            other.erase_user(T, "ann")
            other.import_lines(T, "ann", lines)
    before = texts(one)
    with pytest.raises(Conflict) as caught:
        other.update(T, "ann", "1", metadata={"n": 1}, write_id="w1")
    assert (caught.value.param, caught.value.code) == ("id", "deleted")
    assert texts(one) == before


def test_a_deletion_is_made_once(pair: tuple[Store, Store]) -> None:
    one, other = pair
    put(one, "ann", new("1"), new("2"))
    assert one.delete(T, "ann", "1", write_id="w1") == 3
    assert other.delete(T, "ann", "1", write_id="w1") == 3
    put(other, "ann", new("1", "another's"))
    assert other.delete(T, "ann", "1", write_id="w1") == 3
    assert texts(one) == {"1": "another's", "2": "text 2"}
    other.erase_user(T, "ann")
    put(other, "ann", new("1", "a third's"))
    assert one.delete(T, "ann", "1", write_id="w1") == 3
    assert texts(one) == {"1": "a third's"}


@pytest.mark.parametrize("before", [0, 3])
def test_a_deletion_by_filter_is_made_once(pair: tuple[Store, Store], before: int) -> None:
    """This includes deletions that found no memory or no user."""
    one, other = pair
    if before:
        put(one, "ann", *(new(str(n), metadata={"k": 1}) for n in range(before)))
    assert one.delete_where(T, "ann", {"k": 1}, write_id="w1") == before
    put(other, "ann", new("9", metadata={"k": 1}))
    version = one.user(T, "ann").version
    assert other.delete_where(T, "ann", {"k": 1}, write_id="w1") == before
    assert texts(one) == {"9": "text 9"}
    assert one.user(T, "ann").version == version
    assert other.delete_where(T, "ann", {"k": 1}) == 1


@pytest.mark.parametrize("before", [0, 3])
def test_an_erasure_is_made_once(pair: tuple[Store, Store], before: int) -> None:
    one, other = pair
    if before:
        put(one, "ann", *(new(str(n)) for n in range(before)))
    assert one.erase_user(T, "ann", write_id="w1") == (before, before + 1)
    put(other, "ann", new("9"))
    assert other.erase_user(T, "ann", write_id="w1") == (before, before + 1)
    assert texts(one) == {"9": "text 9"}
    assert other.erase_user(T, "ann", write_id="w2") == (1, before + 3)
    put(other, "ann", new("8"))
    assert one.erase_user(T, "ann", write_id="w1") == (before, before + 1)
    assert texts(one) == {"8": "text 8"}


def test_a_call_is_made_once(pair: tuple[Store, Store]) -> None:
    one, other = pair
    put(one, "ann", new("1"), new("2", "tea"))

    def call(store: Store) -> Any:
        at = store._now()
        options: dict[str, Any] = {"upsert": True, "issued_at": at, "write_id": "w1"}
        ann = Append(T, "ann", (new("1", "mine"), new("3", "tea"), new("4")), "skip", **options)
        (result,) = store.append_together([[ann, Append(T, "bob", (new("1"),), **options)]])
        return result

    first = call(one)
    assert first == [
        AppendResult([Appended("1", "updated", 3), Appended("2", "unchanged", 2), Appended("4", "added", 4)], 4),
        AppendResult([Appended("1", "added", 1)], 1),
    ]
    put(other, "ann", new("1", "another's"), upsert=True)
    other.delete(T, "ann", "4")
    other.delete(T, "bob", "1")
    assert call(other) == first
    assert call(one) == first
    assert texts(one) == {"1": "another's", "2": "tea"}
    assert texts(one, "bob") == {}
    assert [one.user(T, name).version for name in ("ann", "bob")] == [6, 2]
    assert records(one) == 2


def test_a_call_may_contain_a_user_twice(pair: tuple[Store, Store]) -> None:
    """The first request of a call is not mistaken for its second."""
    answers = []
    for store in pair:
        options: dict[str, Any] = {"upsert": True, "issued_at": store._now(), "write_id": "w1"}
        call = [Append(T, "ann", (new(id, text),), **options) for id, text in (("1", "a"), ("2", "b"))]
        answers += store.append_together([call])
        put(store, "ann", new("1", "another's"), new("2", "another's"), upsert=True)
    assert answers == [[AppendResult([Appended(str(n), "added", n)], n) for n in (1, 2)]] * 2
    assert texts(pair[0]) == {"1": "another's", "2": "another's"}


def test_a_batch_may_contain_a_call_twice(store: Store) -> None:
    def upsert(text: str, write_id: str | None) -> list[Append]:
        return [Append(T, "ann", (new("1", text),), upsert=True, issued_at=store._now(), write_id=write_id)]

    first, between, again, other = store.append_together(
        [upsert("mine", "w1"), upsert("another's", None), upsert("mine", "w1"), upsert("a third's", "w2")]
    )
    assert first == again == [AppendResult([Appended("1", "added", 1)], 1)]
    assert between == [AppendResult([Appended("1", "updated", 2)], 2)]
    assert other == [AppendResult([Appended("1", "updated", 3)], 3)]
    assert texts(store) == {"1": "a third's"}


def test_a_call_of_a_user_that_was_erased_since_is_a_conflict(pair: tuple[Store, Store]) -> None:
    """Even if the second attempt claims to have been issued later."""
    one, other = pair
    for store in pair:
        options = {"upsert": True, "issued_at": store._now(), "write_id": "w1"}
        call = [Append(T, "bob", (new("1"),), **options), Append(T, "ann", (new("1"), new("2")), **options)]
        (result,) = store.append_together([call])
        if store is one:
            assert not isinstance(result, Conflict)
            one.erase_user(T, "ann")
    assert isinstance(result, Conflict)
    assert (result.param, result.code) == ("1.user_id", "erased")
    assert texts(other) == {}
    with one.log.read() as connection:
        kept = [answer for (answer,) in connection.execute(select(writes.c.answer))]
    assert sorted(kept, key=str) == [None, '[1,[["1","added",1]]]']


@pytest.mark.parametrize("seconds", [-60, 0])
def test_an_expiry_before_the_write_was_sent_is_refused(store: Store, clock: Clock, seconds: float) -> None:
    later = clock.now + timedelta(hours=1)
    put(store, "ann", new("1", expires_at=later), new("2"))
    now = store._now()
    over = now + timedelta(seconds=seconds)
    for id, options in (("3", {}), ("1", {"upsert": True}), ("3", {"on_duplicate": "skip"})):
        good = [Append(T, user, (new("a"),), issued_at=now, upsert=True) for user in ("ann", "bob")]
        bad = Append(T, "ann", (new("b"), new(id, "over", expires_at=over)), issued_at=now, write_id="w1", **options)
        before, refused, after = store.append_together([good[:1], [bad], good[1:]])
        assert isinstance(refused, InvalidInput)
        assert (refused.message, refused.param) == ("must be in the future", "1.expires_at")
        assert not isinstance(before, Exception)
        assert not isinstance(after, Exception)  # only the wrong call fails
    with pytest.raises(InvalidInput) as caught:
        store.update(T, "ann", "1", expires_at=over, issued_at=now)
    assert (caught.value.message, caught.value.param) == ("must be in the future", "expires_at")
    assert texts(store) == {"1": "text 1", "2": "text 2", "a": "text a"}
    assert (store.user(T, "ann").version, store.user(T, "ann").memories) == (3, 3)
    assert records(store) == 0


@pytest.mark.parametrize("purged", [False, True])
def test_a_write_is_answered_as_the_first_time_even_if_its_memory_has_expired(
    pair: tuple[Store, Store], clock: Clock, purged: bool
) -> None:
    one, other = pair
    soon = clock.now + timedelta(seconds=5)
    put(one, "ann", new("twin", "tea"))
    tries: list[tuple[NewMemory, dict[str, Any]]] = [
        (new("named", expires_at=soon), {"write_id": "w1"}),
        (new("made", generated_id=True, expires_at=soon), {}),
        (new("skipped", "tea", expires_at=soon), {"on_duplicate": "skip"}),
    ]
    first = [put(one, "ann", memory, **options) for memory, options in tries]
    assert [result.memories[0].status for result in first] == ["added", "added", "unchanged"]
    clock.advance(10)
    while purged and other.background_step():
        pass
    again = [put(other, "ann", memory, **options) for memory, options in tries]
    assert [result.memories for result in again] == [result.memories for result in first]
    assert texts(other) == {"twin": "tea"}


def test_an_update_is_answered_as_the_first_time_even_if_its_expiry_has_passed(
    pair: tuple[Store, Store], clock: Clock
) -> None:
    one, other = pair
    put(one, "ann", new("1"))
    soon = clock.now + timedelta(seconds=5)

    def change(store: Store) -> Any:
        return store.update(T, "ann", "1", expires_at=soon, issued_at=store._now(), write_id="w1")

    first = change(one)
    assert (first.expires_at, first.version) == (soon, 2)
    other.update(T, "ann", "1", expires_at=None)
    clock.advance(10)
    assert change(other) == first
    assert other.get(T, "ann", "1").expires_at is None


def test_a_write_that_failed_is_made_when_it_is_sent_again(store: Store) -> None:
    with pytest.raises(NotFound):
        store.delete(T, "ann", "1", write_id="w1")
    put(store, "ann", new("1"))
    for _ in range(2):
        with pytest.raises(Conflict):
            store.update(T, "ann", "1", metadata={}, if_version=7, write_id="w2")
        clash = put(store, "ann", new("2"), new("1", "other"), write_id="w3")
        assert isinstance(clash, Conflict)
    assert records(store) == 0
    assert store.update(T, "ann", "1", metadata={"a": 1}, if_version=1, write_id="w2").version == 2
    assert store.delete(T, "ann", "1", write_id="w1") == 3
    assert put(store, "ann", new("2"), new("1", "other"), write_id="w3").version == 5


def test_write_ids_of_users_and_tenants_are_separate(store: Store) -> None:
    for tenant, user in ((T, "ann"), (T, "bob"), ("other", "ann")):
        store.append([Append(tenant, user, (new("1"),), upsert=True, issued_at=store._now(), write_id="w1")])
    assert [store.user(*name).memories for name in ((T, "ann"), (T, "bob"), ("other", "ann"))] == [1, 1, 1]


def test_a_write_id_cannot_be_used_for_two_writes(store: Store) -> None:
    put(store, "ann", new("1"), new("2"), write_id="w1")
    store.update(T, "ann", "1", metadata={"a": 1}, write_id="w2")
    reused = [
        lambda: store.delete(T, "ann", "1", write_id="w1"),
        lambda: store.delete_where(T, "ann", {"a": 1}, write_id="w2"),
        lambda: store.erase_user(T, "ann", write_id="w1"),
        lambda: store.update(T, "ann", "2", metadata={"a": 1}, write_id="w2"),
    ]
    for call in reused:
        with pytest.raises(Conflict) as caught:
            call()
        assert (caught.value.param, caught.value.code) == ("write_id", "write_id_reused")
    for memories, write_id in (((new("1"),), "w1"), ((new("1"), new("2")), "w2")):
        clash = put(store, "ann", *memories, write_id=write_id)
        assert isinstance(clash, Conflict)
        assert clash.code == "write_id_reused"
    assert store.user(T, "ann").version == 3


def test_a_wrong_write_id_is_refused(store: Store) -> None:
    put(store, "ann", new("1"))
    for call in (
        lambda: store.update(T, "ann", "1", write_id=""),
        lambda: store.delete(T, "ann", "1", write_id="a\n"),
        lambda: store.delete_where(T, "ann", {"a": 1}, write_id="x" * 257),
        lambda: store.erase_user(T, "ann", write_id=""),
    ):
        with pytest.raises(InvalidInput) as caught:
            call()
        assert caught.value.param == "write_id"
    at = store._now()
    calls = [
        [Append(T, "ann", (new("2"),), issued_at=at, write_id="")],
        [Append(T, user, (new("2"),), issued_at=at, write_id=user) for user in ("ann", "bob")],
        [Append(T, "ann", (new("2"),), issued_at=at), Append(T, "bob", (new("2"),), issued_at=at, write_id="w")],
    ]
    for result in store.append_together(calls):
        assert isinstance(result, InvalidInput)
        assert result.param == "write_id"
    assert texts(store) == {"1": "text 1"}


def test_records_are_removed_after_an_hour(store: Store, clock: Clock) -> None:
    put(store, "ann", new("1"))
    store.append_together(
        [[Append(T, "bob", (new(str(n)),), issued_at=store._now(), write_id=f"w{n}")] for n in range(1100)]
    )
    store.update(T, "ann", "1", metadata={"n": 1}, write_id="w")
    clock.advance(1800)
    store.delete(T, "ann", "1", write_id="w1")
    steps = []

    def settle() -> None:
        before = records(store)
        while store.background_step():
            if records(store) != before:
                before = records(store)
                steps.append(before)

    clock.advance(1700)
    settle()
    assert records(store) == 1102
    clock.advance(200)
    settle()
    assert steps == [102, 1]
    assert store.delete(T, "ann", "1", write_id="w1") == 3
    clock.advance(1800)
    settle()
    assert records(store) == 0


def test_removing_records_skips_those_that_are_locked(postgres_url: str, clock: Clock) -> None:
    """PostgreSQL: so it cannot deadlock with an erasure."""
    one, other = (Store.open(postgres_url, dim=DIM, model="fake", now=clock, lock_timeout_s=5) for _ in range(2))
    for user in ("ann", "bob"):
        put(one, user, new("1"), write_id="w")
    clock.advance(4000)
    with one.log.write() as connection:
        connection.execute(select(writes).order_by(writes.c.at).limit(1).with_for_update())
        while other.background_step():
            pass
        assert records(other) == 1
    clock.advance(100)
    while other.background_step():
        pass
    assert records(other) == 0
    for store in (one, other):
        store.close()


def test_a_damaged_record_is_an_error(store: Store) -> None:
    put(store, "ann", new("1"), upsert=True, write_id="w1")
    store.delete(T, "ann", "1", write_id="w2")
    with store.log.write() as connection:
        connection.execute(writes.update().values(answer="[1"))
    with pytest.raises(LogDamaged):
        put(store, "ann", new("1"), upsert=True, write_id="w1")
    with pytest.raises(LogDamaged):
        store.delete(T, "ann", "1", write_id="w2")
    assert texts(store) == {}


def test_records_of_an_erased_user_hold_nothing_about_its_memories(store: Store) -> None:
    put(store, "ann", new("an id"), write_id="w1")
    put(store, "bob", new("1"), write_id="w1")
    store.update(T, "ann", "an id", metadata={"secret": 1}, write_id="w2")
    store.delete_where(T, "ann", {"secret": 1}, write_id="w3")
    store.erase_user(T, "ann", write_id="w4")
    with store.log.read() as connection:
        kept = list(connection.execute(select(writes.c.kind, writes.c.answer).order_by(writes.c.at)))
    assert kept == [
        ("append", None),
        ("append", '[1,[["1","added",1]]]'),
        ("update", None),
        ("delete_where", "[1]"),
        ("erase", "[0,4]"),
    ]


def test_batches_without_write_ids_run_no_statement_for_records(store: Store) -> None:
    put(store, "ann", new("0"))
    statements: list[str] = []
    event.listen(store.log.engine, "before_cursor_execute", lambda *seen: statements.append(seen[2]))

    def cost(calls: int, **options: Any) -> list[str]:
        statements.clear()
        write_id = options.pop("write_id", None)
        store.append_together(
            [
                [Append(T, "ann", (new(f"{n}-{len(options)}-{write_id}", **options),), write_id=write_id and f"{n}")]
                for n in range(calls)
            ]
        )
        return [statement for statement in statements if "writes" in statement or "history" in statement]

    assert cost(5) == cost(5, generated_id=True) == []
    plain = len(statements)
    asked = cost(7, write_id="w")
    assert [statement.split()[0] for statement in asked] == ["SELECT", "INSERT"]
    assert len(statements) == plain + 2
    assert [statement.split()[0] for statement in cost(7, write_id="w")] == ["SELECT"]


def test_records_survive_a_compaction_and_are_not_exported(store: Store, clock: Clock) -> None:
    put(store, "ann", new("1"), new("2"))
    store.delete(T, "ann", "1", write_id="w1")
    answer = store.update(T, "ann", "2", metadata={"a": 1}, write_id="w2")
    lines = list(store.export(T, "ann"))
    assert len(lines) == 1
    assert b"w2" not in lines[0]
    clock.advance(7200)
    compact(store.log, micros(clock(), ""))
    assert store.delete(T, "ann", "1", write_id="w1") == 3
    assert store.update(T, "ann", "2", metadata={"a": 1}, write_id="w2") == answer
    assert list(verify(store.log)) == []


@pytest.mark.usefixtures("without_log")
def test_a_log_of_schema_1_gets_records(url: str) -> None:
    load(url, 1)
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    assert not inspect(engine).has_table("writes")
    engine.dispose()
    store = seed.open_store(url, seed.Clock(AFTER))
    with store.log.read() as connection:
        version = connection.execute(select(meta.c.value).where(meta.c.name == "schema_version")).scalar()
    assert version == str(len(migrations.MIGRATIONS))
    kept = json.loads((FIXTURES / "v1.json").read_text())["default ann"]["export"]
    assert [line.decode() for line in store.export(T, "ann")] == kept
    first = store.update(T, "ann", "plain", metadata={"n": 2}, write_id="w1")
    store.update(T, "ann", "plain", metadata={"n": 3})
    assert store.update(T, "ann", "plain", metadata={"n": 2}, write_id="w1") == first
    stats = store.user(T, "ann")
    assert store.erase_user(T, "ann") == (stats.memories, stats.version + 1)
    assert list(verify(store.log)) == []
    store.close()
