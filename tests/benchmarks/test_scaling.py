"""The figures of a load that goes up and down."""

import math

import pytest

from benchmarks.scaling.client import Seen
from benchmarks.scaling.figures import STEADY_S, by_second, extent, recovered_s


def test_a_second_counts_the_requests_that_were_due_and_those_that_were_answered() -> None:
    requests = [
        Seen("embed", 100.1, 100.2),
        Seen("embed", 100.9, 102.9),
        Seen("add", 101.5, 101.6, "503"),
        Seen("search", 102.0, math.inf, "TimeoutError"),
    ]
    rows = by_second(requests, started=100.0, seconds=3)
    assert [row["offered"] for row in rows] == [2, 1, 1]
    assert [row["goodput"] for row in rows] == [1, 0, 1]
    assert [row["errors"] for row in rows] == [0, 1, 1]
    assert rows[0]["p50_ms"] == pytest.approx(1050.0)
    assert math.isnan(rows[1]["p50_ms"])


@pytest.mark.parametrize(
    ("late", "expected"),
    [
        ([], 0.0),
        ([2, 3, 4], 5.0),
        ([0], 1.0),
        ([0, 3, 12], 4.0),  # too short a recovery between 0 and 3; by 12 it has recovered
        ([0, 4, 8, 12, 16], None),
    ],
)
def test_the_latency_has_recovered_when_it_stays_below_the_target(late: list[int], expected: float | None) -> None:
    assert STEADY_S == 5
    rows = [{"second": float(n), "p99_ms": 900.0 if n - 10 in late or n < 5 else 100.0} for n in range(40)]
    assert recovered_s(rows, step=10.0, until=30.0 if expected is not None else 28.0, target_ms=500.0) == expected


def test_an_extent_has_the_first_the_highest_and_the_last_number() -> None:
    assert extent([{"replicas": {"Store": n}} for n in (1, 2, 3, 1)], "Store") == "1 -> 3 -> 1"
