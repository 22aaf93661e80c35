"""Context, budgets and orders of results, as pure functions of what a store has found."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from deployments import results
from store import Memory, Near, ResultOrder, SearchResult

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def memory(number: int, *, happened: int | None = None, score: float | None = None) -> Memory:
    """The memory `m1` was made on day 1."""
    at = BEGIN + timedelta(days=number)
    happened_at = None if happened is None else BEGIN + timedelta(days=happened)
    return Memory(f"m{number}", "ann", "t", {}, at, at, None, number, score, happened_at=happened_at)


def found(*around: tuple[int, list[tuple[int, int]]], happened: dict[int, int] | None = None) -> SearchResult:
    """A result whose memories have these numbers, each with the offsets and numbers of those around it."""
    made = {
        number: memory(number, happened=(happened or {}).get(number))
        for hit, near in around
        for number in [hit, *(other for _, other in near)]
    }
    context = tuple(tuple(Near(offset, made[number]) for offset, number in near) for _, near in around)
    return SearchResult([made[hit] for hit, _ in around], "exact", 9, context)


def placed(rows: list[dict[str, Any]]) -> list[Any]:
    """The ids, with those that are context as (id, id of the result, offset)."""
    return [(row["id"], row["context_of"], row["offset"]) if row.get("context") else row["id"] for row in rows]


def test_context_stands_around_its_result_and_each_memory_once() -> None:
    result = found((5, [(-1, 4), (1, 6)]), (7, [(-1, 6), (1, 8)]), (4, [(-1, 3), (1, 5)]))
    assert placed(results.laid_out(result, "score")) == [
        "m5",
        ("m6", "m5", 1),
        "m7",
        ("m8", "m7", 1),
        ("m3", "m4", -1),
        "m4",
    ]


def test_results_without_context_are_as_they_were_found() -> None:
    result = SearchResult([memory(2, score=0.5), memory(1, score=0.4)], "exact", 9)
    assert [row["id"] for row in results.laid_out(result, "score")] == ["m2", "m1"]
    assert not any("context" in row for row in results.laid_out(result, "score"))
    assert results.laid_out(SearchResult([], "exact", 0), "created_at") == []


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("created_at", ["m1", ("m2", "m3", -1), "m3", ("m4", "m3", 1)]),
        ("-created_at", [("m4", "m3", 1), "m3", ("m2", "m3", -1), "m1"]),
        ("happened_at", [("m4", "m3", 1), "m1", ("m2", "m3", -1), "m3"]),
        ("-happened_at", ["m3", ("m2", "m3", -1), "m1", ("m4", "m3", 1)]),
    ],
)
def test_results_and_context_are_sorted_by_time(order: ResultOrder, expected: list[Any]) -> None:
    result = found((3, [(-1, 2), (1, 4)]), (1, []), happened={4: -9})
    assert placed(results.laid_out(result, order)) == expected


def test_memories_of_one_time_are_sorted_by_version() -> None:
    made = [Memory(id, "ann", "t", {}, BEGIN, BEGIN, None, version) for id, version in (("b", 2), ("a", 1), ("c", 3))]
    result = SearchResult(made, "exact", 3)
    assert [row["id"] for row in results.laid_out(result, "created_at")] == ["a", "b", "c"]
    assert [row["id"] for row in results.laid_out(result, "-created_at")] == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1, []),
        (3, ["m9"]),  # the best does not fit, the next does
        (10, ["m5"]),
        (13, ["m5", "m9"]),
        (15, ["m4", "m5", "m9"]),  # the nearest context of the best result first
        (17, ["m4", "m5", "m9", "m10"]),
        (19, ["m4", "m5", "m8", "m9", "m10"]),
        (21, ["m3", "m4", "m5", "m8", "m9", "m10"]),
        (99, ["m3", "m4", "m5", "m8", "m9", "m10"]),
    ],
)
def test_a_budget_takes_the_best_results_that_fit_and_then_their_context(budget: int, expected: list[str]) -> None:
    result = found((5, [(-2, 3), (-1, 4)]), (9, [(-1, 8), (1, 10), (4, 5)]))
    tokens = {"m5": 10, "m9": 3, "m3": 2, "m4": 2, "m8": 2, "m10": 2}
    if budget == 17:
        tokens["m8"] = 3  # it does not fit any more, the next does
    taken = results.within(result, tokens, budget)
    assert sorted(taken, key=lambda id: int(id[1:])) == expected
    laid_out = results.laid_out(result, "created_at", taken)
    assert [row["id"] for row in laid_out] == expected
    assert all(row["context_of"] in taken for row in laid_out if row.get("context"))


def test_a_result_that_does_not_fit_is_no_context_either() -> None:
    result = found((5, []), (4, [(1, 5)]))
    taken = results.within(result, {"m5": 9, "m4": 1}, 5)
    assert taken == {"m4"}
    assert placed(results.laid_out(result, "score", taken)) == ["m4"]


def test_the_memories_of_a_result_are_each_named_once() -> None:
    result = found((5, [(-1, 4), (1, 6)]), (4, [(1, 5)]))
    assert sorted(results.memories_of(result)) == ["m4", "m5", "m6"]
