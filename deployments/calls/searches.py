"""Searches on their way to the store: those that one replica is warm for travel together, whichever users they ask for.

Routing keeps a partition of users on one replica, but does not say on which. So each answer names the replica that gave
it, and the partitions that were last answered by the same one share its calls. A call is routed by one of them, each in
its turn: where replicas have come or gone, its answer comes from another one, and the partition moves there.

All of this is a hint. A search that reaches another replica than it should is answered just as well, after that one has
read what it lacks.
"""

from collections.abc import Awaitable, Callable, Sequence

from deployments.batcher import Batcher
from store import Search, SearchResult, StoreError

Answers = Sequence[SearchResult | StoreError]
Ask = Callable[[int, list[Search]], Awaitable[tuple[str, Answers]]]

IN_FLIGHT = 2  # one is searched for while another is on its way
SEARCHES = 64  # of one call
QUEUED_CALLS = 64  # of work that may wait for a store; past it `Overloaded`
_UNKNOWN = ""


class CoalescedSearches:
    """The searches of one gateway.

    Args:
        ask: sends searches to the replica that routing keeps a partition on; returns its name, and an answer for each.
        partition_of: the partition of a search, in [0, partitions).
        partitions: how many there are.
    """

    def __init__(self, ask: Ask, *, partition_of: Callable[[Search], int], partitions: int) -> None:
        self._ask = ask
        self._partition_of = partition_of
        self._replica_of = [_UNKNOWN] * partitions
        self._led_at = [0] * partitions  # the number of the call that the partition routed last
        self._calls = 0
        self._batchers: dict[str, Batcher[tuple[int, Search], SearchResult]] = {}

    async def search(self, request: Search) -> SearchResult:
        """Wait for one search's answer. Raises its own error, or Overloaded at once where too many wait."""
        partition = self._partition_of(request)
        replica = self._replica_of[partition]
        batcher = self._batchers.get(replica)
        if batcher is None:
            batcher = self._batchers[replica] = Batcher(
                self._call, in_flight=IN_FLIGHT, budget=SEARCHES, max_queued=QUEUED_CALLS * SEARCHES
            )
        return await batcher.submit((partition, request))

    async def _call(self, waiting: list[tuple[int, Search]]) -> Answers:
        leader = min((partition for partition, _ in waiting), key=self._led_at.__getitem__)
        self._calls += 1
        self._led_at[leader] = self._calls
        replica, answers = await self._ask(leader, [request for _, request in waiting])
        if replica != self._replica_of[leader]:
            self._replica_of[leader] = replica
            named = set(self._replica_of)
            self._batchers = {name: queue for name, queue in self._batchers.items() if name in named}
        return answers
