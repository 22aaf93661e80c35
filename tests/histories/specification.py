"""The specification: the answers of a store that does one operation after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
    Metadata,
    One,
    Operation,
    Refused,
    Removed,
    Search,
    Seen,
    Update,
    Vector,
    Where,
    described,
)

SCORE_TOLERANCE = 1e-5  # scores are sums of float32 products, rounded to six decimals


@dataclass(frozen=True, slots=True)
class _Held:
    text: str
    metadata: Metadata
    version: int
    vector: Vector


@dataclass(frozen=True, slots=True)
class State:
    """A user at one version. `deleted`, `erased`: the latest times of its memories' deletions and of its own erasure.

    A write that was sent before its memory was deleted, or its user erased, may be refused, since only the server's
    clock can tell which came first.
    """

    version: int = 0
    held: dict[str, _Held] = field(default_factory=dict)
    deleted: dict[str, float] = field(default_factory=dict)
    erased: float = -math.inf

    def matching(self, where: Where | None) -> dict[str, _Held]:
        if where is None:
            return self.held
        key, value = where
        return {id: held for id, held in self.held.items() if key in held.metadata and held.metadata[key] == value}


def perform(event: Event, state: State) -> tuple[Answer, State]:
    """The answer to the operation, and the state after it."""
    operation = event.operation
    if isinstance(operation, Append):
        return _append(operation, state)
    if isinstance(operation, Update):
        return _update(event.user, operation, state)
    if isinstance(operation, Delete):
        if operation.id not in state.held:
            return Refused("not_found"), state
        return Removed(1), _without([operation.id], event, state)
    if isinstance(operation, DeleteWhere):
        matching = list(state.matching(operation.where))
        return Removed(len(matching)), _without(matching, event, state)
    if isinstance(operation, Erase):
        return Removed(len(state.held), state.version + 1), State(state.version + 1, erased=event.ended)
    if isinstance(operation, Get):
        held = state.held.get(operation.id)
        return (Refused("not_found") if held is None else One(_seen(event.user, operation.id, held))), state
    found = [_seen(event.user, id, held) for id, held in state.matching(operation.where).items()]
    if isinstance(operation, List):
        return Found(tuple(sorted(found, key=lambda seen: seen.version))), state
    scored = [replace(seen, score=_cosine(operation.vector, state.held[seen.id].vector)) for seen in found]
    scored.sort(key=lambda seen: -(seen.score or 0.0))
    return Found(tuple(scored[: operation.top_k]), state.version), state


def _seen(user: str, id: str, held: _Held) -> Seen:
    return Seen(user, id, held.text, held.metadata, held.version)


def _cosine(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def _append(operation: Append, state: State) -> tuple[Answer, State]:
    held, version = dict(state.held), state.version
    entries = []
    for new in operation.memories:
        assert new.id is not None
        there = held.get(new.id)
        if there is not None and (there.text, there.metadata) == (new.text, new.metadata):
            entries.append((new.id, "unchanged", there.version))
            continue
        if there is not None and not operation.upsert:
            return Refused("id_conflict"), state
        version += 1
        held[new.id] = _Held(new.text, new.metadata, version, new.vector)
        entries.append((new.id, "added" if there is None else "updated", version))
    return Appended(tuple(entries), version), replace(state, version=version, held=held)


def _update(user: str, operation: Update, state: State) -> tuple[Answer, State]:
    before = state.held.get(operation.id)
    if before is None:
        return Refused("not_found"), state
    if operation.if_version not in (None, before.version):
        return Refused("version_mismatch"), state
    text = before.text if operation.text is None else operation.text
    vector = before.vector if operation.vector is None else operation.vector
    metadata = before.metadata if operation.metadata is None else operation.metadata
    if (text, vector, metadata) == (before.text, before.vector, before.metadata):
        return One(_seen(user, operation.id, before)), state
    after = _Held(text, metadata, state.version + 1, vector)
    changed = replace(state, version=state.version + 1, held={**state.held, operation.id: after})
    return One(_seen(user, operation.id, after)), changed


def _without(ids: Sequence[str], event: Event, state: State) -> State:
    held = {id: held for id, held in state.held.items() if id not in ids}
    deleted = {**state.deleted, **dict.fromkeys(ids, event.ended)}
    return State(state.version + len(ids), held, deleted, state.erased)


def mismatch(event: Event, expected: Answer, state: State) -> str | None:
    """How the event's answer differs from the one that the specification gives in that state; None if it does not."""
    answer = event.answer
    if isinstance(answer, Refused) and answer.code in ("deleted", "erased"):
        ids = _written_ids(event.operation)
        late = max([state.erased, *(state.deleted.get(id, -math.inf) for id in ids)])
        return None if late >= event.began else "refused for a deletion that had ended before it was sent"
    if isinstance(answer, Appended) and isinstance(expected, Appended):
        same = answer.entries == expected.entries and answer.version in (None, expected.version)
    elif isinstance(answer, Removed) and isinstance(expected, Removed):
        same = answer.count == expected.count and answer.version in (None, expected.version)
    elif isinstance(answer, Found) and isinstance(expected, Found):
        return _found_difference(event, answer, expected, state)
    else:
        same = answer == expected
    return None if same else f"expected {described(expected)}"


def _written_ids(operation: Operation) -> list[str]:
    if isinstance(operation, Append):
        return [new.id for new in operation.memories if new.id is not None]
    return [operation.id] if isinstance(operation, Update) else []


def _found_difference(event: Event, answer: Found, expected: Found, state: State) -> str | None:
    """As `mismatch`. Since a graph may miss a neighbour, its results must only be memories of this state."""
    operation = event.operation
    whole = [seen.id for seen in expected.memories]
    given = [seen.id for seen in answer.memories]
    matching = state.matching(operation.where) if isinstance(operation, List | Search) else {}
    for seen in answer.memories:
        held = matching.get(seen.id)
        if held is None:
            return f"{seen.id!r} is not there at version {state.version}"
        if _seen(event.user, seen.id, held) != replace(seen, score=None):
            return f"{seen.id!r} is {described(_seen(event.user, seen.id, held))} at version {state.version}"
        if isinstance(operation, Search):
            score = _cosine(operation.vector, held.vector)
            if seen.score is None or abs(seen.score - score) > SCORE_TOLERANCE:
                return f"the score of {seen.id!r} is {score:.6f}, not {seen.score}"
    if len(given) != len(whole) or len(set(given)) != len(given):
        missing = sorted(set(whole) - set(given))
        return f"{len(given)} memories where there are {len(whole)} at version {state.version}; missing: {missing}"
    if isinstance(operation, List):
        return None if given == whole else "not in the order of versions"
    scores = [seen.score or 0.0 for seen in answer.memories]
    if scores != sorted(scores, reverse=True):
        return "not in the order of scores"
    if answer.index != "hnsw" and scores:
        worst = expected.memories[-1].score or 0.0
        if scores[-1] < worst - SCORE_TOLERANCE:
            return f"a nearer memory was left out: the last score is {scores[-1]}, not {worst:.6f}"
    return None
