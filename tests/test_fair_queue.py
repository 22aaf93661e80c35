"""Fair queueing: every caller gets its share of the work, in any interleaving. No clock, no event loop."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deployments.batcher import oldest_first
from deployments.embedding.packing import MAX_PASSES, pick
from deployments.fair_queue import FairQueue, Shares, Turn, deadline_of_request, work_of
from tests.repetitions import repetitions

CASES = repetitions(300, quick=100)
Select = Callable[[Sequence["Entry"], int], Sequence[int]]


@dataclass(slots=True, eq=False)
class Entry:
    caller: str
    cost: int
    number: int = 0
    tag: float = 0.0
    passed_over: int = 0


def push(queue: FairQueue[Entry], caller: str, *costs: int) -> None:
    queue.push(caller, [Entry(caller, cost, number) for number, cost in enumerate(costs)])


def served(queue: FairQueue[Entry], budget: int, select: Select = oldest_first) -> str:
    return "".join(entry.caller for entry in queue.take(select(queue.entries, budget)))


def order(queue: FairQueue[Entry]) -> str:
    return "".join(entry.caller for entry in queue.entries)


# Turns.


def test_a_request_without_a_user_is_a_caller_of_its_own() -> None:
    assert Turn().caller != Turn().caller
    assert Turn.of_user("t", "ab") == Turn.of_user("t", "ab")
    assert len({Turn.of_user(*pair).caller for pair in (("t", "ab"), ("ta", "b"), ("", "tab"))}) == 3


def test_a_turn_for_bulk_keeps_its_caller_and_its_deadline() -> None:
    turn = Turn("a", False, 3.0)
    assert turn.in_bulk() == turn.in_bulk().in_bulk(False) == Turn("a", True, 3.0)
    assert turn.in_bulk(False) is turn


def test_a_deadline_is_sent_as_the_seconds_that_remain() -> None:
    assert [Turn("a", False, at).remaining_s(5.0) for at in (None, 7.5, 4.0)] == [None, 2.5, 0.0]


def test_a_turn_has_the_deadline_of_the_request_by_default() -> None:
    assert Turn().deadline is None
    token = deadline_of_request.set(7.0)
    try:
        assert (Turn().deadline, Turn.of_user("t", "a").deadline, Turn(deadline=None).deadline) == (7.0, 7.0, None)
    finally:
        deadline_of_request.reset(token)


# Shares.


@pytest.mark.parametrize(
    ("caller", "cost", "admitted"),
    [
        ("a", 1, False),  # 8 of 10 / 2
        ("b", 2, True),  # 5 of 10 / 2
        ("b", 3, False),
        ("c", 10, True),  # has nothing waiting: 20 in total
        ("c", 11, False),
    ],
)
def test_a_caller_is_refused_beyond_its_share_of_a_full_queue(caller: str, cost: int, admitted: bool) -> None:
    shares = Shares()
    shares.add("a", 7)
    shares.add("b", 3)
    assert shares.admits(caller, cost, 10) is admitted
    assert shares.admits(caller, cost, None)
    assert (shares.total, shares.callers, shares.of("a"), shares.of("c")) == (10, 2, 7, 0)


def test_the_work_of_a_request_with_a_key_is_that_of_one_caller() -> None:
    with work_of("key:k"):
        assert (Turn().caller, Turn.of_user("t", "ann").caller, Turn("other").caller) == ("key:k", "key:k", "other")
    assert Turn.of_user("t", "ann").caller == "user:1:tann"
    assert Turn().caller.startswith("request:")


def test_an_empty_queue_admits_any_amount() -> None:
    shares = Shares()
    assert shares.admits("a", 1_000, 10)
    shares.add("a", 1_000)
    assert not shares.admits("b", 1, 10)
    shares.remove("a", 1_000)
    assert (shares.total, shares.callers) == (0, 0)
    assert shares.admits("b", 1_000, 10)


# Order.


def test_callers_are_served_in_turn() -> None:
    queue: FairQueue[Entry] = FairQueue()
    push(queue, "a", *[1] * 6)
    push(queue, "b", *[2] * 3)
    assert order(queue) == "abaabaaba"
    assert [served(queue, 4) for _ in range(3)] == ["aba", "aba", "aba"]


def test_a_new_caller_goes_before_the_rest_of_a_long_request() -> None:
    queue: FairQueue[Entry] = FairQueue()
    push(queue, "a", *[10] * 5)
    assert served(queue, 20) == "aa"
    push(queue, "b", 1)
    push(queue, "c", 1)
    assert order(queue) == "abcaa"


def test_a_caller_that_comes_back_goes_behind_those_that_had_less() -> None:
    queue: FairQueue[Entry] = FairQueue()
    push(queue, "a", 10)
    push(queue, "b", 1, 1)
    assert served(queue, 1) == "a"
    push(queue, "a", 10)
    push(queue, "c", 1)
    assert order(queue) == "bbca"


def test_a_cancelled_item_is_not_charged() -> None:
    queue: FairQueue[Entry] = FairQueue()
    push(queue, "a", 1)
    push(queue, "b", 1, 5)
    for _ in range(3):
        push(queue, "a", 7, 7)
        assert [entry.caller for entry in queue.remove(lambda entry: entry.cost == 7)] == ["a", "a"]
    push(queue, "a", 2)
    assert order(queue) == "abba"
    assert (queue.cost, queue.shares.callers, queue.shares.of("a")) == (9, 2, 3)


def test_the_removal_of_an_early_item_keeps_the_later_ones_in_order() -> None:
    queue: FairQueue[Entry] = FairQueue()
    push(queue, "a", 1, 2, 3)
    assert [entry.number for entry in queue.remove(lambda entry: entry.number == 1)] == [1]
    push(queue, "a", 4)
    assert [entry.cost for entry in queue.entries] == [1, 3, 4]


def test_a_new_item_is_never_put_before_one_that_was_passed_over() -> None:
    queue: FairQueue[Entry] = FairQueue()
    push(queue, "a", *[4] * 5)
    queue.take([0, 3])
    assert [entry.passed_over for entry in queue.entries] == [1, 1, 0]
    push(queue, "b", 1)
    assert order(queue) == "aaba"
    queue.take([0])
    push(queue, "c", 1)
    assert order(queue) == "abca"


def test_a_stream_of_new_callers_starves_nobody() -> None:
    """Each request of a new caller starts at the fair share, which grows with the work that is served."""
    queue: FairQueue[Entry] = FairQueue()
    push(queue, "long", *[1] * 10)
    for number in range(20):
        push(queue, f"first {number}", 1)
    takes = 0
    while queue.shares.of("long"):
        push(queue, f"next {takes}", 1)  # as many come as are served
        queue.take([0])
        takes += 1
    assert takes <= 13 * 22


def test_callers_with_one_item_at_a_time_get_the_same_amount_of_work_whatever_an_item_costs() -> None:
    """Each comes back when its item has been taken, while others wait."""
    queue: FairQueue[Entry] = FairQueue()
    given = Counter({"a": 0, "b": 0, "c": 0})
    costs = {"a": 1, "b": 10, "c": 4}
    for caller, cost in costs.items():
        push(queue, caller, cost)
    for _ in range(300):
        (entry,) = queue.take([0])
        given[entry.caller] += entry.cost
        push(queue, entry.caller, entry.cost)
        assert max(given.values()) - min(given.values()) <= 10 + 4


# Properties.


@dataclass(frozen=True)
class Caller:
    """A caller that always has `window` items waiting, from one turn of the queue on."""

    joins: int
    window: int
    costs: tuple[int, ...]


callers = st.lists(
    st.builds(
        Caller,
        joins=st.integers(0, 20),
        window=st.integers(1, 8),
        costs=st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple),
    ),
    min_size=2,
    max_size=6,
)


@settings(max_examples=CASES, deadline=None)
@example(callers=[Caller(12, 1, (1, 3)), Caller(0, 1, (1, 1, 5, 5))], budget=15, strangers=1, by_length=True)
@given(callers=callers, budget=st.integers(1, 24), strangers=st.integers(0, 2), by_length=st.booleans())
def test_callers_that_always_wait_get_the_same_amount_of_work(
    callers: list[Caller], budget: int, strangers: int, by_length: bool
) -> None:
    """Whatever their items cost, and whoever else comes for a moment: within an item of each and one selection."""
    queue: FairQueue[Entry] = FairQueue()
    had: Counter[str] = Counter()
    since: dict[str, tuple[int, Counter[str]]] = {}  # the turn from which a caller waits, and what all had then
    costs = {f"caller {n}": itertools.cycle(caller.costs) for n, caller in enumerate(callers)}
    largest = 0
    for turn in range(60):
        for name, caller in zip(costs, callers, strict=True):
            # `pick` must have a choice: if it always takes nearly all that waits, it decides and not the order.
            depth = caller.window + (budget * (1 + MAX_PASSES) if by_length else 0)
            missing = depth - sum(entry.caller == name for entry in queue.entries)
            if turn >= caller.joins and missing:
                since.setdefault(name, (turn, had.copy()))
                push(queue, name, *itertools.islice(costs[name], missing))
        for number in range(strangers):
            push(queue, f"stranger {turn} {number}", 3)
        if not queue.entries:
            continue
        batch = queue.take((pick if by_length else oldest_first)(queue.entries, budget))
        largest = max(largest, sum(entry.cost for entry in batch))
        for entry in batch:
            had[entry.caller] += entry.cost
        for name in list(since):
            if not queue.shares.of(name):  # for a moment it had nothing waiting, so it is owed nothing
                del since[name]
        # `pick` may take items that belong to the batches after the next: before the comparison, and at its end.
        window = largest * (2 * (1 + MAX_PASSES) if by_length else 1)
        for (one, begun), (other, begun_too) in itertools.combinations(since.items(), 2):
            before = max(begun, begun_too, key=lambda turn_and_had: turn_and_had[0])[1]
            difference = (had[one] - before[one]) - (had[other] - before[other])
            assert abs(difference) <= 12 + 12 + window


actions = st.tuples(st.sampled_from(("push", "push", "take", "remove")), st.integers(0, 40), st.integers(1, 30))


@settings(max_examples=CASES, deadline=None)
@given(script=st.lists(actions, max_size=80), budget=st.integers(1, 40), by_length=st.booleans())
def test_no_item_is_lost_doubled_or_reordered_within_its_caller(
    script: list[tuple[str, int, int]], budget: int, by_length: bool
) -> None:
    queue: FairQueue[Entry] = FairQueue()
    numbers = iter(range(100_000))
    waiting: list[Entry] = []
    for action, who, much in script:
        if action == "push":
            entries = [Entry(str(who), 1 + (who + much + n) % 9, next(numbers)) for n in range(1 + much % 4)]
            waiting += entries
            queue.push(str(who), entries)
        elif action == "take" and waiting:
            before = list(queue.entries)
            batch = queue.take((pick if by_length else oldest_first)(before, budget))
            assert before[0] in batch
            waiting = [entry for entry in waiting if entry not in batch]
            assert len(set(map(id, batch))) == len(batch)
        elif action == "remove":
            gone = {entry.number for entry in waiting if entry.number % 5 == much % 5}
            assert {entry.number for entry in queue.remove(lambda entry, gone=gone: entry.number in gone)} == gone
            waiting = [entry for entry in waiting if entry.number not in gone]
        assert sorted(entry.number for entry in queue.entries) == [entry.number for entry in waiting]
        of: Counter[str] = Counter()
        for entry in waiting:
            of[entry.caller] += entry.cost
            assert entry.passed_over <= MAX_PASSES
        assert (queue.cost, queue.shares.callers) == (sum(of.values()), len(of))
        assert all(queue.shares.of(caller) == cost for caller, cost in of.items())
        for caller in of:
            own = [entry.number for entry in queue.entries if entry.caller == caller]
            assert own == sorted(own)


@settings(max_examples=20, deadline=None)
@given(waiting=st.integers(1, 50), cost=st.integers(1, 50))
def test_accounts_do_not_outnumber_the_callers_that_wait(waiting: int, cost: int) -> None:
    queue: FairQueue[Entry] = FairQueue()
    for number in range(waiting):
        push(queue, f"first {number}", 1 + cost * (number % 2))
    for number in range(2_000):
        push(queue, str(number), 1 + cost * (number % 3 == 0))
        queue.take([0])
        assert len(queue._accounts) <= 2 * (5 * (waiting + 1) + 64) + 64
    queue.remove(lambda _: True)
    assert len(queue._accounts) == 0
