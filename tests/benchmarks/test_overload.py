"""The table of refused requests."""

from __future__ import annotations

from typing import Any

from benchmarks.overload import table


def a_run(answered: float, errors: dict[str, int], refused_ms: tuple[float, float, float] | None) -> dict[str, Any]:
    refused = dict(zip(("p50_ms", "p90_ms", "p99_ms"), refused_ms, strict=True)) if refused_ms else None
    latency = {
        "p50_ms": 111.0,
        "p90_ms": 222.0,
        "p99_ms": 333.0,
    }  # of answered requests: in no column
    rates = {"offered_per_s": 150.0, "requests_per_s": answered, "texts_per_s": 4 * answered}
    return {**rates, **latency, "errors": errors, "refused": refused, "late_p99_ms": 9.0}


def test_a_row_has_the_medians_of_one_load_over_its_rounds() -> None:
    runs = [
        a_run(90.0, {"429": 40, "503": 1}, (2.0, 4.0, 6.0)),
        a_run(100.0, {}, None),  # refused nothing, and so has no latency of refusals
        a_run(95.0, {"429": 50, "503": 2, "TimeoutError": 3}, (3.0, 5.0, 8.0)),
    ]
    rows = [{"length": "150", "texts": 4, "closed_per_s": 100.0, "runs": runs}]
    head, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in table(rows).splitlines())
    assert dict(zip(head, row, strict=True)) == {
        "words": "150",
        "texts": "4",
        "offered/s": "150",
        "answered/s": "95.0 (90.0 to 100)",
        "429": "40.0 (0 to 50.0)",
        "others": "6",
        "429 p50 ms": "2.50 (2.00 to 3.00)",
        "p90": "4.50 (4.00 to 5.00)",
        "p99": "7.00 (6.00 to 8.00)",
        "late p99 ms": "9.00",
    }


def test_a_load_that_refused_nothing_has_no_latency_of_refusals() -> None:
    rows = [{"length": "short", "texts": 1, "closed_per_s": 100.0, "runs": [a_run(150.0, {}, None)] * 2}]
    row = [cell.strip() for cell in table(rows).splitlines()[2].strip("|").split("|")]
    assert row == ["4 to 12", "1", "150", "150", "0", "0", "-", "-", "-", "9.00"]
