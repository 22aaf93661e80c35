"""The results of a search as a caller asked for them: with their context, within a budget of tokens, in an order.

Each memory is there once: as a result of its own, or else as the context of the best result that it is near.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from deployments import shapes
from store import Memory, ResultOrder, SearchResult

_Place = tuple[Memory, int]  # the result that a memory is the context of, and its place in the thread counted from it


def memories_of(found: SearchResult) -> dict[str, Memory]:
    """All memories of a result by their ids, those that were found first."""
    near = [one.memory for around in found.context or () for one in around]
    return {memory.id: memory for memory in [*near, *found.results]}


def within(found: SearchResult, tokens: Mapping[str, int], budget: int) -> set[str]:
    """The ids of the memories whose texts fit a budget of tokens.

    Those that were found are taken first, the best first, then the context of those that were taken, the nearest first.
    A text that does not fit is left out, and the next is tried.

    Args:
        tokens: of each memory's text, by its id.
    """
    taken: set[str] = set()

    def take(id: str) -> None:
        nonlocal budget
        if id not in taken and tokens[id] <= budget:
            taken.add(id)
            budget -= tokens[id]

    for memory in found.results:
        take(memory.id)
    results = {memory.id for memory in found.results}
    around = [
        (abs(one.offset), rank, one.offset, one.memory.id)
        for rank, (memory, context) in enumerate(zip(found.results, found.context or (), strict=bool(found.context)))
        if memory.id in taken
        for one in context
        if one.memory.id not in results
    ]
    for *_, id in sorted(around):
        take(id)
    return taken


def laid_out(found: SearchResult, order: ResultOrder, taken: Container[str] | None = None) -> list[dict[str, Any]]:
    """The fields of the memories in an order.

    By score, the best comes first, and its context stands around it in the order of the thread. By time, results and
    context alike are sorted by it, and those of one time by version.

    Args:
        taken: the ids of the memories to answer with; None for all.
    """
    places: dict[str, _Place | None] = dict.fromkeys(memory.id for memory in found.results)
    ordered: list[Memory] = []
    for memory, around in zip(found.results, found.context or [()] * len(found.results), strict=True):
        if taken is not None and memory.id not in taken:
            continue
        new = [one for one in around if one.memory.id not in places and (taken is None or one.memory.id in taken)]
        places |= {one.memory.id: (memory, one.offset) for one in new}
        before = [one.memory for one in new if one.offset < 0]
        ordered += [*before, memory, *(one.memory for one in new if one.offset > 0)]
    if order != "score":
        ordered.sort(key=lambda memory: _time_of(memory, order), reverse=order.startswith("-"))
    return [_fields(memory, places[memory.id]) for memory in ordered]


def _time_of(memory: Memory, order: ResultOrder) -> tuple[Any, int]:
    at = memory.created_at
    if order.endswith("happened_at") and memory.happened_at is not None:
        at = memory.happened_at
    return at, memory.version


def _fields(memory: Memory, place: _Place | None) -> dict[str, Any]:
    fields = shapes.memory(memory)
    return fields if place is None else {**fields, "context": True, "context_of": place[0].id, "offset": place[1]}
