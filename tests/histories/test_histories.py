"""The checker accepts the histories of a correct store, and finds every planted fault."""

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store import Append as StoreAppend
from store import IndexOptions, NewMemory, Store, StoreError
from store import Search as StoreSearch
from tests import workload
from tests.histories.check import check
from tests.histories.records import (
    Answer,
    Append,
    Appended,
    Delete,
    DeleteWhere,
    Erase,
    Event,
    Found,
    Get,
    List,
    New,
    One,
    Operation,
    Refused,
    Removed,
    Search,
    Seen,
    Update,
)
from tests.repetitions import repetitions
from tests.workload import DIM, Workload

TENANT = "default"
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
USERS = ("ann", "bob")


def rules(history: Sequence[Event]) -> list[str]:
    return [violation.rule for violation in check(history)]


# Histories by hand.

NEAR: tuple[float, ...] = (1.0, 0.0)
FAR: tuple[float, ...] = (0.0, 1.0)


def new(n: int, user: str = "ann") -> New:
    return New(f"{user} {n}", NEAR, {}, f"id-{n}")


def shown(n: int, version: int, user: str = "ann") -> Seen:
    return Seen(user, f"id-{n}", f"{user} {n}", {}, version, 1.0)


def add(n: int, version: int, began: float, ended: float) -> Event:
    return Event("ann", Append((new(n),)), Appended(((f"id-{n}", "added", version),), version), began, ended)


def lost_add(n: int, began: float) -> Event:
    return Event("ann", Append((new(n),)), None, began)


def look(version: int, memories: Sequence[Seen], began: float, ended: float) -> Event:
    return Event("ann", Search(NEAR, 1000), Found(tuple(memories), version, "exact"), began, ended)


def delete(n: int, answer: Answer | None, began: float, ended: float = math.inf) -> Event:
    return Event("ann", Delete(f"id-{n}"), answer, began, ended)


def get(n: int, answer: Answer, began: float, ended: float) -> Event:
    if isinstance(answer, One):
        answer = One(replace(answer.memory, score=None))
    return Event("ann", Get(f"id-{n}"), answer, began, ended)


GONE = Refused("not_found")


def test_an_empty_history_is_accepted() -> None:
    assert check([]) == []
    assert check([look(0, [], 0, 1), get(1, GONE, 0, 1), delete(1, GONE, 0, 1)]) == []


def test_a_read_may_see_either_side_of_a_write_that_it_overlaps() -> None:
    write = add(1, 1, 0, 10)
    for began in (1, 5, 9):
        assert check([write, look(0, [], began, began + 2)]) == []
        assert check([write, look(1, [shown(1, 1)], began, began + 2)]) == []
        assert check([write, get(1, GONE, began, began + 2)]) == []
    assert rules([write, look(0, [], 11, 12)]) == ["out of order"]
    assert rules([write, get(1, GONE, 11, 12)]) == ["wrong answer"]


def test_a_later_read_must_not_be_older_than_an_earlier_one() -> None:
    write = add(1, 1, 0, 10)
    after, before = look(1, [shown(1, 1)], 1, 2), look(0, [], 3, 4)
    assert rules([write, after, before]) == ["out of order"]
    assert rules([write, get(1, One(shown(1, 1)), 1, 2), get(1, GONE, 3, 4)]) == ["wrong answer"]
    assert check([write, before, replace(after, began=3.5, ended=5)]) == []


def test_a_write_of_unknown_outcome_may_take_effect_at_any_later_time() -> None:
    seen = look(1, [shown(1, 1)], 20, 21)
    assert check([lost_add(1, 0), look(0, [], 10, 11)]) == []
    assert check([lost_add(1, 0), look(0, [], 10, 11), seen]) == []
    assert rules([lost_add(1, 0), seen, look(0, [], 22, 23)]) == ["out of order"]
    assert rules([lost_add(1, 30), seen]) != []  # it was read before it was sent
    assert check([lost_add(1, 0), add(2, 2, 5, 6), look(2, [shown(1, 1), shown(2, 2)], 7, 8)]) == []
    assert check([add(1, 1, 0, 1), delete(1, None, 2), look(1, [shown(1, 1)], 3, 4), look(2, [], 5, 6)]) == []


def test_events_without_a_version_are_tried_in_each_order() -> None:
    """Three deletions overlap. Only later reads tell their order."""
    writes = [add(1, 1, 0, 1), add(2, 2, 0, 1), add(3, 3, 0, 1)]
    deletions = [delete(n, Removed(1), 2, 9) for n in (1, 2, 3)]
    orders = {(1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1)}
    for _, second, third in orders:
        reads = [
            look(4, [shown(second, second), shown(third, third)], 3, 8),
            look(5, [shown(third, third)], 3, 8),
            look(6, [], 3, 8),
        ]
        assert check([*writes, *deletions, *reads]) == []
    got = [get(1, One(shown(1, 1)), 4, 5), get(2, GONE, 2.5, 3), get(3, One(shown(3, 3)), 4, 5)]
    assert check([*writes, *deletions, *got]) == []
    assert rules([*writes, *deletions, *got, get(2, One(shown(2, 2)), 6, 7)]) == ["wrong answer"]


def test_a_refusal_because_of_a_deletion_needs_a_deletion_that_may_be_later_than_the_write() -> None:
    begin = [add(1, 1, 0, 1), delete(1, Removed(1), 4, 6)]
    refused = Event("ann", Append((new(1),)), Refused("deleted"), 5, 9)
    assert check([*begin, refused]) == []
    assert rules([*begin, replace(refused, began=7)]) == ["wrong answer"]
    assert rules([begin[0], refused]) == ["wrong answer"]
    erased = Event("ann", Erase(), Removed(1, 2), 4, 6)
    assert check([begin[0], erased, replace(refused, answer=Refused("erased"))]) == []
    assert rules([begin[0], erased, replace(refused, answer=Refused("erased"), began=7)]) == ["wrong answer"]


def test_a_read_must_not_see_a_part_of_a_write() -> None:
    both = Event("ann", Append((new(1), new(2))), Appended((("id-1", "added", 1), ("id-2", "added", 2)), 2), 0, 9)
    assert check([both, look(2, [shown(1, 1), shown(2, 2)], 1, 2)]) == []
    assert rules([both, look(1, [shown(1, 1)], 1, 2)]) == ["torn write"]


def test_an_explanation_names_the_events() -> None:
    history = [add(1, 1, 0, 1), add(2, 2, 2, 3), look(2, [shown(2, 2)], 4, 5)]
    (violation,) = check(history)
    assert violation.events == (history[2],)
    assert "missing: ['id-1']" in str(violation)
    assert "search 1000" in str(violation)


# Histories of a store, in simulated time.


class Simulation:
    """Clients of a real store. Each operation begins, takes effect later and ends later still, by one clock."""

    def __init__(self, folder: Path, seed: int, clients: int = 6) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.store = Store.open(
            f"sqlite:///{folder}/log.db",
            dim=DIM,
            model="fake",
            synchronous="NORMAL",
            index=IndexOptions(switch=12, m=8, ef_construction=64),
            now=lambda: EPOCH + timedelta(seconds=self.now),
        )
        self.workloads = [Workload(user, self.rng) for user in USERS]
        self.clients = clients

    def run(self, operations: int) -> list[Event]:
        """Do so many operations, and return their history."""
        rng = self.rng
        begun = [(rng.expovariate(1.0), client) for client in range(self.clients)]
        waiting = [(began + rng.expovariate(1.0), client, began) for began, client in begun]
        heapq.heapify(waiting)
        history = []
        for number in range(operations):
            self.now, client, began = heapq.heappop(waiting)
            work = rng.choice(self.workloads)
            operation = work.next()
            ended = self.now + rng.expovariate(1.0)
            answer: Answer | None = None
            lost = rng.random() < 0.03
            if not lost or rng.random() < 0.5:
                answer = self.perform(work.user, operation, rng.uniform(began, self.now))
            if lost:
                answer = None
            work.learn(operation, answer)
            history.append(Event(work.user, operation, answer, began, math.inf if lost else ended, f"client {client}"))
            began = ended + rng.expovariate(4.0)
            heapq.heappush(waiting, (began + rng.expovariate(1.0), client, began))
            if number % 5 == 0:
                self.store.background_step()
        return history

    def perform(self, user: str, operation: Operation, sent: float) -> Answer:
        try:
            return self._perform(user, operation, EPOCH + timedelta(seconds=sent))
        except StoreError as error:
            return workload.refused(error)

    def _perform(self, user: str, operation: Operation, issued_at: datetime) -> Answer:
        store = self.store
        match operation:
            case Append(memories, upsert):
                rows = tuple(
                    NewMemory(one.id or f"given-{self.rng.getrandbits(64)}", one.text, array(one.vector), one.metadata)
                    for one in memories
                )
                (result,) = store.append([StoreAppend(TENANT, user, rows, upsert=upsert, issued_at=issued_at)])
                if isinstance(result, StoreError):
                    raise result
                return workload.appended(result)
            case Update(id, text, vector, metadata, if_version):
                given: dict[str, Any] = {} if metadata is None else {"metadata": metadata}
                if text is not None and vector is not None:
                    given |= {"text": text, "vector": array(vector)}
                changed = store.update(TENANT, user, id, if_version=if_version, issued_at=issued_at, **given)
                return One(workload.seen(changed))
            case Delete(id):
                store.delete(TENANT, user, id)
                return Removed(1)
            case DeleteWhere((key, value)):
                return Removed(store.delete_where(TENANT, user, {key: value}))
            case Erase():
                return Removed(*store.erase_user(TENANT, user))
            case Get(id):
                return One(workload.seen(store.get(TENANT, user, id)))
            case List(where):
                page = store.list(TENANT, user, limit=1000, filter=as_filter(where), order="updated_at")
                return Found(tuple(map(workload.seen, page.memories)))
            case Search(vector, top_k, where):
                (found,) = store.search([StoreSearch(TENANT, user, array(vector), top_k, as_filter(where))])
                if isinstance(found, StoreError):
                    raise found
                return workload.found(found)


def array(vector: Sequence[float]) -> Any:
    return np.array(vector, np.float32)


def as_filter(where: tuple[str, Any] | None) -> dict[str, Any] | None:
    return None if where is None else dict([where])


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> list[list[Event]]:
    recorded = []
    for seed in range(3):
        simulation = Simulation(tmp_path_factory.mktemp("log"), seed)
        recorded.append(simulation.run(500))
        simulation.store.close()
    return recorded


def test_a_correct_store_is_accepted(histories: list[list[Event]]) -> None:
    for history in histories:
        assert [str(violation) for violation in check(history)] == []


def test_the_simulation_yields_every_kind_of_answer(histories: list[list[Event]]) -> None:
    events = [event for history in histories for event in history]
    refusals = {event.answer.code for event in events if isinstance(event.answer, Refused)}
    assert {"id_conflict", "not_found", "version_mismatch", "deleted"} <= refusals
    assert {type(event.operation) for event in events if event.answer is None} >= {Append, Update, Search}
    assert {event.answer.index for event in events if isinstance(event.answer, Found)} == {None, "exact", "hnsw"}
    statuses = {entry[1] for event in events if isinstance(event.answer, Appended) for entry in event.answer.entries}
    assert statuses == {"added", "updated", "unchanged"}


# Faults that are planted in what the clients were answered: an event, changed, and what must be said of it.

Plant = Callable[[list[Event], random.Random], list[Event]]


def is_whole(event: Event) -> bool:
    """Whether the event is a search that found every memory, and at least one."""
    operation, answer = event.operation, event.answer
    whole = isinstance(operation, Search) and operation.top_k == workload.ALL and operation.where is None
    return whole and isinstance(answer, Found) and bool(answer.memories)


def version(event: Event) -> int:
    assert isinstance(event.answer, Found | Appended)
    assert event.answer.version is not None
    return event.answer.version


def memories(event: Event) -> tuple[Seen, ...]:
    assert isinstance(event.answer, Found)
    return event.answer.memories


def with_memories(event: Event, changed: Sequence[Seen]) -> Event:
    assert isinstance(event.answer, Found)
    return replace(event, answer=replace(event.answer, memories=tuple(changed)))


def put(history: list[Event], old: Event, fresh: Event) -> list[Event]:
    return [fresh if event is old else event for event in history]


def pairs(
    history: list[Event], first: Callable[[Event], bool], then: Callable[[Event], bool]
) -> list[tuple[Event, Event]]:
    """Pairs of events of one user, of which the first had ended when the second began; the next few for each event."""
    found = []
    for a in filter(first, history):
        after = [b for b in history if b.user == a.user and a.ended < b.began and then(b)]
        found += [(a, b) for b in sorted(after, key=lambda event: event.began)[:5]]
    return found


def stale_search(history: list[Event], rng: random.Random) -> list[Event]:
    """A search repeats the answer of an older one, although a newer version had been read meanwhile."""
    choices = [
        (old, late)
        for old, shown in pairs(history, is_whole, is_whole)
        if version(old) < version(shown)
        for _, late in pairs(history, lambda event, shown=shown: event is shown, is_whole)
    ]
    old, late = rng.choice(choices)
    return put(history, late, replace(late, operation=old.operation, answer=old.answer))


def stale_list(history: list[Event], rng: random.Random) -> list[Event]:
    """A list shows a memory that an earlier search no longer showed."""

    def is_list(event: Event) -> bool:
        return event.operation == List() and event.answer is not None

    choices = [
        (old, late)
        for old, shown in pairs(history, is_list, is_whole)
        for _, late in pairs(history, lambda event, shown=shown: event is shown, is_list)
        if {seen.id for seen in memories(old)} - {seen.id for seen in (*memories(shown), *memories(late))}
    ]
    old, late = rng.choice(choices)
    return put(history, late, replace(late, answer=old.answer))


def swapped_searches(history: list[Event], rng: random.Random) -> list[Event]:
    a, b = rng.choice([(a, b) for a, b in pairs(history, is_whole, is_whole) if version(a) < version(b)])
    swapped = put(history, a, replace(a, operation=b.operation, answer=b.answer))
    return put(swapped, b, replace(b, operation=a.operation, answer=a.answer))


def lost_memory(history: list[Event], rng: random.Random) -> list[Event]:
    event = rng.choice([event for event in history if is_whole(event)])
    gone = rng.choice(memories(event))
    return put(history, event, with_memories(event, [seen for seen in memories(event) if seen != gone]))


def never_visible(history: list[Event], rng: random.Random) -> list[Event]:
    """A memory that was acknowledged is in no answer."""
    writes = [
        (event, event.answer.entries[0][0])
        for event in history
        if isinstance(event.operation, Append) and isinstance(event.answer, Appended) and len(event.answer.entries) == 1
    ]
    shown = {seen.id for event in history if is_whole(event) for seen in memories(event)}
    write, id = rng.choice([(event, id) for event, id in writes if id in shown])
    hidden = []
    for event in history:
        if event.user == write.user and isinstance(event.answer, Found):
            event = with_memories(event, [seen for seen in memories(event) if seen.id != id])  # noqa: PLW2901
        hidden.append(event)
    return hidden


def doubled_memory(history: list[Event], rng: random.Random) -> list[Event]:
    """A retried append has added its memory twice."""
    event = rng.choice([event for event in history if is_whole(event)])
    twin = replace(rng.choice(memories(event)), id="given-again")
    return put(history, event, with_memories(event, sorted([*memories(event), twin], key=lambda s: -(s.score or 0.0))))


def repeated_memory(history: list[Event], rng: random.Random) -> list[Event]:
    event = rng.choice([event for event in history if is_whole(event)])
    twin = rng.choice(memories(event))
    at = memories(event).index(twin)
    return put(history, event, with_memories(event, [*memories(event)[:at], twin, *memories(event)[at:]]))


def foreign_memory(history: list[Event], rng: random.Random) -> list[Event]:
    event, other = (rng.choice([e for e in history if is_whole(e) and e.user == user]) for user in USERS)
    foreign = replace(rng.choice(memories(other)), user=rng.choice(USERS))
    return put(history, event, with_memories(event, [*memories(event), foreign]))


def resurrected(history: list[Event], rng: random.Random) -> list[Event]:
    """A deleted memory is found again."""
    choices = []
    for before, gone in pairs(history, is_whole, lambda e: isinstance(e.operation, Delete) and e.answer == Removed(1)):
        assert isinstance(gone.operation, Delete)
        deleted = [seen for seen in memories(before) if seen.id == gone.operation.id]
        for _, late in pairs(history, lambda event, gone=gone: event is gone, is_whole):
            if deleted and deleted[0].id not in {seen.id for seen in memories(late)}:
                choices.append((late, deleted[0]))
    late, seen = rng.choice(choices)
    return put(history, late, with_memories(late, [*memories(late), seen]))


def other_field(field: str) -> Plant:
    """One memory of one answer has another text, metadata, version or score."""

    def plant(history: list[Event], rng: random.Random) -> list[Event]:
        event = rng.choice([event for event in history if is_whole(event) and len(memories(event)) > 1])
        seen, other = rng.sample(memories(event), 2)
        value: Any = getattr(other, field)
        if field == "metadata":
            value = {"tag": -1}
        return put(
            history,
            event,
            with_memories(event, [replace(s, **{field: value}) if s is seen else s for s in memories(event)]),
        )

    return plant


def reused_version(history: list[Event], rng: random.Random) -> list[Event]:
    added = [
        e
        for e in history
        if isinstance(e.answer, Appended) and len(e.answer.entries) == 1 and e.answer.entries[0][1] == "added"
    ]
    one, other = rng.choice([(a, b) for a in added for b in added if a is not b and a.user == b.user])
    assert isinstance(one.answer, Appended)
    ((id, status, _),) = one.answer.entries
    return put(history, one, replace(one, answer=Appended(((id, status, version(other)),), version(other))))


def hidden_write(history: list[Event], rng: random.Random) -> list[Event]:
    """A memory is read that no event wrote."""
    shown = {seen.text for event in history if is_whole(event) for seen in memories(event)}
    said = Counter(new.text for e in history if isinstance(e.operation, Append) for new in e.operation.memories)
    writes = [
        event
        for event in history
        if isinstance(event.operation, Append) and isinstance(event.answer, Appended)
        if any(new.text in shown and said[new.text] == 1 for new in event.operation.memories)
    ]
    hidden = rng.choice(writes)
    return [event for event in history if event is not hidden]


def doubled_update(history: list[Event], rng: random.Random) -> list[Event]:
    """An update was applied twice, and its second version is in no answer."""
    updates = pairs(history, lambda e: isinstance(e.operation, Update) and isinstance(e.answer, One), is_whole)
    update, _ = rng.choice(updates)
    assert isinstance(update.answer, One)
    after = update.answer.memory.version

    def later(number: int | None) -> int | None:
        return number + 1 if number is not None and number > after else number

    shifted = []
    for event in history:
        answer = event.answer
        if event.user == update.user:
            if isinstance(answer, Found):
                seen = tuple(replace(s, version=later(s.version)) for s in answer.memories)
                answer = replace(answer, memories=seen, version=later(answer.version))
            elif isinstance(answer, One):
                answer = One(replace(answer.memory, version=later(answer.memory.version)))
            elif isinstance(answer, Appended):
                entries = tuple((id, status, later(at)) for id, status, at in answer.entries)
                answer = Appended(entries, later(answer.version))  # type: ignore[arg-type]
            elif isinstance(answer, Removed):
                answer = replace(answer, version=later(answer.version))
        shifted.append(replace(event, answer=answer))
    return shifted


def torn_write(history: list[Event], rng: random.Random) -> list[Event]:
    """A search shows the first memory of an append but not its last."""
    torn = []
    for event in history:
        if isinstance(event.answer, Appended) and isinstance(event.operation, Append):
            first, last = event.answer.entries[0], event.answer.entries[-1]
            if first[1] == last[1] == "added" and first[2] < last[2]:
                torn.append((event, first))
    write, (id, _, at) = rng.choice(torn)
    assert isinstance(write.operation, Append)
    new = write.operation.memories[0]
    half = Found((Seen(write.user, id, new.text, new.metadata, at, 1.0),), at, "exact")
    return [*history, Event(write.user, Search(new.vector, 1), half, write.began, write.ended, "planted")]


def unjustified(make: Callable[[Seen], tuple[Operation, Refused]]) -> Plant:
    """An operation is refused although its memory did not change between two searches."""

    def plant(history: list[Event], rng: random.Random) -> list[Event]:
        a, b = rng.choice([(a, b) for a, b in pairs(history, is_whole, is_whole) if same(a, b)])
        operation, refused = make(rng.choice(same(a, b)))
        width = (b.began - a.ended) / 3
        return [*history, Event(a.user, operation, refused, a.ended + width, b.began - width, "planted")]

    return plant


def same(a: Event, b: Event) -> list[Seen]:
    """The memories that did not change between two searches."""
    there = {(seen.id, seen.version) for seen in memories(b)}
    return [seen for seen in memories(a) if (seen.id, seen.version) in there]


FRESH = New("ann and bob know it", (1.0,) * DIM, {}, "fresh")
PLANTS: dict[str, tuple[Plant, set[str]]] = {
    "stale search": (stale_search, {"out of order"}),
    "stale list": (stale_list, {"wrong answer"}),
    "swapped searches": (swapped_searches, {"out of order"}),
    "lost memory": (lost_memory, {"wrong answer"}),
    "never visible": (never_visible, {"wrong answer"}),
    "doubled memory": (doubled_memory, {"wrong answer"}),
    "repeated memory": (repeated_memory, {"wrong answer"}),
    "foreign memory": (foreign_memory, {"foreign memory"}),
    "resurrected": (resurrected, {"wrong answer"}),
    "other text": (other_field("text"), {"wrong answer"}),
    "other metadata": (other_field("metadata"), {"wrong answer"}),
    "other version": (other_field("version"), {"wrong answer"}),
    "other score": (other_field("score"), {"wrong answer"}),
    "reused version": (reused_version, {"version reused"}),
    "hidden write": (hidden_write, {"unknown write"}),
    "doubled update": (doubled_update, {"unknown write", "wrong answer"}),
    "torn write": (torn_write, {"torn write"}),
    "unjustified 404": (unjustified(lambda seen: (Get(seen.id), GONE)), {"wrong answer"}),
    "unjustified 404 of a delete": (unjustified(lambda seen: (Delete(seen.id), GONE)), {"wrong answer"}),
    "unjustified conflict": (unjustified(lambda _: (Append((FRESH,)), Refused("id_conflict"))), {"wrong answer"}),
    "unjustified mismatch": (
        unjustified(lambda seen: (Update(seen.id, metadata={}, if_version=seen.version), Refused("version_mismatch"))),
        {"wrong answer"},
    ),
    "unjustified deletion": (
        unjustified(lambda seen: (Update(seen.id, metadata={}), Refused("deleted"))),
        {"wrong answer"},
    ),
}


@pytest.mark.parametrize("fault", PLANTS)
def test_a_planted_answer_is_found(histories: list[list[Event]], fault: str) -> None:
    plant, expected = PLANTS[fault]
    for number, history in enumerate(histories[: repetitions(3, quick=1)]):
        found = check(plant(history, random.Random(number)))
        assert {violation.rule for violation in found} & expected, "\n".join(map(str, found))


# Faults of the store.


class Faulty(Simulation):
    """A store that is wrong once, at the first opportunity after its 60th operation."""

    fault: str
    updates: list[Update]
    performed = 0

    def perform(self, user: str, operation: Operation, sent: float) -> Answer:
        self.performed += 1
        if self.fault == "updates again":
            self.update_again(user, operation)
        if self.performed < 60 or self.fault == "none":
            return super().perform(user, operation, sent)
        match self.fault, operation:
            case "acknowledges and forgets", Append((New(id=None),)):
                self.fault = "none"
                written = self.store.user(TENANT, user).version + 1
                return Appended((("given-0", "added", written),), written)
            case "appends twice", Append((New(id=None),)):
                self.fault = "none"
                super().perform(user, operation, sent)
            case "deletes and forgets", Delete(id) if isinstance(super().perform(user, Get(id), sent), One):
                self.fault = "none"
                return Removed(1)
            case "skips changes of an index", Search():
                searcher = self.store._searcher
                if self.performed < 90:
                    searcher.catch_up = lambda _, index, position: setattr(index, "version", position.version)  # type: ignore
                else:
                    self.fault = "none"
                    del searcher.catch_up
        return super().perform(user, operation, sent)

    def update_again(self, user: str, operation: Operation) -> None:
        """Apply an update a second time, after its memory got another text."""
        for past in self.updates:
            now = super().perform(user, Get(past.id), self.now)
            if isinstance(now, One) and now.memory.text != past.text:
                self.fault = "none"
                super().perform(user, past, self.now)
                return
        if isinstance(operation, Update) and operation.text is not None and operation.if_version is None:
            self.updates.append(operation)


@pytest.mark.parametrize(
    "fault",
    ["acknowledges and forgets", "appends twice", "deletes and forgets", "updates again", "skips changes of an index"],
)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_fault_of_the_store_is_found(tmp_path: Path, fault: str, seed: int) -> None:
    simulation = Faulty(tmp_path, seed)
    simulation.fault, simulation.updates = fault, []
    found = check(simulation.run(250))
    assert simulation.fault == "none"
    assert found != []
