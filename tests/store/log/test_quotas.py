"""Quotas: how much a tenant may hold, and what counts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import orjson
import pytest

from store import Append, AppendResult, NewMemory, QuotaExceeded, Quotas, Store, StoreError
from store.log.maintenance import verify
from store.log.quotas import Size, sizes
from tests.store.conftest import DIM, Clock

VECTOR_BYTES = 4 * DIM


def unit(axis: int) -> Any:
    """(DIM,) float32."""
    return np.eye(DIM, dtype=np.float32)[axis % DIM]


def append(store: Store, user: str, *texts: str, tenant: str = "acme", **options: Any) -> AppendResult | StoreError:
    memories = tuple(NewMemory(text, text, unit(n)) for n, text in enumerate(texts))
    (result,) = store.append([Append(tenant, user, memories, **options)])
    return result


def size(store: Store, tenant: str = "acme") -> Size:
    with store.log.read() as connection:
        return sizes(connection, [tenant]).get(tenant, Size(0, 0))


def refused(result: AppendResult | StoreError) -> str:
    assert isinstance(result, QuotaExceeded) and result.code == "quota_exceeded"
    assert (result.field, result.position) == (None, None)
    return result.message


def test_a_tenant_holds_what_its_users_hold(store: Store) -> None:
    append(store, "ann", "one", "three")
    append(store, "bob", "one")
    append(store, "ann", "elsewhere", tenant="other")
    assert (size(store), size(store, "other")) == (Size(3, 3 + 5 + 3 + 3 * 2), Size(1, 9 + 2))
    store.update("acme", "ann", "three", metadata={"a": 1})
    store.delete("acme", "bob", "one")
    assert size(store) == Size(2, 3 + 5 + 2 + 7)
    store.erase_user("acme", "ann")
    assert size(store) == Size(0, 0)
    assert list(verify(store.log)) == []


def test_the_past_states_of_an_import_must_fit_into_the_rest_of_a_quota(open_store: Callable[..., Store]) -> None:
    """They are not a part of the size. A user with the same history by its own changes keeps it."""
    store = open_store(quotas=Quotas(bytes=1000))

    def line(id: str, states: int) -> bytes:
        at = "2026-01-01T00:00:00Z"
        past = [
            {"event": "updated" if n else "added", "at": at, "version": n + 1, "text": 98 * "t", "metadata": {}}
            for n in range(states)
        ]
        memory = {"id": id, "text": "now", "vector": [1.0] * DIM, "version": states + 1, "event": "updated"}
        return orjson.dumps({**memory, "history": past})

    room = (1000 - 3 - 2 - VECTOR_BYTES) // 100
    with pytest.raises(QuotaExceeded):
        store.import_lines("acme", "ann", [line("1", room + 1)])
    assert (size(store), store.users("acme").users) == (Size(0, 0), [])
    store.import_lines("acme", "ann", [line("1", room)])
    assert size(store) == Size(1, 5)
    for n in range(20):
        store.update("acme", "ann", "1", text=100 * chr(97 + n), vector=unit(n))
    assert size(store) == Size(1, 102)
    assert list(verify(store.log)) == []


def test_the_keys_of_a_tenant_make_no_more_than_its_quota(open_store: Callable[..., Store], clock: Clock) -> None:
    """Keys that were revoked or have expired do not count. An operator, who uses no key, makes any number."""
    store = open_store(quotas=Quotas(keys=2))
    first, _ = store.create_key("acme"), store.create_key("acme", expires_at=clock() + timedelta(days=1))

    def make(tenant: str = "acme") -> None:
        store.create_key(tenant, by=first.key.id)

    with pytest.raises(QuotaExceeded, match="A tenant may have 2 keys") as refusal:
        make()
    assert (refusal.value.code, refusal.value.field) == ("quota_exceeded", None)
    make("other")
    clock.advance(86_400)
    make()
    with pytest.raises(QuotaExceeded):
        make()
    store.revoke_key("acme", first.key.id)
    make()
    assert len(store.keys("acme").keys) == 4
    store.create_key("acme")


def test_a_memory_that_expires_is_counted_no_more(store: Store, clock: Clock) -> None:
    memory = NewMemory("1", "soon", unit(0), expires_at=clock().replace(hour=1))
    store.append([Append("acme", "ann", (memory,), issued_at=clock())])
    assert size(store) == Size(1, 6)
    clock.advance(7200)
    while store.background_step():
        pass
    assert size(store) == Size(0, 0)


def test_verify_finds_a_wrong_size(store: Store) -> None:
    append(store, "ann", "one")
    with store.log.write() as connection:
        connection.exec_driver_sql("UPDATE tenants SET memories = 7")
    assert list(verify(store.log)) == [
        "tenant 'acme': its users have 1 memories and 5 bytes of texts where 7 and 5 were written"
    ]


def test_the_quota_of_memories_is_of_all_users_of_a_tenant(open_store: Callable[..., Store]) -> None:
    store = open_store(quotas=Quotas(memories=3))
    append(store, "ann", "1", "2")
    assert refused(append(store, "bob", "3", "4")) == (
        "This would exceed a tenant's quota of memories, which is 3: delete some memories first."
    )
    assert size(store).memories == 2
    assert isinstance(append(store, "bob", "3"), AppendResult)
    assert isinstance(append(store, "bob", "3"), AppendResult)  # it is there already
    assert isinstance(append(store, "ann", "1", "2", "3", tenant="other"), AppendResult)
    refused(append(store, "ann", "4"))
    store.delete("acme", "bob", "3")
    assert isinstance(append(store, "ann", "4"), AppendResult)


def test_the_quota_of_bytes_counts_texts_metadata_and_vectors(open_store: Callable[..., Store]) -> None:
    exact = 2 * (VECTOR_BYTES + 1 + 2)
    store = open_store(quotas=Quotas(bytes=exact))
    append(store, "ann", "1", "2")
    assert store.user("acme", "ann").bytes == exact
    with pytest.raises(QuotaExceeded) as error:
        store.update("acme", "ann", "1", metadata={"a": 1})
    assert error.value.message.startswith(f"This would exceed a tenant's quota of bytes, which is {exact}:")
    assert store.get("acme", "ann", "1").metadata == {}
    assert store.user("acme", "ann").version == 2


def test_each_call_of_a_group_commit_is_counted_by_itself(open_store: Callable[..., Store]) -> None:
    store = open_store(quotas=Quotas(memories=2))

    def call(user: str, *ids: str) -> tuple[Append, ...]:
        return (Append("acme", user, tuple(NewMemory(id, id, unit(0)) for id in ids)),)

    results = store.append_together([call("ann", "1"), call("bob", "2", "3"), call("bob", "2"), call("ann", "4")])
    assert [isinstance(result, list) for result in results] == [True, False, True, False]
    assert [memory.id for memory in store.list("acme", "bob").memories] == ["2"]
    assert list(verify(store.log)) == []


def test_a_tenant_above_its_quota_may_shrink(open_store: Callable[..., Store]) -> None:
    before = open_store()
    append(before, "ann", "1", "a long text", "3")
    store = open_store(quotas=Quotas(memories=1, bytes=10))
    shorter = NewMemory("a long text", "short", unit(1))
    (result,) = store.append([Append("acme", "ann", (shorter,), upsert=True)])
    assert isinstance(result, AppendResult)
    assert store.delete_many("acme", "ann", ["1"]) == (1, [])
    refused(append(store, "ann", "4"))
    assert store.erase_user("acme", "ann")[0] == 2


def test_an_import_is_counted(open_store: Callable[..., Store]) -> None:
    source = open_store()
    append(source, "ann", "1", "2", "3")
    lines = list(source.export("acme", "ann"))
    store = open_store(quotas=Quotas(memories=5))
    with pytest.raises(QuotaExceeded):
        store.import_lines("acme", "bob", lines)
    assert store.user("acme", "bob").memories == 0
    assert store.import_lines("acme", "bob", lines[:2]).imported == 2


def test_two_stores_count_together(open_store: Callable[..., Store]) -> None:
    one, other = (open_store(quotas=Quotas(memories=2)) for _ in range(2))
    append(one, "ann", "1")
    append(other, "bob", "2")
    refused(append(one, "ann", "3"))
    refused(append(other, "eve", "4"))
    assert size(one) == Size(2, 6)


def test_writers_at_the_same_time_exceed_a_quota_by_one_write_at_most(open_store: Callable[..., Store]) -> None:
    """On PostgreSQL each counts what the other has committed. On SQLite writers follow each other."""
    stores = [open_store(quotas=Quotas(memories=20)) for _ in range(2)]

    def fill(number: int) -> None:
        for n in range(20):
            append(stores[number], f"user {number}", f"{number} {n}")

    writers = [threading.Thread(target=fill, args=(number,)) for number in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert 20 <= size(stores[0]).memories <= 21
    refused(append(stores[0], "another", "one"))
    assert list(verify(stores[0].log)) == []
