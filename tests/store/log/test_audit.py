"""The audit: which events there are, what they name, and when they go."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from store import Append, Event, InvalidInput, NewMemory, NotFound, Refusals, Store
from store.log import audit
from store.log.schema import events
from tests.store.conftest import DIM, Clock

KEY = "0123456789abcdef"


def unit(axis: int) -> Any:
    """(DIM,) float32."""
    return np.eye(DIM, dtype=np.float32)[axis % DIM]


def append(store: Store, user: str, *ids: str, by: str | None = KEY, text: str = "secret", **options: Any) -> Any:
    memories = tuple(NewMemory(id, f"{text} {id}", unit(n)) for n, id in enumerate(ids))
    (result,) = store.append([Append("acme", user, memories, by=by, **options)])
    return result


def told(store: Store, tenant: str = "acme") -> list[tuple[str, str | None, str | None, tuple[str, ...], int]]:
    return [(e.action, e.key_id, e.user_id, e.ids, e.count) for e in store.events(tenant, limit=1000).events]


def test_each_write_of_a_key_leaves_an_event(store: Store) -> None:
    append(store, "ann", "1", "2", "3", "4")
    append(store, "ann", "1", "5", text="public", upsert=True)
    store.update("acme", "ann", "1", metadata={"a": 1}, by=KEY)
    store.delete("acme", "ann", "1", by=KEY)
    store.delete_many("acme", "ann", ["3", "none", "2"], by=KEY)
    store.delete_where("acme", "ann", {"a": {"exists": False}}, by=KEY)
    assert told(store) == [
        ("memories.added", KEY, "ann", ("1", "2", "3", "4"), 4),
        ("memories.added", KEY, "ann", ("5",), 1),
        ("memories.updated", KEY, "ann", ("1",), 1),
        ("memories.updated", KEY, "ann", ("1",), 1),
        ("memories.deleted", KEY, "ann", ("1",), 1),
        ("memories.deleted", KEY, "ann", ("3", "2"), 2),
        ("memories.deleted", KEY, "ann", ("4", "5"), 2),
    ]


def test_an_import_leaves_an_event(store: Store) -> None:
    append(store, "ann", "1", "2", by=None)
    lines = list(store.export("acme", "ann"))
    store.import_lines("acme", "bob", lines, by=KEY)
    store.import_lines("acme", "bob", lines, by=KEY)  # which changes nothing
    assert told(store) == [("memories.imported", KEY, "bob", ("1", "2"), 2)]


def test_an_event_has_the_time_of_its_write(store: Store) -> None:
    append(store, "ann", "1")
    assert store.events("acme").events == [
        Event(store.get("acme", "ann", "1").created_at, "memories.added", KEY, "ann", ("1",), 1)
    ]


def test_a_write_that_changes_nothing_leaves_no_event(store: Store) -> None:
    append(store, "ann", "1")
    append(store, "ann", "1")
    store.update("acme", "ann", "1", metadata={}, by=KEY)
    store.delete_many("acme", "ann", ["2"], by=KEY)
    store.delete_where("acme", "ann", {"a": 1}, by=KEY)
    with pytest.raises(NotFound):
        store.delete("acme", "ann", "2", by=KEY)
    assert told(store) == [("memories.added", KEY, "ann", ("1",), 1)]


def test_an_erasure_of_nothing_leaves_no_event(store: Store) -> None:
    """Once a user was erased, or if it never had a memory. The ids of deleted memories are something to erase."""
    store.erase_user("acme", "nobody", by=KEY)
    store.delete_many("acme", "none", ["1"], write_id="w1", by=KEY)
    store.erase_user("acme", "none", by=KEY)
    assert told(store) == []
    append(store, "ann", "1")
    store.delete("acme", "ann", "1", by=KEY)
    store.erase_user("acme", "ann", by=KEY)
    store.erase_user("acme", "ann", by=KEY)
    assert [event.action for event in store.events("acme").events] == [
        "memories.added",
        "memories.deleted",
        "user.deleted",
    ]


def test_a_write_that_is_sent_again_leaves_one_event(pair: tuple[Store, Store]) -> None:
    writes: list[Callable[[Store], Any]] = [
        lambda store: append(store, "ann", "1", "2", write_id="a"),
        lambda store: store.update("acme", "ann", "1", metadata={"a": 1}, by=KEY, write_id="b"),
        lambda store: store.delete("acme", "ann", "1", by=KEY, write_id="c"),
        lambda store: store.delete_where("acme", "ann", {"a": {"exists": False}}, by=KEY, write_id="d"),
        lambda store: store.erase_user("acme", "ann", by=KEY, write_id="e"),
    ]
    for write in writes:
        for store in pair:
            write(store)
    assert [(action, count) for action, *_, count in told(pair[0])] == [
        ("memories.added", 2),
        ("memories.updated", 1),
        ("memories.deleted", 1),
        ("memories.deleted", 1),
        ("user.deleted", 0),
    ]


def test_a_write_without_a_key_leaves_no_event(store: Store) -> None:
    append(store, "ann", "1", by=None)
    store.erase_user("acme", "ann")
    assert told(store) == []


def test_a_write_that_fails_leaves_no_event(store: Store) -> None:
    append(store, "ann", "1")
    append(store, "ann", "2", "1", text="other")  # 1 has other content
    assert told(store) == [("memories.added", KEY, "ann", ("1",), 1)]


def test_each_user_of_a_call_has_an_event(store: Store) -> None:
    call = [
        Append(tenant, user, (NewMemory("1", "text", unit(0)),), by=KEY)
        for tenant, user in (("acme", "ann"), ("acme", "bob"), ("other", "ann"))
    ]
    store.append_together([call])
    assert [user for _, _, user, _, _ in told(store)] == ["ann", "bob"]
    assert [user for _, _, user, _, _ in told(store, "other")] == ["ann"]


def test_a_large_write_leaves_events_of_a_hundred_ids(store: Store) -> None:
    ids = [str(n) for n in range(250)]
    append(store, "ann", *ids)
    assert [(ids, count) for *_, ids, count in told(store)] == [
        (tuple(ids[:100]), 100),
        (tuple(ids[100:200]), 100),
        (tuple(ids[200:]), 50),
    ]


def test_an_erasure_takes_the_ids_out_of_the_events(store: Store) -> None:
    append(store, "ann", "1")
    append(store, "bob", "1")
    store.delete("acme", "ann", "1", by=KEY)
    store.erase_user("acme", "ann", by=KEY)
    append(store, "ann", "2")
    assert told(store) == [
        ("memories.added", KEY, None, (), 1),
        ("memories.added", KEY, "bob", ("1",), 1),
        ("memories.deleted", KEY, None, (), 1),
        ("user.deleted", KEY, None, (), 0),
        ("memories.added", KEY, "ann", ("2",), 1),
    ]


def test_no_event_holds_a_text(store: Store) -> None:
    append(store, "ann", "1", text="PLANTED")
    store.update("acme", "ann", "1", metadata={"PLANTED": "PLANTED"}, by=KEY)
    store.delete_where("acme", "ann", {"PLANTED": "PLANTED"}, by=KEY)
    with store.log.read() as connection:
        assert "PLANTED" not in repr(connection.execute(select(events)).all())


def test_a_key_that_is_made_or_revoked_leaves_an_event(store: Store) -> None:
    made = store.create_key("acme", by=KEY)
    other = store.create_key("acme", user_id="ann")
    store.revoke_key("acme", other.key.id, by=KEY)
    store.revoke_key("acme", other.key.id, by=KEY)  # it is revoked already
    assert told(store) == [
        ("key.created", KEY, None, (made.key.id,), 1),
        ("key.created", None, None, (other.key.id,), 1),
        ("key.revoked", KEY, None, (other.key.id,), 1),
    ]
    assert made.secret[20:] not in repr(store.events("acme"))


def test_equal_refusals_of_a_minute_are_one_event(store: Store, clock: Clock) -> None:
    minute = clock().replace(microsecond=0)
    later = minute + timedelta(seconds=59)
    store.record_refusals(
        [
            Refusals(minute, "acme", KEY, 403, "insufficient_scope", 2),
            Refusals(later, "acme", KEY, 403, "insufficient_scope", 3),
            Refusals(later, "acme", KEY, 429, "rate_limit_exceeded", 4),
            Refusals(minute + timedelta(seconds=61), "acme", KEY, 403, "insufficient_scope", 5),
        ]
    )
    assert store.events("acme").events == [
        Event(minute, "request.refused", KEY, None, (), 5, 403, "insufficient_scope"),
        Event(minute, "request.refused", KEY, None, (), 4, 429, "rate_limit_exceeded"),
        Event(minute + timedelta(minutes=1), "request.refused", KEY, None, (), 5, 403, "insufficient_scope"),
    ]


def test_a_refused_key_belongs_to_its_tenant_if_there_is_one(store: Store, clock: Clock) -> None:
    key = store.create_key("acme").key
    invented = [Refusals(clock(), None, f"{n:016x}", 401, "invalid_api_key", 1) for n in range(50)]
    known = Refusals(clock(), None, key.id, 401, "invalid_api_key", 7)
    store.record_refusals([*invented, known, Refusals(clock(), None, None, 401, "invalid_api_key", 3)])
    assert told(store)[1:] == [("request.refused", key.id, None, (), 7)]
    assert told(store, audit.NO_TENANT) == [("request.refused", None, None, (), 53)]


def test_pages_follow_each_other_and_what_is_recorded_later(store: Store) -> None:
    assert store.events("acme").next_cursor is None
    for n in range(5):
        append(store, "ann", str(n))
    append(store, "bob", "of another tenant")
    seen, cursor, more = [], None, True
    while more:
        page = store.events("acme", limit=2, after=cursor)
        seen += [event.ids[0] for event in page.events]
        cursor, more = page.next_cursor, page.has_more
    assert seen == ["0", "1", "2", "3", "4", "of another tenant"]
    nothing = store.events("acme", after=cursor)
    assert (nothing.events, nothing.next_cursor, nothing.has_more) == ([], cursor, False)
    append(store, "ann", "later")
    assert [event.ids for event in store.events("acme", after=nothing.next_cursor).events] == [("later",)]


@pytest.mark.parametrize(("options", "field"), [({"limit": 0}, "limit"), ({"after": "nonsense"}, "after")])
def test_a_wrong_page_is_refused(store: Store, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as error:
        store.events("acme", **options)
    assert error.value.field == field


def test_a_page_ends_before_events_that_are_not_committed_yet(postgres_url: str, clock: Clock) -> None:
    """PostgreSQL numbers an event before it commits it: otherwise the cursor would pass it. Nobody waits."""
    stores = [Store.open(postgres_url, dim=DIM, model="fake", now=clock) for _ in range(2)]
    writer, other = stores

    def seen(after: str | None = None) -> tuple[list[str], str | None]:
        page = other.events("acme", after=after)
        return [event.ids[0] for event in page.events], page.next_cursor

    def made(id: str) -> list[audit.NewEvent]:
        return [audit.NewEvent("acme", KEY, "key.created", None, [id], 1)]

    try:
        with writer.log.write() as first:
            audit.write(first, made("first"), 1)
            append(other, "ann", "second")
            assert seen() == ([], None)
        ids, cursor = seen()
        assert ids == ["first", "second"]
        with writer.log.write() as late:
            append(other, "ann", "third")
            audit.write(late, made("fourth"), 1)
            append(other, "ann", "fifth")
            ids, cursor = seen(cursor)
            assert ids == ["third"]
        assert seen(cursor)[0] == ["fourth", "fifth"]
    finally:
        for store in stores:
            store.close()


def test_old_events_are_removed(open_store: Callable[..., Store], clock: Clock) -> None:
    store = open_store(audit_days=2)
    append(store, "ann", "1")
    clock.advance(86_400)
    append(store, "ann", "2")
    clock.advance(86_300)
    while store.background_step():
        pass
    assert [ids for *_, ids, _ in told(store)] == [("1",), ("2",)]
    clock.advance(200)
    while store.background_step():
        pass
    assert [ids for *_, ids, _ in told(store)] == [("2",)]


def test_a_store_without_audit_keeps_no_events(open_store: Callable[..., Store], clock: Clock) -> None:
    append(open_store(), "ann", "1")
    store = open_store(audit_days=0)
    append(store, "ann", "2")
    store.update("acme", "ann", "2", metadata={"a": 1}, by=KEY)
    store.erase_user("acme", "ann", by=KEY)
    store.record_refusals([Refusals(clock(), "acme", KEY, 403, None, 1)])
    store.create_key("acme")
    clock.advance(1)
    while store.background_step():
        pass
    assert told(store) == []


def test_a_write_and_its_event_are_written_together(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError

    append(store, "bob", "1")  # so that there is something to erase
    monkeypatch.setattr(audit, "write", fail)
    for write in (
        lambda: append(store, "ann", "1"),
        lambda: store.erase_user("acme", "bob", by=KEY),
        lambda: store.create_key("acme"),
    ):
        with pytest.raises(RuntimeError):
            write()
    assert (store.user("acme", "ann").version, store.keys("acme").keys) == (0, [])
    assert store.user("acme", "bob").version == 1


def test_no_file_of_the_log_holds_the_ids_of_an_erased_user(tmp_path: Path, clock: Clock) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/log.db", dim=DIM, model="fake", now=clock)
    for n in range(300):
        append(store, "ann" if n % 2 else "bob", f"{'PLANTED' if n % 2 else 'kept'}-{n}")
    store.erase_user("acme", "ann", by=KEY)
    clock.advance(60)
    while store.background_step():
        pass
    store.close()
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"kept-0" in content and content.count(b"PLANTED") == 0
