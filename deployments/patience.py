"""How long the callers of a queue wait before they give up, learned from those that did.

If more work arrives than can be done, a queue that serves the oldest item first serves each caller just before it gives
up, or too late, so nearly all answers are lost. So if callers give up while they wait, items that
have waited for a good part of that time are served after the fresh ones. If callers do not give up, the order does not
change, however long they wait.

Guarantees, so that callers gain nothing at the cost of others by giving up early:
- A caller that has a name is judged by its own calls alone. Requests without one are judged together.
- An item that came with a deadline of its own is judged by this deadline. If it passes, that says nothing about how
  long other callers wait.
"""

from __future__ import annotations

from collections.abc import Iterable

from deployments.fair_queue import is_one_request

_RECENT_CALLS = 64  # the number of calls over which the share of those that gave up is averaged
_MANY = 0.05  # a share above it means overload; below, single callers have gone away for reasons of their own
_FRESH = 0.25  # of the time after which callers give up; the rest is left for the work itself
_SHORTEST_S = 0.05
_OLDEST_FIRST_EVERY = 16  # batches: so patient callers are served, too
_MAX_CALLERS = 1024  # that are remembered by name
_FORGOTTEN = 0.001  # a share of calls that gave up


class Patience:
    """The patience of callers that are judged together."""

    __slots__ = ("_gave_up_share", "_waited_s")

    def __init__(self) -> None:
        self._gave_up_share = 0.0
        self._waited_s = 0.0

    def gave_up(self, waited_s: float | None) -> None:
        """Count a call whose caller gave up, this long after it was queued, whether it had begun to run or not.

        None if the call only had a deadline of its own.
        """
        weight = 1 / _RECENT_CALLS
        if waited_s is not None:
            self._waited_s += (waited_s - self._waited_s) * (weight if self.is_short and self._waited_s else 1.0)
        self._gave_up_share += (1 - self._gave_up_share) * weight

    def served(self, calls: int) -> None:
        """Count so many calls of which a batch has items."""
        self._gave_up_share *= (1 - 1 / _RECENT_CALLS) ** calls

    @property
    def is_short(self) -> bool:
        """Whether many calls gave up lately."""
        return self._gave_up_share > _MANY

    @property
    def is_forgotten(self) -> bool:
        """Whether hardly any call gave up lately."""
        return self._gave_up_share < _FORGOTTEN

    def fresh_s(self, own_s: float | None = None) -> float | None:
        """The wait up to which an item is fresh; None if it is fresh however long it waits.

        Args:
            own_s: the time that the item was given by its own deadline; None if it has none.
        """
        given_s = self._waited_s if own_s is None else own_s
        if not self.is_short or not given_s:
            return None
        return max(_SHORTEST_S, _FRESH * given_s)


class PatienceOfCallers:
    """The patience of the callers of one queue."""

    __slots__ = ("_batches", "_known", "_of_requests")

    def __init__(self) -> None:
        self._of_requests = Patience()
        self._known: dict[str, Patience] = {}  # of callers with a name, those that gave up lately
        self._batches = 0

    def gave_up(self, caller: str, waited_s: float | None) -> None:
        """Count a call whose caller gave up; see `Patience.gave_up`."""
        patience = self._of(caller)
        if patience is None:
            if len(self._known) >= _MAX_CALLERS:
                del self._known[next(iter(self._known))]
            patience = self._known[caller] = Patience()
        patience.gave_up(waited_s)

    def served(self, callers: Iterable[str]) -> None:
        """Count a batch: the caller of each call of which it has items."""
        self._batches += 1
        if self._of_requests.is_forgotten and not self._known:
            return
        for caller in callers:
            patience = self._of(caller)
            if patience is not None:
                patience.served(1)
                if patience.is_forgotten:
                    self._known.pop(caller, None)

    @property
    def is_short(self) -> bool:
        """Whether many calls of any caller gave up lately."""
        if self._of_requests.is_short:
            return True
        return bool(self._known) and any(patience.is_short for patience in self._known.values())

    def fresh_s(self, caller: str, own_s: float | None) -> float | None:
        """The wait up to which an item of a caller is fresh; see `Patience.fresh_s`."""
        patience = self._of(caller)
        return None if patience is None else patience.fresh_s(own_s)

    @property
    def takes_oldest(self) -> bool:
        """Whether the next batch takes the oldest items in any case."""
        return self._batches % _OLDEST_FIRST_EVERY == 0

    def _of(self, caller: str) -> Patience | None:
        return self._of_requests if is_one_request(caller) else self._known.get(caller)
