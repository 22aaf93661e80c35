"""Turns: who asks for a piece of work, how urgent it is and until when; and a queue that serves its callers fairly.

The queue is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) on one sorted list. Every item has a tag: the
work that its caller had been given before it. The item with the smallest tag is served first. A new caller starts at
the fair share: the work that a caller would have been given if it had always had something waiting.

Guarantees:
- Callers that always have something waiting are given the same amount of work, however much each of them asks for. The
  difference is at most the largest item of each and the items that one selection takes.
- The items of a caller stand in the queue in the order in which they came.
- No item waits for ever: the fair share grows with the work that is served, and new callers start at it.
- A caller that cancels is not charged for what it did not get. A caller that comes back at once is still owed what it
  was owed, up to the work of four selections. A caller that stays away is owed nothing.
- The queue never holds accounts of many more callers than wait.

Nothing here is durable or thread-safe.
"""

from __future__ import annotations

import itertools
import uuid
from bisect import insort_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

deadline_of_request: ContextVar[float | None] = ContextVar("deadline_of_request", default=None)
"""The deadline of the request that is being answered. Turns that are made for it have this deadline by default."""

caller_of_request: ContextVar[str | None] = ContextVar("caller_of_request", default=None)
"""The caller of the request that is being answered, if its key says who that is. Turns that are made for it have this
caller by default."""

_REQUEST = "request:"
_PROCESS = f"{_REQUEST}{uuid.uuid4().hex[:12]}-"  # callers of several gateways meet in one embedder
_requests = itertools.count()
_tag = attrgetter("tag")

HARD_LIMIT = 2
"""A caller that has nothing waiting is refused only if more than this many times the limit would wait."""

_OWED = 4  # selections: so much work is a caller owed at most if it comes back with nothing waiting
_IDLE_ACCOUNTS = 64  # kept whatever the number of callers that wait
_IDLE_PER_CALLER = 4  # and so many for each that waits


def _caller() -> str:
    return caller_of_request.get() or _PROCESS + str(next(_requests))


@contextmanager
def work_of(caller: str) -> Iterator[None]:
    """A context for one request: its work counts as this caller's."""
    token = caller_of_request.set(caller)
    try:
        yield
    finally:
        caller_of_request.reset(token)


def is_one_request(caller: str) -> bool:
    """Whether a caller is a single request, which has no name by which its other requests are known."""
    return not caller or caller.startswith(_REQUEST)


@dataclass(slots=True)  # not frozen, which would take a microsecond more for each request
class Turn:
    """Who asks for a piece of work, how urgent it is, and until when. It is not changed after it was made.

    Attributes:
        caller: shares are counted by it. By default that of the request, as `caller_of_request` says; without one the
            request is a caller of its own.
        bulk: less urgent than queries, single texts and small requests.
        deadline: on this process's `time.monotonic`; None for no deadline. By default that of the request, as
            `deadline_of_request` says. Send `remaining_s` to another process.
        begun: the work is a later part of a request whose first part was admitted, so it is not refused.
    """

    caller: str = field(default_factory=_caller)
    bulk: bool = False
    deadline: float | None = field(default_factory=deadline_of_request.get)
    begun: bool = False

    @classmethod
    def of_user(cls, tenant: str, user_id: str, *, bulk: bool = False, begun: bool = False) -> Turn:
        """The turn of a request that is about one user.

        The caller is that of the request, as `caller_of_request` says; without one, all requests about the user are one
        caller.
        """
        return cls(caller_of_request.get() or f"user:{len(tenant)}:{tenant}{user_id}", bulk, begun=begun)

    def in_bulk(self, bulk: bool = True) -> Turn:
        """The same turn, for bulk work. Work that is bulk already stays so."""
        return replace(self, bulk=True) if bulk and not self.bulk else self

    def after_begin(self) -> Turn:
        """The turn of the later parts of the same request."""
        return self if self.begun else replace(self, begun=True)

    def remaining_s(self, now: float) -> float | None:
        """The seconds until the deadline, at least 0; None if there is no deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - now)


SentTurn = tuple[str, bool, float | None, int]
"""The turn of a call to another process: its caller, whether it is bulk work, the seconds until its deadline (None for
no deadline), and the cost of the call."""


class Shares:
    """The work that each caller has waiting, in cost units, and the rule by which more is admitted.

    Attributes:
        total: of all callers.
    """

    __slots__ = ("_of", "total")

    def __init__(self) -> None:
        self.total = 0
        self._of: dict[str, int] = {}

    @property
    def callers(self) -> int:
        """The number of callers that have something waiting."""
        return len(self._of)

    def of(self, caller: str) -> int:
        """The work that a caller has waiting."""
        return self._of.get(caller, 0)

    def add(self, caller: str, cost: int) -> None:
        """Count work that begins to wait. `cost` is at least 1."""
        self._of[caller] = self._of.get(caller, 0) + cost
        self.total += cost

    def remove(self, caller: str, cost: int) -> None:
        """Count work that waits no longer."""
        rest = self._of[caller] - cost
        if rest:
            self._of[caller] = rest
        else:
            del self._of[caller]
        self.total -= cost

    def admits(self, caller: str, cost: int, limit: int | None) -> bool:
        """Whether a caller may queue more work.

        Up to `limit` in total, everybody may. Beyond it, a caller may queue up to its own share of `limit`, which is
        divided equally among the callers that have something waiting. A caller with nothing waiting may always queue,
        up to `HARD_LIMIT` times `limit` in total: that protects memory. An empty queue admits any amount: otherwise a
        call could be too large ever to be admitted.
        """
        total = self.total + cost
        if limit is None or total <= limit or not self.total:
            return True
        if total > HARD_LIMIT * limit:
            return False
        own = self._of.get(caller, 0)
        return not own or own + cost <= limit / len(self._of)


class Queued(Protocol):
    """An item of the queue. The queue sets `tag` and `passed_over`."""

    tag: float
    passed_over: int

    @property
    def caller(self) -> str: ...
    @property
    def cost(self) -> int: ...


Entry = TypeVar("Entry", bound=Queued)


class FairQueue(Generic[Entry]):
    """Items of many callers in the order in which they are to be served.

    Attributes:
        entries: the items that wait, in that order. Items that were passed over stay in front of new ones.
        shares: the work that each caller has waiting.
    """

    __slots__ = ("_accounts", "_largest", "_passed_over", "_prune_at", "_share", "entries", "shares")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.shares = Shares()
        self._accounts: dict[str, float] = {}  # the work that each caller has been given and has waiting
        self._share = 0.0  # the fair share so far
        self._largest = 0  # the most work that one call of `take` took
        self._passed_over = 0  # how many of the first entries were passed over
        self._prune_at = _IDLE_ACCOUNTS

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def cost(self) -> int:
        """The work of all items."""
        return self.shares.total

    def push(self, caller: str, entries: Sequence[Entry]) -> None:
        """Queue items of one caller, at least one, in their order."""
        account = self._accounts.get(caller)
        tag = self._share if account is None else max(account, self._share - _OWED * self._largest)
        first, cost = tag, 0
        for entry in entries:
            entry.tag = tag
            tag += entry.cost
            cost += entry.cost
        self._accounts[caller] = tag
        self.shares.add(caller, cost)
        waiting = self.entries
        if len(waiting) <= self._passed_over or waiting[-1].tag <= first:
            waiting += entries
        elif len(entries) == 1:
            insort_right(waiting, entries[0], self._passed_over, key=_tag)
        else:
            # Two sorted runs, which Python's sort merges in linear time.
            waiting[self._passed_over :] = sorted([*waiting[self._passed_over :], *entries], key=_tag)
        if len(self._accounts) > self._prune_at:
            self._prune()

    def take(self, chosen: Iterable[int]) -> list[Entry]:
        """Remove the items at these indices of `entries` and return them in order. Counts them as served."""
        indices = sorted(chosen)
        end = indices[-1] + 1
        waiting, shares = self.entries, self.shares
        if len(indices) == end:  # none is passed over
            batch, stay = waiting[:end], []
        else:
            leaving = set(indices)
            batch = [waiting[index] for index in indices]
            stay = [waiting[index] for index in range(end) if index not in leaving]
            for entry in stay:
                entry.passed_over += 1
        waiting[:end] = stay
        first_not_passed_over = self._passed_over - sum(index < self._passed_over for index in indices)
        self._passed_over = max(len(stay), first_not_passed_over)
        callers, before = shares.callers, shares.total
        for entry in batch:
            shares.remove(entry.caller, entry.cost)
        served = before - shares.total
        if waiting:
            self._largest = max(self._largest, served)
            # At least the smallest tag: the callers that were counted may have cancelled before they were served.
            smallest = min(map(_tag, waiting[: self._passed_over + 1]))
            self._share = max(self._share + served / callers, smallest)
        else:
            self._forget_all()
        return batch

    def remove(self, unwanted: Callable[[Entry], bool]) -> list[Entry]:
        """Remove the items for which `unwanted` is true, and return them. Their callers are not charged for them."""
        removed = [entry for entry in self.entries if unwanted(entry)]
        if not removed:
            return removed
        first_tag: dict[str, float] = {}
        for entry in removed:
            self.shares.remove(entry.caller, entry.cost)
            first_tag[entry.caller] = min(entry.tag, first_tag.get(entry.caller, entry.tag))
        gone = set(map(id, removed))
        self._passed_over -= sum(id(entry) in gone for entry in self.entries[: self._passed_over])
        self.entries = [entry for entry in self.entries if id(entry) not in gone]
        if not self.entries:
            self._forget_all()
            return removed
        # The account of a caller as if it had never queued the removed items; the tags of the others remain.
        self._accounts.update(first_tag)
        for entry in self.entries:
            if entry.caller in first_tag:
                self._accounts[entry.caller] = max(self._accounts[entry.caller], entry.tag + entry.cost)
        return removed

    def _prune(self) -> None:
        """Drop accounts of callers with nothing waiting: those that owe nothing and are owed nothing, then the rest."""
        shares, owed_nothing = self.shares, self._share - _OWED * self._largest
        idle = [caller for caller in self._accounts if not shares.of(caller)]
        idle.sort(key=self._accounts.__getitem__)
        too_many = len(idle) - _IDLE_PER_CALLER * shares.callers - _IDLE_ACCOUNTS
        for number, caller in enumerate(idle):
            if number >= too_many and self._accounts[caller] > owed_nothing:
                break
            del self._accounts[caller]
        self._prune_at = 2 * len(self._accounts) + _IDLE_ACCOUNTS

    def _forget_all(self) -> None:
        self._accounts.clear()
        self._share, self._largest, self._passed_over, self._prune_at = 0.0, 0, 0, _IDLE_ACCOUNTS
