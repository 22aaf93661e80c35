"""Packing: no batch exceeds the budget, no text is passed over more than twice, no text starves."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.embedding.packing import MAX_PASSES, pick
from tests.repetitions import repetitions


@dataclass
class Text:
    """A queued text. These tests count how often it is passed over; the batcher is not involved."""

    cost: int
    passed_over: int = 0


def leave(waiting: list[Text], budget: int) -> list[Text]:
    """Pick a batch, check the rules, and remove the batch from `waiting`."""
    chosen = pick(waiting, budget)
    assert len(set(chosen)) == len(chosen) > 0
    batch = [waiting[index] for index in chosen]
    assert len(batch) == 1 or len(batch) * max(text.cost for text in batch) <= budget
    for index, text in enumerate(waiting):
        if index not in chosen and index < max(chosen):
            text.passed_over += 1
            assert text.passed_over <= MAX_PASSES
    waiting[:] = [text for index, text in enumerate(waiting) if index not in chosen]
    return batch


lengths = st.integers(1, 300)
arrivals = st.lists(st.lists(lengths, max_size=12), min_size=1, max_size=20)


@settings(max_examples=repetitions(1_000, quick=100), deadline=None)
@given(arrivals, st.integers(1, 600), st.data())
def test_no_batch_exceeds_the_budget_and_no_text_is_passed_over_three_times(
    rounds: list[list[int]], budget: int, data: st.DataObject
) -> None:
    waiting: list[Text] = []
    for arrived in rounds:
        waiting += [Text(length) for length in arrived]
        if waiting and data.draw(st.booleans()):  # a call is cancelled
            waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
        if waiting:
            leave(waiting, budget)
    while waiting:
        leave(waiting, budget)


@settings(max_examples=repetitions(300, quick=60), deadline=None)
@given(st.lists(lengths, min_size=1, max_size=40), st.lists(lengths, min_size=1, max_size=8), st.integers(300, 2000))
def test_the_oldest_text_is_in_the_next_batch_however_many_keep_arriving(
    queue: list[int], stream: list[int], budget: int
) -> None:
    waiting = [Text(length) for length in queue]
    while waiting:
        oldest = waiting[0]
        assert oldest in leave(waiting, budget)
        if len(queue) > 0:
            queue.pop()
            waiting += [Text(length) for length in stream]
        else:
            break


@settings(max_examples=repetitions(300, quick=60), deadline=None)
@given(st.lists(lengths, min_size=1, max_size=60), st.integers(1, 600), st.integers(1, 600))
def test_a_smaller_budget_in_between_breaks_no_rule(queue: list[int], budget: int, smaller: int) -> None:
    waiting = [Text(length) for length in queue]
    turn = 0
    while waiting:
        leave(waiting, budget if turn % 2 else min(budget, smaller))
        turn += 1


def test_texts_of_similar_lengths_share_a_batch() -> None:
    waiting = [Text(length) for length in (5, 200, 6, 190, 5, 210, 7, 195)]
    first = sorted(text.cost for text in leave(waiting, 840))
    second = sorted(text.cost for text in leave(waiting, 840))
    assert (first, second) == ([5, 5, 6, 7], [190, 195, 200, 210])


def test_texts_that_fit_into_one_batch_share_it() -> None:
    waiting = [Text(length) for length in (10, 12, 8)]
    assert len(leave(waiting, 64)) == 3


def test_a_text_over_the_budget_runs_alone() -> None:
    waiting = [Text(500), Text(3), Text(4)]
    assert [text.cost for text in leave(waiting, 100)] == [500]
