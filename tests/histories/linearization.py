"""The search for one order of a user's events that explains every answer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tests.histories.records import Event, Found, One, Refused, Removed, Search, Update, Violation, Write
from tests.histories.specification import State, mismatch, perform
from tests.histories.versions import at_least, claimed_by

SUSPECTS = 4  # so many events are tried as the cause of a violation


@dataclass(slots=True)
class _Frame:
    """A point of the search: the events assigned so far, and the writes that may come next with their states."""

    assigned: int
    first: int
    earliest: int
    choices: list[tuple[int, State]]


class Linearization:
    """Assigns a version to every event of one user, in the order of versions.

    At each version the reads that fit are assigned as early as real time allows, which restricts no other event. There
    is a choice only if several writes may have made the next version.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events
        answered = [n for n, event in enumerate(events) if event.answer is not None]
        self._by_end = sorted(answered, key=lambda n: events[n].ended)
        self._claimants: defaultdict[int, list[int]] = defaultdict(list)
        self._reads_at: defaultdict[int, list[int]] = defaultdict(list)
        self._deletions: list[int] = []
        self._unknown: list[int] = []
        for n, event in enumerate(events):
            if event.answer is None:
                if isinstance(event.operation, Write):
                    self._unknown.append(n)
            elif claims := claimed_by(event):
                self._claimants[min(claims)[0]].append(n)
            elif isinstance(event.operation, Search) and isinstance(event.answer, Found):
                if event.answer.version is not None:
                    self._reads_at[event.answer.version].append(n)
            elif isinstance(event.answer, Removed) and event.answer.count:
                self._deletions.append(n)
        self._assigned = [False] * len(events)
        self._trail: list[int] = []
        self._first = 0  # all events before it, ordered by their beginning, are assigned or unknown
        self._earliest = 0  # the first so many of `by_end` are all assigned
        self._dead_ends: dict[tuple[Event, ...], tuple[int, Violation]] = {}  # the deepest by the events to blame

    def violation(self) -> Violation | None:
        """The reason why there is no such order; None if there is one.

        If possible, a read or a refusal without which there would be an order; else the end of the longest attempt.
        """
        if self._search():
            return None
        reasons = [reason for _, reason in sorted(self._dead_ends.values(), key=lambda end: end[0], reverse=True)]
        for reason in reasons[:SUSPECTS]:
            rest = [event for event in self._events if event not in reason.events]
            (suspect, *others) = reason.events or (None,)
            if suspect is not None and not others and _only_reads(suspect) and Linearization(rest)._search():
                return reason
        return reasons[0]

    def _search(self) -> bool:
        budget = 100 * len(self._events) + 10_000
        state = State()
        self._settle(state)
        stack = [self._frame(state)]
        while stack and not self._is_done():
            frame = stack[-1]
            self._undo(frame)
            if not frame.choices:
                stack.pop()
                continue
            budget -= 1
            if budget == 0:
                gave_up = Violation(self._events[0].user, "undecided", "too many orders to try", ())
                self._dead_ends = {(): (0, gave_up)}
                return False
            write, state = frame.choices.pop(0)
            self._assign(write)
            self._settle(state)
            stack.append(self._frame(state))
        return bool(stack)

    def _is_done(self) -> bool:
        return math.isinf(self._limit())

    def _assign(self, n: int) -> None:
        self._assigned[n] = True
        self._trail.append(n)

    def _undo(self, frame: _Frame) -> None:
        while len(self._trail) > frame.assigned:
            self._assigned[self._trail.pop()] = False
        self._first, self._earliest = frame.first, frame.earliest

    def _limit(self) -> float:
        """The earliest end of an event that is not assigned. Events that began later come after it."""
        while self._earliest < len(self._by_end) and self._assigned[self._by_end[self._earliest]]:
            self._earliest += 1
        return self._events[self._by_end[self._earliest]].ended if self._earliest < len(self._by_end) else math.inf

    def _settle(self, state: State) -> None:
        """Assign the events that change nothing and fit this state."""
        progress = True
        while progress:
            progress = False
            limit = self._limit()
            n = self._first
            while n < len(self._events) and self._events[n].began <= limit:
                event = self._events[n]
                if not self._assigned[n] and event.answer is not None and self._reads(event, state):
                    self._assign(n)
                    progress = True
                if n == self._first and (self._assigned[n] or event.answer is None):
                    self._first += 1
                n += 1

    def _reads(self, event: Event, state: State) -> bool:
        """Whether the event gets its answer in this state and does not change it."""
        answer = event.answer
        if isinstance(answer, Found) and answer.version not in (None, state.version):
            return False
        if isinstance(answer, One) and answer.memory.version > state.version:
            return False
        expected, after = perform(event, state)
        refused = isinstance(answer, Refused)
        return (refused or after.version == state.version) and mismatch(event, expected, state) is None

    def _frame(self, state: State) -> _Frame:
        choices, reason = self._choices(state)
        if reason is not None:
            depth, _ = self._dead_ends.get(reason.events, (-1, reason))
            if len(self._trail) > depth:
                self._dead_ends[reason.events] = len(self._trail), reason
        return _Frame(len(self._trail), self._first, self._earliest, choices)

    def _choices(self, state: State) -> tuple[list[tuple[int, State]], Violation | None]:
        """The writes that may have made the next version, with their states; or the reason why there is none."""
        limit, version = self._limit(), state.version
        for n in self._reads_at[version]:
            if not self._assigned[n]:
                return [], self._blame(n if self._events[n].began <= limit else self._by_end[self._earliest], state)
        claimants = [n for n in self._claimants[version + 1] if not self._assigned[n]]
        certain = [n for n in claimants if not isinstance(self._events[n].operation, Update)]
        pool = certain or [*(claimants or self._deletions), *self._unknown]
        choices: list[tuple[int, State]] = []
        reason: Violation | None = None
        for n in pool:
            event = self._events[n]
            if self._assigned[n]:
                continue
            if event.began > limit:
                if n in claimants:
                    reason = reason or self._blame(self._by_end[self._earliest], state)
                continue
            expected, after = perform(event, state)
            difference = None if event.answer is None else mismatch(event, expected, state)
            if difference is not None:
                if n in claimants:
                    reason = reason or Violation(event.user, "wrong answer", difference, (event,))
                continue
            if after.version == version:
                continue
            torn = [read for passed in range(version + 1, after.version) for read in self._reads_at[passed]]
            if torn:
                reason = Violation(event.user, "torn write", "a read saw a part of it", (event, self._events[torn[0]]))
                continue
            choices.append((n, after))
        if choices or self._earliest == len(self._by_end):
            return choices, None
        return [], reason or self._nobody_wrote(state)

    def _nobody_wrote(self, state: State) -> Violation:
        for n in self._by_end[self._earliest :]:
            if not self._assigned[n] and at_least(self._events[n]) > state.version:
                reason = f"nobody wrote version {state.version + 1}"
                return Violation(self._events[n].user, "unknown write", reason, (self._events[n],))
        return self._blame(self._by_end[self._earliest], state)

    def _blame(self, n: int, state: State) -> Violation:
        """The reason why an event fits neither this state nor an earlier one, in which it would have been assigned."""
        event = self._events[n]
        expected, after = perform(event, state)
        difference = mismatch(event, expected, state)
        if isinstance(event.operation, Write) and not isinstance(event.answer, Refused) and after is not state:
            reason = f"it was acknowledged and did not happen, up to version {state.version}"
            return Violation(event.user, "lost write", reason, (event,))
        if difference is None:
            difference = f"it says version {at_least(event)}"
        reason = f"at no version in its time, the last of them {state.version}: {difference}"
        return Violation(event.user, "wrong answer", reason, (event,))


def _only_reads(event: Event) -> bool:
    return isinstance(event.answer, Refused) or not isinstance(event.operation, Write)
