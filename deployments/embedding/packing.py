"""Selects the texts of the next device batch: a pure function of their lengths and of how often each was passed over.

A padded batch costs as much as if all its texts were as long as the longest. So a batch should hold texts of similar
lengths, but no text may wait for ever because its length is unusual.

Guarantees:
- The padded tokens of a batch (texts x longest text) are at most the budget. A text longer than the budget runs alone.
- The batch holds the oldest text, so that each batch makes progress at the head of the queue.
- No text is passed over more than `MAX_PASSES` times, so none starves. A text is passed over if a batch takes a younger
  text and leaves it in the queue.

How: let b = 1 + MAX_PASSES - (times the oldest text was passed over). Take as many of the oldest texts as fit into b
batches, sort them by length, and cut them into b batches. The batch with the oldest text is the next one. The others
fit into b - 1 batches, and their texts were passed over at most once more. By induction, no text exceeds `MAX_PASSES`;
within this rule, as many texts as possible are sorted by length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from deployments.batcher import Costed

MAX_PASSES = 2


def pick(waiting: Sequence[Costed], budget: int) -> list[int]:
    """Select the next batch.

    Args:
        waiting: oldest first, not empty; `cost` is the length of a text in tokens.
        budget: the most padded tokens of a batch.

    Returns:
        Indices into `waiting`, at least one.
    """
    batches_left = max(1, 1 + MAX_PASSES - waiting[0].passed_over)
    window = _window(waiting, budget, batches_left)
    order = sorted(range(window), key=lambda index: waiting[index].cost, reverse=True)
    start = 0
    while True:
        end = start + max(1, budget // max(1, waiting[order[start]].cost))
        if 0 in order[start:end]:
            return order[start:end]
        start = end


def runs(costs: Iterable[int], budget: int) -> Iterator[tuple[int, int]]:
    """Cut a list into runs of neighbours whose costs add up to at most `budget`. Yields (start, end) of each.

    An item that costs more than the budget is a run of its own.
    """
    start = end = total = 0
    for cost in costs:
        if end > start and total + cost > budget:
            yield start, end
            start, total = end, 0
        total += cost
        end += 1
    if end > start:
        yield start, end


def _window(waiting: Sequence[Costed], budget: int, batches: int) -> int:
    """The number of oldest texts that fit into this many batches if they are sorted by length."""
    fits, fails = 1, len(waiting) + 1
    probe = 2
    while fits + 1 < fails:
        probe = min(probe, fails - 1)
        if _batches_needed(waiting, probe, budget, batches) <= batches:
            fits = probe
            probe = 2 * fits if fails > len(waiting) else (fits + fails) // 2
        else:
            fails = probe
            probe = (fits + fails) // 2
    return fits


def _batches_needed(waiting: Sequence[Costed], count: int, budget: int, stop_after: int) -> int:
    """The number of batches that the `count` oldest texts need; more than `stop_after` is not counted further.

    Batches are cut from the longest text down, which gives the fewest possible.
    """
    lengths = sorted((waiting[index].cost for index in range(count)), reverse=True)
    needed = start = 0
    while start < count and needed <= stop_after:
        start += max(1, budget // max(1, lengths[start]))
        needed += 1
    return needed
