"""The cost of a key, and the table of it."""

from benchmarks.keys import door, passing_us, table


async def test_a_known_key_costs_a_request_at_most_30_us() -> None:
    keyed, other = door(True), door(False)
    samples = [(await passing_us(keyed, 500), await passing_us(other, 500)) for _ in range(20)]
    with_key, without = (min(one) for one in zip(*samples, strict=True))  # the least disturbed ones
    assert with_key - without < 30  # about 11


def test_the_table_has_the_share_of_the_throughput_with_keys() -> None:
    run = {"requests_per_s": 95.0, "p50_ms": 2.0, "p99_ms": 3.0, "errors": {"429": 1}}
    other = {"requests_per_s": 100.0, "p50_ms": 1.0, "p99_ms": 2.0, "errors": {}}
    *_, with_keys, without = table({"with": [run], "without": [other]}).splitlines()
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in (with_keys, without)] == [
        ["with", "95.0", "2.00", "3.00", "1", "0.950"],
        ["without", "100", "1.00", "2.00", "0", "1.000"],
    ]
