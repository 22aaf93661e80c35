"""Which waiting texts make the next device batch: a pure function of lengths and of how often each was passed over.

Guarantees:
- The batch's padded tokens (texts x longest text) are at most the budget; a text longer than the budget goes alone.
- No text is passed over (left behind by a batch that takes a younger one) more than `MAX_PASSES` times: none starves.
- The batch holds the oldest waiting text, so every call makes progress on the head of the queue.

The oldest texts that fit into (1 + MAX_PASSES - times the oldest was passed over) batches are sorted by length and cut
into that many batches; the one with the oldest text leaves. What it leaves behind fits into one batch fewer, and was
passed over once more at most: by induction the rule holds, and lengths are sorted over as many texts as it allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from deployments.batcher import Costed

MAX_PASSES = 2


def pick(waiting: Sequence[Costed], budget: int) -> list[int]:
    """Choose the next batch.

    Args:
        waiting: oldest first, not empty; `cost` is the text's length in tokens.
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
    """(start, end) of runs of neighbours whose costs add up to at most `budget`, at least one item each."""
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
    """How many of the oldest texts, sorted by length, fit into so many batches."""
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
    """Batches that the `count` oldest need, cut from the longest down (the fewest possible); stops counting early."""
    lengths = sorted((waiting[index].cost for index in range(count)), reverse=True)
    needed = start = 0
    while start < count and needed <= stop_after:
        start += max(1, budget // max(1, lengths[start]))
        needed += 1
    return needed
