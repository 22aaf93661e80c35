"""How long the callers of a queue wait before they give up, learned from those that did.

If more work arrives than can be done, a queue that serves the oldest item first serves each caller just before it gives
up, or too late, so nearly all answers are lost. So if callers give up while they wait, items that
have waited for a good part of that time are served after the fresh ones. If callers do not give up, the order does not
change, however long they wait.
"""

_RECENT_CALLS = 64  # the number of calls over which the share of those that gave up is averaged
_MANY = 0.05  # a share above it means overload; below, single callers have gone away for reasons of their own
_FRESH = 0.25  # of the time after which callers give up; the rest is left for the work itself
_SHORTEST_S = 0.05
_OLDEST_FIRST_EVERY = 16  # batches: so patient callers are served, too


class Patience:
    """The patience of the callers of one queue."""

    __slots__ = ("_batches", "_gave_up_share", "_waited_s")

    def __init__(self) -> None:
        self._gave_up_share = 0.0
        self._waited_s = 0.0
        self._batches = 0

    def gave_up(self, waited_s: float) -> None:
        """Count a call whose caller gave up while it was queued."""
        weight = 1 / _RECENT_CALLS
        self._waited_s += (waited_s - self._waited_s) * (weight if self._gave_up_share > _MANY else 1.0)
        self._gave_up_share += (1 - self._gave_up_share) * weight

    def served(self, calls: int) -> None:
        """Count a batch with items of so many calls."""
        self._gave_up_share *= (1 - 1 / _RECENT_CALLS) ** calls
        self._batches += 1

    def fresh_s(self) -> float | None:
        """The wait up to which an item is fresh, and the longest a batch may take; None if callers are patient."""
        if self._gave_up_share <= _MANY:
            return None
        return max(_SHORTEST_S, _FRESH * self._waited_s)

    @property
    def takes_oldest(self) -> bool:
        """Whether the next batch takes the oldest items in any case."""
        return self._batches % _OLDEST_FIRST_EVERY == 0
