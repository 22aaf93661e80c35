"""Searches for one replica share calls while replicas come and go, and each search gets its own error."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from deployments.calls.searches import SEARCHES, CoalescedSearches
from deployments.errors import Unavailable
from deployments.fair_queue import Turn
from store import InvalidInput, Search, SearchResult

PARTITIONS = 8


class Stores:
    """Replicas in this process. `home` gives the replica that each partition is routed to."""

    def __init__(self) -> None:
        self.home: Callable[[int], str] = lambda _: "a"
        self.calls: list[tuple[str, int, list[str]]] = []  # (replica, the partition that routed the call, users)
        self.gate = asyncio.Event()
        self.gate.set()
        self.searches = CoalescedSearches(
            self._ask,
            partition_of=lambda request: int(request.user_id) % PARTITIONS,
            partitions=PARTITIONS,
            max_wait_s=None,
        )

    async def _ask(
        self, partition: int, requests: list[Search], turn: Turn
    ) -> tuple[str, list[SearchResult | InvalidInput]]:
        replica = self.home(partition)
        self.calls.append((replica, partition, [request.user_id for request in requests]))
        await self.gate.wait()
        if replica == "lost":
            raise Unavailable("The store is restarting; try again.")
        return replica, [
            InvalidInput("wrong", "top_k") if request.top_k == 0 else SearchResult([], "exact", int(request.user_id))
            for request in requests
        ]

    async def search(self, *users: int) -> None:
        """Search for users concurrently, and check that each gets its own answer."""
        results = await asyncio.gather(*(self.searches.search(request(user), Turn()) for user in users))
        assert [result.version for result in results] == list(users)

    def replicas_by_user(self, call: int = 0) -> dict[int, set[str]]:
        """The replicas that searched each user, from the given call on."""
        found: dict[int, set[str]] = {}
        for replica, _, users in self.calls[call:]:
            for user in users:
                found.setdefault(int(user), set()).add(replica)
        return found


def request(user: int, top_k: int = 10) -> Search:
    return Search("default", str(user), np.ones(4, np.float32), top_k)


async def test_all_partitions_of_one_replica_share_a_call() -> None:
    stores = Stores()
    for _ in range(PARTITIONS):  # until each partition has routed a call
        await stores.search(*range(PARTITIONS))
    stores.calls.clear()
    await stores.search(*range(3 * PARTITIONS))
    assert [(replica, len(users)) for replica, _, users in stores.calls] == [("a", 3 * PARTITIONS)]
    stores.calls.clear()
    await stores.search(*range(SEARCHES + 5))
    assert [len(users) for _, _, users in stores.calls] == [SEARCHES, 5]


async def test_each_user_settles_on_the_replica_that_it_is_routed_to() -> None:
    stores = Stores()
    stores.home = lambda partition: "ab"[partition % 2]
    for _ in range(2 * PARTITIONS):
        await stores.search(*range(PARTITIONS))
    settled = len(stores.calls)
    for _ in range(10):
        await stores.search(*range(PARTITIONS))
    assert stores.replicas_by_user(settled) == {user: {"ab"[user % 2]} for user in range(PARTITIONS)}
    assert len(stores.calls) - settled == 20  # one to each replica


async def test_users_follow_when_replicas_come_and_go() -> None:
    stores = Stores()
    for replicas in ("a", "abc", "bc", "d"):
        stores.home = lambda partition, replicas=replicas: replicas[partition % len(replicas)]
        for _ in range(3 * PARTITIONS):
            await stores.search(*range(PARTITIONS))
        settled = len(stores.calls)
        await stores.search(*range(PARTITIONS))
        expected = {user: {replicas[user % len(replicas)]} for user in range(PARTITIONS)}
        assert stores.replicas_by_user(settled) == expected
        assert len(stores.calls) - settled == len(replicas)


async def test_a_busy_partition_does_not_route_all_calls() -> None:
    stores = Stores()
    for _ in range(2 * PARTITIONS):
        await stores.search(0, 0, 0, 0, 0, *range(1, PARTITIONS))
    stores.calls.clear()
    for _ in range(PARTITIONS):
        await stores.search(0, 0, 0, 0, 0, *range(1, PARTITIONS))
    assert sorted(routed_by for _, routed_by, _ in stores.calls) == list(range(PARTITIONS))


async def test_searches_that_arrive_during_a_call_share_the_next_one() -> None:
    stores = Stores()
    await stores.search(0)
    stores.calls.clear()
    stores.gate.clear()
    tasks = []
    for user in (0, 8, 16, 24, 32):
        tasks.append(asyncio.create_task(stores.search(user)))
        for _ in range(5):
            await asyncio.sleep(0)
    assert [users for _, _, users in stores.calls] == [["0"], ["8"]]
    stores.gate.set()
    await asyncio.gather(*tasks)
    assert [users for _, _, users in stores.calls] == [["0"], ["8"], ["16", "24", "32"]]


async def test_a_wrong_search_fails_alone_and_a_lost_call_fails_all_its_searches() -> None:
    stores = Stores()
    answers = await asyncio.gather(
        *(stores.searches.search(one, Turn()) for one in (request(1), request(2, top_k=0), request(3))),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers] == [SearchResult, InvalidInput, SearchResult]
    stores.home = lambda _: "lost"
    lost = await asyncio.gather(
        *(stores.searches.search(request(user), Turn()) for user in (1, 2)), return_exceptions=True
    )
    assert [type(answer) for answer in lost] == [Unavailable, Unavailable]
    stores.home = lambda _: "b"
    await stores.search(1, 2)


async def test_a_cancelled_search_leaves_the_queue() -> None:
    stores = Stores()
    stores.gate.clear()
    first = [asyncio.create_task(stores.search(user)) for user in (0,)]
    for _ in range(5):
        await asyncio.sleep(0)
    second = asyncio.create_task(stores.search(1))
    for _ in range(5):
        await asyncio.sleep(0)
    gone, stays = asyncio.create_task(stores.search(2)), asyncio.create_task(stores.search(3))
    for _ in range(5):
        await asyncio.sleep(0)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    stores.gate.set()
    await asyncio.gather(*first, second, stays)
    assert "2" not in [user for _, _, users in stores.calls for user in users]
