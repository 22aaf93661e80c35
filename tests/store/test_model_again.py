"""The model of test_model.py, with every write repeated at once, and now and then all writes repeated later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from store import Append, Appended, AppendResult, Conflict, NewMemory, Store, StoreError
from tests.store.test_model import VECTORS, Known, Replicas, _settings, run_on_postgresql, stores, texts, users


@dataclass(frozen=True)
class SentWrite:
    """A write that was made, how to send it again, and the model of its user and memory."""

    send: Callable[[Store], Any]
    answer: Any
    user: tuple[str, str]
    known: Known | None = None  # of a write that is answered with a Conflict after an erasure
    id: str | None = None  # of an update
    deaths: int = 0
    made: str | None = None  # the generated id, of an append without a write id


class Sender:
    """A store of the machine. Its writes are sent to the other store as well, which must answer alike."""

    def __init__(self, store: Store, machine: Again) -> None:
        self.store = store
        self.machine = machine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def _twice(self, send: Callable[[Store], Any]) -> Any:
        answer = send(self.store)
        now = self.machine.clock.now
        for sender in self.machine.stores:
            assert send(sender.store) == answer  # type: ignore[attr-defined]
        self.machine.clock.now = now  # the model reads the time of the first write
        return answer

    def append(self, requests: Sequence[Append]) -> list[AppendResult | StoreError]:
        named = [replace(request, write_id=self.machine.write_id()) for request in requests]
        answers = self.store.append(named)
        now = self.machine.clock.now
        made = [pair for pair in zip(named, answers, strict=True) if isinstance(pair[1], AppendResult)]
        again = [request for request, _ in made]
        for sender in self.machine.stores:
            assert sender.append_together([[request] for request in again]) == [[answer] for _, answer in made]
        self.machine.clock.now = now
        for request, answer in made:
            user = request.tenant, request.user_id
            late = replace(request, issued_at=now)
            self.machine.sent.append(
                SentWrite(lambda store, late=late: store.append([late])[0], answer, user, self.machine.known[user])  # type: ignore[misc]
            )
        return answers

    def update(self, tenant: str, user_id: str, id: str, **changes: Any) -> Any:
        name, user = self.machine.write_id(), (tenant, user_id)
        known = self.machine.known[user]

        def send(store: Store) -> Any:
            return store.update(tenant, user_id, id, write_id=name, **changes)

        answer = self._twice(send)
        self.machine.sent.append(SentWrite(send, answer, user, known, id, known.deaths[id]))
        return answer

    def delete(self, *where: Any) -> Any:
        return self._keep("delete", *where)

    def delete_where(self, *where: Any) -> Any:
        return self._keep("delete_where", *where)

    def erase_user(self, *where: Any) -> Any:
        return self._keep("erase_user", *where)

    def _keep(self, method: str, *where: Any) -> Any:
        name = self.machine.write_id()

        def send(store: Store) -> Any:
            return getattr(store, method)(*where, write_id=name)

        answer = self._twice(send)
        self.machine.sent.append(SentWrite(send, answer, (where[0], where[1])))
        return answer


class Again(Replicas):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[SentWrite] = []
        self.names = iter(range(1_000_000))

    def open(self, number: int) -> Store:
        return Sender(super().open(number), self)  # type: ignore[return-value]

    def write_id(self) -> str:
        return f"w{next(self.names)}"

    @rule(n=stores, user=users, text=texts, skip=st.booleans())
    def add_with_a_generated_id(self, n: int, user: tuple[str, str], text: str, skip: bool) -> None:
        memory = NewMemory(self.write_id(), text, VECTORS[0], generated_id=True)
        request = Append(*user, (memory,), "skip" if skip else "add", issued_at=self.clock.now)

        def send(store: Store) -> Any:
            return store.append([request])[0]

        answer = send(self.stores[n].store)  # type: ignore[attr-defined]
        self._expect_append(request, answer, self.clock.now)
        if isinstance(answer, AppendResult) and answer.memories[0].status == "added":
            self.sent.append(SentWrite(send, answer, user, self.known[user], made=memory.id))

    def first_answer(self, sent: SentWrite) -> Any:
        """The first answer to the append. If an import has replaced what it added, with the version of the import."""
        imported = None if sent.made is None else self.known[sent.user].imported.get(sent.made)
        if sent.made is None or imported is None:
            return sent.answer
        return AppendResult([Appended(sent.made, "added", imported)], imported)

    @rule(n=stores)
    def send_all_again(self, n: int) -> None:
        store = self.stores[n].store  # type: ignore[attr-defined]
        for sent in self.sent:
            known = self.known[sent.user]
            erased = sent.known is not None and sent.known is not known
            if sent.id is None:
                answer = sent.send(store)
                if erased:
                    assert isinstance(answer, Conflict)
                    assert answer.code == "erased"
                else:
                    assert answer == self.first_answer(sent)
            elif erased or sent.id not in self.live(sent.user) or known.deaths[sent.id] > sent.deaths:
                with pytest.raises(Conflict, match="deleted since"):
                    sent.send(store)
            else:
                assert sent.send(store) == sent.answer


class OnSqlite(Again):
    pass


TestSqlite = pytest.mark.slow(OnSqlite.TestCase)
TestSqlite.settings = settings(_settings, max_examples=40)


@pytest.mark.slow
def test_postgresql(postgres: str) -> None:
    run_on_postgresql(Again, postgres)
