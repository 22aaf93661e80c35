"""The gateway's searches in the store. Searches for the same replica share a call, whichever users they are for.

Routing keeps a partition of users on one replica, but the gateway does not know on which. Therefore each answer names
the replica that gave it, and the partitions that were last answered by the same replica share calls. A call is routed
by one of its partitions, each in turn. If replicas have been added or removed and the answer comes from another
replica, that partition moves there.

This only affects speed. A search that reaches another replica gets the same answer, after that replica has caught up
with the log.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypedDict

from deployments.batcher import Batcher
from deployments.fair_queue import Turn
from store import Search, SearchResult, StoreError

Answers = Sequence[SearchResult | StoreError]
Ask = Callable[[int, list[Search], Turn], Awaitable[tuple[str, Answers]]]

IN_FLIGHT = 2  # calls: the replica works on one while the other is being sent
SEARCHES = 64  # in one call
QUEUED_CALLS = 64  # full calls that may wait for a store; beyond it a caller may have only its share
_UNKNOWN = ""


_Asked = tuple[int, Search, Turn]  # the partition, the search, and the turn of its caller


class _Limits(TypedDict):
    in_flight: int
    budget: int
    max_queued: int
    max_wait_s: float | None


def turn_of(turns: Sequence[Turn]) -> Turn:
    """The turn of one call for many requests: a caller of its own, until the latest deadline of the requests."""
    deadlines = [turn.deadline for turn in turns if turn.deadline is not None]
    return Turn(bulk=turns[0].bulk, deadline=max(deadlines) if len(deadlines) == len(turns) else None)


class CoalescedSearches:
    """The searches of one gateway.

    Args:
        ask: sends searches to the replica of a partition, with the turn of the call; returns the name of the replica
            and an answer for each search.
        partition_of: the partition of a search, in [0, partitions).
        partitions: the number of partitions.
        max_wait_s: the longest time that a search may wait to be sent; None for no limit.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        partition_of: Callable[[Search], int],
        partitions: int,
        max_wait_s: float | None,
    ) -> None:
        self._ask = ask
        self._max_wait_s = max_wait_s
        self._partition_of = partition_of
        self._replica_of = [_UNKNOWN] * partitions
        self._last_routed = [0] * partitions  # number of the last call that each partition routed
        self._calls = 0
        self._batchers: dict[str, Batcher[_Asked, SearchResult]] = {}

    def reconfigure(self, *, max_wait_s: float | None) -> None:
        """Change this argument of the constructor, for searches that are not queued yet."""
        self._max_wait_s = max_wait_s
        for batcher in self._batchers.values():
            batcher.reconfigure(**self._limits())

    def _limits(self) -> _Limits:
        return {
            "in_flight": IN_FLIGHT,
            "budget": SEARCHES,
            "max_queued": QUEUED_CALLS * SEARCHES,
            "max_wait_s": self._max_wait_s,
        }

    async def search(self, request: Search, turn: Turn) -> SearchResult:
        """The answer to one search.

        Raises:
            StoreError: its own error.
            Overloaded: at once, if too many searches of the caller wait.
            DeadlineExceeded: the search was still queued when its deadline passed.
        """
        partition = self._partition_of(request)
        replica = self._replica_of[partition]
        batcher = self._batchers.get(replica)
        if batcher is None:
            batcher = self._batchers[replica] = Batcher(self._call, **self._limits())
        return await batcher.submit((partition, request, turn), turn)

    async def _call(self, waiting: list[_Asked]) -> Answers:
        routed_by = min((partition for partition, _, _ in waiting), key=self._last_routed.__getitem__)
        self._calls += 1
        self._last_routed[routed_by] = self._calls
        requests, turn = [request for _, request, _ in waiting], turn_of([turn for _, _, turn in waiting])
        replica, answers = await self._ask(routed_by, requests, turn)
        if replica != self._replica_of[routed_by]:
            self._replica_of[routed_by] = replica
            in_use = set(self._replica_of)
            self._batchers = {name: batcher for name, batcher in self._batchers.items() if name in in_use}
        return answers
