"""The gateway's searches in the store. Searches for the same replica share a call, whichever users they are for.

Routing keeps a partition of users on one replica, but the gateway does not know on which. Therefore each answer names
the replica that gave it, and the partitions that were last answered by the same replica share calls. A call is routed
by one of its partitions, each in turn. If replicas have been added or removed and the answer comes from another
replica, that partition moves there.

This only affects speed. A search that reaches another replica gets the same answer, after that replica has caught up
with the log.
"""

from collections.abc import Awaitable, Callable, Sequence

from deployments.batcher import Batcher
from store import Search, SearchResult, StoreError

Answers = Sequence[SearchResult | StoreError]
Ask = Callable[[int, list[Search]], Awaitable[tuple[str, Answers]]]

IN_FLIGHT = 2  # calls: the replica works on one while the other is being sent
SEARCHES = 64  # in one call
QUEUED_CALLS = 64  # full calls that may wait for a store; more work is refused with `Overloaded`
_UNKNOWN = ""


class CoalescedSearches:
    """The searches of one gateway.

    Args:
        ask: sends searches to the replica of a partition; returns its name and an answer for each search.
        partition_of: the partition of a search, in [0, partitions).
        partitions: the number of partitions.
    """

    def __init__(self, ask: Ask, *, partition_of: Callable[[Search], int], partitions: int) -> None:
        self._ask = ask
        self._partition_of = partition_of
        self._replica_of = [_UNKNOWN] * partitions
        self._last_routed = [0] * partitions  # number of the last call that each partition routed
        self._calls = 0
        self._batchers: dict[str, Batcher[tuple[int, Search], SearchResult]] = {}

    async def search(self, request: Search) -> SearchResult:
        """The answer to one search. Raises its own error, or Overloaded at once if too many searches wait."""
        partition = self._partition_of(request)
        replica = self._replica_of[partition]
        batcher = self._batchers.get(replica)
        if batcher is None:
            batcher = self._batchers[replica] = Batcher(
                self._call, in_flight=IN_FLIGHT, budget=SEARCHES, max_queued=QUEUED_CALLS * SEARCHES
            )
        return await batcher.submit((partition, request))

    async def _call(self, waiting: list[tuple[int, Search]]) -> Answers:
        routed_by = min((partition for partition, _ in waiting), key=self._last_routed.__getitem__)
        self._calls += 1
        self._last_routed[routed_by] = self._calls
        replica, answers = await self._ask(routed_by, [request for _, request in waiting])
        if replica != self._replica_of[routed_by]:
            self._replica_of[routed_by] = replica
            in_use = set(self._replica_of)
            self._batchers = {name: batcher for name, batcher in self._batchers.items() if name in in_use}
        return answers
