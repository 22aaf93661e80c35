"""Random operations on one user, and the store's answers as a history records them (tests/histories).

Every text is unique and names its user. Its vector is the fake model's, so that both sides compute the same bits.
Ids come from a small pool, so that appends hit existing memories, deleted ones, and each other.
"""

import random
from itertools import count
from typing import Any

from deployments.embedding.fake import FakeModel, word_id
from store import AppendResult, SearchResult, StoreError
from store import Memory as Stored
from tests.histories.records import (
    Answer,
    Append,
    Appended,
    Delete,
    DeleteWhere,
    Erase,
    Found,
    Get,
    List,
    New,
    One,
    Operation,
    Refused,
    Search,
    Seen,
    Update,
    Vector,
)

DIM = 8
ALL = 1000
TAGS = 5
OWN_IDS = 12
_MODEL = FakeModel(DIM)
_KINDS = {
    "add": 26,
    "add many": 6,
    "upsert": 8,
    "repeat": 4,
    "update": 9,
    "update metadata": 5,
    "update version": 6,
    "delete": 8,
    "delete where": 1,
    "erase": 0.2,
    "search all": 14,
    "search": 6,
    "search where": 4,
    "list": 5,
    "list where": 2,
    "get": 8,
}


def vector_of(text: str) -> Vector:
    """(DIM,) The fake model's vector of a text."""
    ids = [word_id(word, _MODEL.info.vocab_size) for word in text.split()]
    return tuple(_MODEL._vector(ids).tolist())


class Workload:
    """Operations on one user. They are chosen from earlier answers, so that most of them find a memory.

    Args:
        memories: about how many memories to keep; more are deleted by a filter.
    """

    def __init__(self, user: str, rng: random.Random, memories: int = 25) -> None:
        self.user = user
        self._rng = rng
        self._memories = memories
        self._numbers = count()
        self._live = 0
        self._versions: dict[str, int] = {}  # by id: the newest version seen
        self._contents: dict[str, New] = {}

    def next(self) -> Operation:
        rng = self._rng
        (kind,) = rng.choices(list(_KINDS), list(_KINDS.values()))
        if self._live > self._memories and rng.random() < 0.2:
            kind = "delete where"
        where = ("tag", rng.randrange(TAGS))
        match kind:
            case "add":
                return Append((self._new(rng.choice([None, self._own_id()])),))
            case "add many":
                ids = rng.sample([f"own-{n}" for n in range(OWN_IDS)], 4)
                return Append(tuple(self._new(rng.choice([None, None, id])) for id in ids[: rng.randint(2, 4)]))
            case "upsert":
                return Append((self._new(self._own_id()),), upsert=True)
            case "repeat" if self._contents:
                return Append((self._contents[rng.choice(list(self._contents))],))
            case "update":
                text = self._text()
                return Update(self._some_id(), text, vector_of(text))
            case "update metadata":
                return Update(self._some_id(), metadata={"tag": rng.randrange(TAGS)})
            case "update version":
                id = self._some_id()
                text = self._text()
                known = self._versions.get(id, 1)
                return Update(id, text, vector_of(text), if_version=max(1, known - (rng.random() < 0.2)))
            case "delete":
                return Delete(self._some_id())
            case "delete where":
                return DeleteWhere(where)
            case "erase":
                return Erase()
            case "search":
                return Search(vector_of(self._text()), rng.randint(1, 5))
            case "search where":
                return Search(vector_of(self._text()), ALL, where)
            case "list":
                return List()
            case "list where":
                return List(where)
            case "get":
                return Get(self._some_id())
        return Search(vector_of(self._text()), ALL)

    def learn(self, operation: Operation, answer: Answer | None) -> None:
        """Learn from an answer."""
        seen = answer.memories if isinstance(answer, Found) else [answer.memory] if isinstance(answer, One) else []
        for memory in seen:
            self._note(memory.id, memory.version)
        if isinstance(operation, Append) and isinstance(answer, Appended):
            for new, (id, _, version) in zip(operation.memories, answer.entries, strict=True):
                self._note(id, version)
                self._contents[id] = New(new.text, new.vector, new.metadata, id)
        whole = isinstance(operation, List) or (isinstance(operation, Search) and operation.top_k == ALL)
        if whole and isinstance(answer, Found) and operation.where is None:  # type: ignore[union-attr]
            self._live = len(answer.memories)
            for id in [id for id in self._versions if id not in {memory.id for memory in seen}]:
                del self._versions[id]  # so that most operations find their memory
            self._contents = {id: new for id, new in self._contents.items() if id in self._versions}

    def _note(self, id: str, version: int) -> None:
        self._versions[id] = max(version, self._versions.get(id, 0))

    def _own_id(self) -> str:
        return f"own-{self._rng.randrange(OWN_IDS)}"

    def _some_id(self) -> str:
        return self._rng.choice([*self._versions, self._own_id()])

    def _text(self) -> str:
        return f"{self.user} note {next(self._numbers)}"

    def _new(self, id: str | None) -> New:
        text = self._text()
        return New(text, vector_of(text), {"tag": self._rng.randrange(TAGS)}, id)


def refused(error: StoreError) -> Refused:
    """A refusal: the code of a conflict, or `not_found`."""
    return Refused(error.code or "not_found")


def seen(memory: Stored) -> Seen:
    return Seen(memory.user_id, memory.id, memory.text, memory.metadata, memory.version, memory.score)


def seen_over_http(memory: dict[str, Any]) -> Seen:
    return Seen(
        memory["user_id"],
        memory["id"],
        memory["text"],
        memory["metadata"],
        memory["version"],
        memory.get("score"),
    )


def appended(result: AppendResult) -> Appended:
    return Appended(tuple((entry.id, entry.status, entry.version) for entry in result.memories), result.version)


def found(result: SearchResult) -> Found:
    return Found(tuple(map(seen, result.results)), result.version, result.index)
