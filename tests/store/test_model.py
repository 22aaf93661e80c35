"""Every operation, by two stores on one log as two replicas are, against a model of plain dictionaries."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import select

from store import (
    UNSET,
    Append,
    Appended,
    Conflict,
    IndexOptions,
    InvalidInput,
    Memory,
    NewMemory,
    NotFound,
    Search,
    SearchResult,
    Store,
)
from store.log.schema import THREAD_NAME, contents
from tests.store.conftest import DIM, Clock
from tests.store.log.test_filters import matches

VECTORS = np.random.default_rng(3).normal(size=(7, DIM)).astype(np.float32)
USERS = [("a", "ann"), ("a", "bob"), ("b", "ann")]
users = st.sampled_from([USERS[0], *USERS])  # one of them more often
stores = st.integers(0, 1)
ids = st.sampled_from(["1", "2", "3", "4", "5", "6", "7", "8"])
numbers = st.integers(0, 7)
texts = st.sampled_from(["tea", "coffee", "rain", "Ä"])
queries = st.sampled_from(["tea", "coffee rain", "rain coffee tea", "Ä", "snow"])
vectors = st.integers(0, len(VECTORS) - 1)
metadata = st.sampled_from([{}, {"k": 1}, {"k": 2}, {"k": "x", "l": [1]}])
lifetimes = st.sampled_from([None, None, None, 5.0, 50.0])
threads = st.sampled_from([None, None, "talk", "walk"])
filters = st.sampled_from(
    [
        None,
        {"k": 1},
        {"k": {"ne": 1}},
        {"OR": [{"k": 2}, {"l": {"contains": 1}}]},
        {"k": "no"},
        {"l": {"in": [1, 2]}},
        {"NOT": {"id": {"in": ["1", "2", "3"]}}},
        {"user_id": "ann", "text": {"icontains": "E"}},
        {"version": {"gt": 5}, "expires_at": None},
        {"expires_at": {"gt": "2026-01-01T00:00:10Z"}},
        {"thread": {"in": ["talk", None]}},
    ]
)
new_memories = st.lists(
    st.tuples(ids, texts, vectors, metadata, lifetimes, threads), min_size=1, max_size=6, unique_by=lambda new: new[0]
)


@dataclass
class Known:
    """The model of one user."""

    version: int = 0
    erased_at: Any = None
    memories: dict[str, Memory] = field(default_factory=dict)
    deleted_at: dict[str, Any] = field(default_factory=dict)
    events: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)
    deaths: Counter[str] = field(default_factory=Counter)  # deletions by id; imports do not reset them
    imported: dict[str, int] = field(default_factory=dict)  # by id: the version at which the imported history begins


class Replicas(RuleBasedStateMachine):
    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.folder = tempfile.TemporaryDirectory()
        self.known = {user: Known() for user in USERS}
        self.stores: list[Store] = []
        self.steps = 0

    @initialize()
    def start(self) -> None:
        self.log_url = self.new_log()
        self.stores = [self.open(n) for n in range(2)]

    def new_log(self) -> str:
        return f"sqlite:///{self.folder.name}/log.db"

    def open(self, number: int) -> Store:
        return Store.open(
            self.log_url,
            dim=DIM,
            model="fake",
            synchronous="NORMAL",
            index=IndexOptions(switch=4, m=8, ef_construction=64),
            index_budget_bytes=6_000_000,
            snapshot_dir=Path(self.folder.name) / f"snapshots{number}",
            now=self.clock,
        )

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        self.folder.cleanup()

    def live(self, user: tuple[str, str]) -> dict[str, Memory]:
        """The memories that have not expired. An expired one becomes a tombstone when a write touches it."""
        found = self.known[user].memories
        return {id: m for id, m in found.items() if m.expires_at is None or m.expires_at > self.clock.now}

    def bury(self, user: tuple[str, str], id: str) -> None:
        known = self.known[user]
        known.events[id] = [(event, None) for event, _ in known.events[id]] + [("deleted", None)]
        known.deaths[id] += 1
        del known.memories[id]

    @rule(n=stores, seconds=st.sampled_from([0.0, 1.0, 20.0]))
    def wait(self, n: int, seconds: float) -> None:
        self.clock.advance(seconds)
        for _ in range(6):
            self.stores[n].background_step()

    @rule(n=stores)
    def restart(self, n: int) -> None:
        self.stores[n].close()
        self.stores[n] = self.open(n)

    @rule(
        n=stores,
        batch=st.lists(
            st.tuples(users, new_memories, st.booleans(), st.booleans(), st.sampled_from([0.0, 0.0, 0.0, 30.0])),
            min_size=1,
            max_size=4,
        ),
    )
    def append(self, n: int, batch: list[Any]) -> None:
        requests = []
        for (tenant, user_id), new, upsert, skip, age in batch:
            memories = tuple(
                NewMemory(
                    id,
                    text,
                    VECTORS[vector],
                    data,
                    None if life is None else self.clock.now + timedelta(seconds=life),
                    thread=thread,
                )
                for id, text, vector, data, life, thread in new
            )
            issued_at = self.clock.now - timedelta(seconds=age)
            requests.append(Append(tenant, user_id, memories, "skip" if skip else "add", upsert, issued_at))
        results = self.stores[n].append(requests)
        now = self.clock.now
        for request, result in zip(requests, results, strict=True):
            self._expect_append(request, result, now)

    def _expect_append(self, request: Append, result: Any, now: Any) -> None:
        user = (request.tenant, request.user_id)
        known = self.known[user]
        for id in [id for id, m in known.memories.items() if m.expires_at is not None and m.expires_at <= now]:
            if any(new.id == id for new in request.memories):  # it is deleted, at the time at which it expired
                known.deleted_at[id] = known.memories[id].expires_at
                self.bury(user, id)
        if isinstance(result, Conflict):
            stale = known.erased_at is not None and request.issued_at <= known.erased_at
            clash = any(
                new.id in known.memories
                and not request.upsert
                and (known.memories[new.id].text, known.memories[new.id].metadata, known.memories[new.id].expires_at)
                != (new.text, new.metadata, new.expires_at)
                for new in request.memories
            )
            buried = any(
                new.id not in known.memories
                and known.deleted_at.get(new.id) is not None
                and request.issued_at <= known.deleted_at[new.id]
                for new in request.memories
            )
            assert stale or clash or buried, result
            return
        assert not isinstance(result, Exception), result
        assert known.erased_at is None or request.issued_at > known.erased_at
        for new, done in zip(request.memories, result.memories, strict=True):
            old = known.memories.get(new.id)
            same = old is not None and (old.text, old.metadata, old.expires_at) == (
                new.text,
                new.metadata,
                new.expires_at,
            )
            moves = old is not None and new.thread not in (None, old.thread)
            if done.id != new.id:
                assert request.on_duplicate == "skip"
                assert old is None
                self._expect_skipped(user, new, done, now)
                continue
            assert done.id == new.id
            if same and not moves:
                assert old is not None
                assert (done.status, done.version) == ("unchanged", old.version)
                continue
            if request.on_duplicate == "skip" and old is None:
                live = self.live(user).values()
                of_thread = [m for m in live if new.thread in (None, m.thread)]
                twins = [m for m in of_thread if (m.text, m.metadata) == (new.text, new.metadata)]
                assert not twins, "a duplicate was added"
            assert done.status == ("added" if old is None else "updated")
            assert old is None or request.upsert or same
            assert done.version > known.version
            known.version = done.version
            known.deleted_at.pop(new.id, None)
            known.events.setdefault(new.id, []).append((done.status, new.text))
            known.memories[new.id] = Memory(
                new.id,
                request.user_id,
                new.text,
                new.metadata,
                now if old is None else old.created_at,
                now,
                new.expires_at,
                done.version,
                vector=old.vector
                if old is not None and (old.text, old.metadata) == (new.text, new.metadata)
                else new.vector,
                thread=old.thread if old is not None and new.thread is None else new.thread,
            )
        assert result.version >= known.version

    def _expect_skipped(self, user: tuple[str, str], new: NewMemory, done: Appended, now: Any) -> None:
        """A duplicate stands in for the new memory, and expires no earlier than it would have."""
        known = self.known[user]
        twin = known.memories[done.id]
        assert (twin.text, twin.metadata) == (new.text, new.metadata)
        assert new.thread in (None, twin.thread)
        if twin.expires_at is None or (new.expires_at is not None and twin.expires_at >= new.expires_at):
            assert (done.status, done.version) == ("unchanged", twin.version)
            return
        assert done.status == "updated"
        assert done.version > known.version
        known.version = done.version
        known.events[done.id].append(("updated", twin.text))
        known.memories[done.id] = replace(twin, expires_at=new.expires_at, version=done.version, updated_at=now)

    def pick(self, user: tuple[str, str], number: int) -> str:
        """An id: that of an existing memory if there is any."""
        there = sorted(self.known[user].memories)
        return there[number % len(there)] if there else str(number)

    @rule(
        n=stores,
        user=users,
        number=numbers,
        text=st.none() | texts,
        vector=vectors,
        data=st.none() | metadata,
        stale=st.booleans(),
        thread=st.just(UNSET) | threads,
    )
    def update(
        self, *, n: int, user: Any, number: int, text: Any, vector: int, data: Any, stale: bool, thread: Any
    ) -> None:
        id = self.pick(user, number)
        old = self.live(user).get(id)
        changes: dict[str, Any] = {"metadata": UNSET if data is None else data, "thread": thread}
        if text is not None:
            changes |= {"text": text, "vector": VECTORS[vector]}
        if old is not None:
            changes["if_version"] = old.version - 1 if stale else old.version
        try:
            got = self.stores[n].update(*user, id, **changes)
        except NotFound:
            assert id not in self.live(user)
            return
        except Conflict:
            assert old is not None
            assert stale
            return
        assert old is not None
        assert not stale
        known = self.known[user]
        new = replace(
            old,
            text=old.text if text is None else text,
            vector=old.vector if text is None else VECTORS[vector],
            metadata=old.metadata if data is None else data,
            thread=old.thread if thread is UNSET else thread,
        )
        after, before = ((one.text, one.metadata, one.thread) for one in (new, old))
        if after != before or not np.array_equal(new.vector, old.vector):
            assert got.version > known.version
            known.version = got.version
            new = replace(new, version=got.version, updated_at=self.clock.now)
            known.events[id].append(("updated", new.text))
        known.memories[id] = new
        assert got == replace(new, vector=None)

    @rule(n=stores, user=users, number=numbers)
    def delete(self, n: int, user: Any, number: int) -> None:
        id = self.pick(user, number)
        try:
            version = self.stores[n].delete(*user, id)
        except NotFound:
            assert id not in self.live(user)
            return
        assert version > self.known[user].version
        self.known[user].version = version
        self.known[user].deleted_at[id] = self.clock.now
        self.bury(user, id)

    @rule(n=stores, user=users, filter=filters.filter(bool))
    def delete_where(self, n: int, user: Any, filter: Any) -> None:
        gone = self.stores[n].delete_where(*user, filter)
        expected = [id for id, m in self.live(user).items() if matches(filter, m)]
        assert gone == len(expected)
        for id in expected:
            self.known[user].deleted_at[id] = self.clock.now
            self.bury(user, id)

    @rule(n=stores, user=users)
    def erase(self, n: int, user: Any) -> None:
        gone, version = self.stores[n].erase_user(*user)
        known = self.known[user]
        assert len(self.live(user)) <= gone <= len(known.memories)
        assert version > known.version
        self.known[user] = Known(version=version, erased_at=self.clock.now)

    @rule(n=stores, user=users)
    def export_erase_import(self, n: int, user: Any) -> None:
        lines = list(self.stores[n].export(*user))
        live = self.live(user)
        if len(live) != len(self.known[user].memories):
            return
        self.erase(n, user)
        done = self.stores[1 - n].import_lines(*user, lines)
        assert (done.imported, done.unchanged) == (len(live), 0)
        assert list(self.stores[n].export(*user)) == lines
        known = self.known[user]
        known.memories = live
        known.version = max((m.version for m in live.values()), default=known.version)
        events = {id: [(e.event, e.text) for e in self.stores[n].history(*user, id)] for id in live}
        known.events = events

    @rule(n=stores, user=users, number=numbers)
    def import_what_was_deleted(self, n: int, user: Any, number: int) -> None:
        lines = list(self.stores[n].export(*user))
        live = self.live(user)
        known = self.known[user]
        if len(live) < 2 or len(live) != len(known.memories):
            return
        id = self.pick(user, number)
        self.delete(n, user, number)
        done = self.stores[1 - n].import_lines(*user, lines)
        assert (done.imported, done.unchanged) == (1, len(live) - 1)
        got = self.stores[n].get(*user, id)
        assert got.version > known.version
        known.version = got.version
        known.memories[id] = replace(live[id], version=got.version)
        assert got == replace(known.memories[id], vector=None)
        del known.deleted_at[id]
        history = self.stores[n].history(*user, id)
        known.events[id] = [(e.event, e.text) for e in history]
        known.imported[id] = history[0].version

    @rule(
        n=stores,
        wanted=st.lists(
            st.tuples(users, vectors, st.sampled_from([1, 3, 100]), filters, st.booleans()), min_size=1, max_size=4
        ),
    )
    def search(self, n: int, wanted: list[Any]) -> None:
        requests = [
            Search(*user, VECTORS[vector], k, filter, include_vectors=with_vectors)
            for user, vector, k, filter, with_vectors in wanted
        ]
        for request, result in zip(requests, self.stores[n].search(requests), strict=True):
            self._expect_search(request, result)

    def _expect_search(self, request: Search, result: Any) -> None:
        assert isinstance(result, SearchResult), result
        live = self.live((request.tenant, request.user_id))
        matching = [m for m in live.values() if request.filter is None or matches(request.filter, m)]
        assert len(result.results) == min(request.top_k, len(matching))

        def score(memory: Memory) -> float:
            assert memory.vector is not None
            a, b = memory.vector.astype(np.float64), request.vector.astype(np.float64)
            return round(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), 4)

        expected = sorted(matching, key=lambda m: (-score(m), -m.version))[: request.top_k]
        assert [round(m.score or 0.0, 4) for m in result.results] == pytest.approx(
            [score(m) for m in expected], abs=2e-4
        )
        assert [m.id for m in result.results] == [m.id for m in expected]
        for found in result.results:
            own = live[found.id]
            assert replace(found, score=None, vector=None) == replace(own, vector=None)
            assert (found.vector is None) != request.include_vectors
            assert found.vector is None or np.array_equal(found.vector, own.vector)

    @rule(n=stores, user=users, query=queries, k=st.sampled_from([1, 3, 100]), filter=filters)
    def search_by_words(self, n: int, user: Any, query: str, k: int, filter: Any) -> None:
        (result,) = self.stores[n].search([Search(*user, None, k, filter, query=query, mode="words")])
        assert isinstance(result, SearchResult), result
        matching = [m for m in self.live(user).values() if filter is None or matches(filter, m)]
        having = Counter(m.text for m in matching)

        def score(memory: Memory) -> float:
            """BM25 of a text that is one word, apart from a factor that all have."""
            return round(math.log1p((len(matching) - having[memory.text] + 0.5) / (having[memory.text] + 0.5)), 9)

        found = [m for m in matching if m.text in query.split()]
        expected = sorted(found, key=lambda m: (-score(m), -m.version))[:k]
        assert [m.id for m in result.results] == [m.id for m in expected]
        most = score(expected[0]) if expected else 1.0
        assert [m.score for m in result.results] == pytest.approx([score(m) / most for m in expected], abs=2e-6)

    @rule(n=stores, user=users, limit=st.sampled_from([1, 3, 1000]), filter=filters, falling=st.booleans())
    def list(self, n: int, user: Any, limit: int, filter: Any, falling: bool) -> None:
        found: list[Memory] = []
        cursor = None
        for order in ("created_at", "updated_at"):
            found, cursor = [], None
            while True:
                page = self.stores[n].list(
                    *user, limit=limit, cursor=cursor, filter=filter, order=("-" if falling else "") + order
                )
                assert len(page.memories) <= limit
                found += page.memories
                cursor = page.next_cursor
                if cursor is None:
                    break
            matching = [m for m in self.live(user).values() if filter is None or matches(filter, m)]
            if order == "updated_at":
                ours = sorted(matching, key=lambda m: (m.updated_at, m.version), reverse=falling)
                assert [m.id for m in found] == [m.id for m in ours]
            else:  # memories of one batch have one time
                ours = sorted(matching, key=lambda m: m.created_at, reverse=falling)
                assert [m.created_at for m in found] == [m.created_at for m in ours]
                assert sorted((m.created_at, m.id) for m in found) == sorted((m.created_at, m.id) for m in ours)

    @rule(n=stores, user=users, id=ids)
    def get(self, n: int, user: Any, id: str) -> None:
        expected = self.live(user).get(id)
        if expected is None:
            with pytest.raises(NotFound):
                self.stores[n].get(*user, id)
        else:
            assert self.stores[n].get(*user, id) == replace(expected, vector=None)

    @rule(n=stores, user=users, id=ids)
    def history(self, n: int, user: Any, id: str) -> None:
        expected = self.known[user].events.get(id)
        if expected is None:
            with pytest.raises(NotFound):
                self.stores[n].history(*user, id)
            return
        events = [(event.event, event.text) for event in self.stores[n].history(*user, id)]
        if id in self.known[user].memories and id not in self.live(user):  # it may have been purged
            assert [event for event, _ in events[: len(expected)]] == [event for event, _ in expected]
        else:
            assert events[: len(expected)] == expected

    @rule(n=stores)
    def count(self, n: int) -> None:
        for user in USERS:
            stats = self.stores[n].user(*user)
            known = self.known[user].memories
            assert len(self.live(user)) <= stats.memories <= len(known)
            if stats.memories == len(known):
                sizes = [len(m.text.encode()) + len(orjson.dumps(m.metadata)) + 4 * DIM for m in known.values()]
                assert stats.bytes == sum(sizes)
            assert stats.version >= self.known[user].version
        for tenant in ("a", "b"):
            page = self.stores[n].users(tenant)
            named = {user.user_id for user in page.users}
            assert {u for t, u in USERS if t == tenant and self.live((t, u))} <= named

    @rule(n=stores)
    def refuse(self, n: int) -> None:
        wrong = NewMemory("9", "x", np.zeros(DIM, np.float32))
        right = NewMemory("9", "x", VECTORS[0])
        results = self.stores[n].append([Append("a", "ann", (right, wrong))])
        assert isinstance(results[0], InvalidInput)
        assert results[0].param == "1.vector"

    @invariant()
    def everyone_is_found(self) -> None:
        """Search on the stores in turn, and every third time on none, so that indexes fall behind."""
        self.steps += 1
        if self.stores and self.steps % 3:
            requests = [Search(*user, VECTORS[self.steps % 7], 100) for user in USERS]
            for request, result in zip(requests, self.stores[self.steps % 3 - 1].search(requests), strict=True):
                self._expect_search(request, result)

    @invariant()
    def forget_purged(self) -> None:
        """An expired memory may be purged at any time. The model follows once it is."""
        if not self.stores:
            return
        for user, known in self.known.items():
            for id in [id for id in known.memories if id not in self.live(user)]:
                events = self.stores[0].history(*user, id)
                if events[-1].event == "deleted":
                    known.deleted_at[id] = events[-1].at
                    self.bury(user, id)
                    known.version = max(known.version, events[-1].version)
        threads = [{memory.thread for memory in known.memories.values()} - {None} for known in self.known.values()]
        with self.stores[0].log.read() as connection:
            statement = select(contents.c.text).where(contents.c.model == THREAD_NAME, contents.c.blank == 0)
            names = sorted(connection.execute(statement).scalars())
        assert names == sorted(
            name for of_user in threads for name in of_user
        )  # each once, none of a thread that ended


_settings = settings(
    deadline=None,
    max_examples=60,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


_databases = iter(range(100_000))


class OnSqlite(Replicas):
    pass


TestSqlite = pytest.mark.slow(OnSqlite.TestCase)
TestSqlite.settings = _settings


def run_on_postgresql(machine: type[Replicas], postgres: str) -> None:
    class OnPostgres(machine):  # type: ignore[misc, valid-type]
        def new_log(self) -> str:
            self.name = f"model{next(_databases)}"
            with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {self.name}")
            return f"{postgres}/{self.name}"

        def teardown(self) -> None:
            super().teardown()
            with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
                connection.execute(f"DROP DATABASE IF EXISTS {self.name} WITH (FORCE)")

    case = OnPostgres.TestCase
    case.settings = settings(_settings, max_examples=10, phases=[Phase.generate])
    case("runTest").runTest()


@pytest.mark.slow
def test_postgresql(postgres: str) -> None:
    run_on_postgresql(Replicas, postgres)
