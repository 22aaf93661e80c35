"""The gateway's calls to the store: writes to any replica, reads to the one that is warm for the user's partition."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

from ray.serve.handle import DeploymentHandle

from deployments.batcher import Batcher
from deployments.calls.resilient import LoneCalls, quick, resilient
from deployments.calls.searches import QUEUED_CALLS, Answers, CoalescedSearches
from store import Append, AppendResult, Search, SearchResult, Store, StoreError

Answer = TypeVar("Answer")
Arguments = ParamSpec("Arguments")


def partition_of(tenant: str, user_id: str, partitions: int) -> int:
    """The user's partition in [0, partitions): keeps a user on one warm replica, never a matter of correctness."""
    digest = hashlib.blake2b(f"{len(tenant)}:{tenant}{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % partitions


def _checked(answer: Answer | StoreError) -> Answer:
    """A store's answer; an error that came as a value is raised here."""
    if isinstance(answer, StoreError):
        raise answer
    return answer


class StoreCalls:
    """Calls to the store: writes to any replica, reads to the one that is warm for the user's partition.

    Appends and searches are coalesced. Of each so much may wait as fills `QUEUED_CALLS` calls; past it `Overloaded`.
    So is what asks for anything else, erasures too, past `LONE_CALLS`: it was not done, and what waits is not delayed.

    Args:
        handle: the Store deployment.
        partitions: number of buckets that users hash to.
        append_in_flight: write calls at once.
        append_memories: memories in one write call.
    """

    def __init__(
        self, handle: DeploymentHandle, *, partitions: int, append_in_flight: int, append_memories: int
    ) -> None:
        self._handle = quick(handle)
        self._by_partition = [quick(handle, session_id=f"partition-{number}") for number in range(partitions)]
        self._appends: Batcher[Sequence[Append], list[AppendResult]] = Batcher(
            self._append,
            in_flight=append_in_flight,
            budget=append_memories,
            max_queued=QUEUED_CALLS * append_memories,
            cost=lambda call: sum(len(request.memories) for request in call),
        )
        self._searches = CoalescedSearches(
            self._search,
            partition_of=lambda request: self._partition(request.tenant, request.user_id),
            partitions=partitions,
        )
        self._lone_calls = LoneCalls("store")

    def reconfigure(self, *, append_in_flight: int, append_memories: int) -> None:
        """Change what the constructor was given, while calls wait and travel."""
        self._appends.reconfigure(
            in_flight=append_in_flight, budget=append_memories, max_queued=QUEUED_CALLS * append_memories
        )

    async def _append(self, calls: list[Sequence[Append]]) -> Sequence[list[AppendResult] | Exception]:
        return await self._write(Store.append_together, calls)

    async def _search(self, partition: int, requests: list[Search]) -> tuple[str, Answers]:
        warm = self._by_partition[partition]
        return _checked(await resilient(lambda: warm.search.remote(requests), "store"))

    def _partition(self, tenant: str, user_id: str) -> int:
        return partition_of(tenant, user_id, len(self._by_partition))

    async def append(self, call: Sequence[Append]) -> list[AppendResult]:
        """Commit one call, all of it or nothing, in a transaction with whatever else waits.

        Raises:
            Overloaded: at once, where too much waits. Else its own error.
        """
        return await self._appends.submit(call)

    async def search(self, request: Search) -> SearchResult:
        """Search one user. Raises its own error, or Overloaded."""
        return await self._searches.search(request)

    async def run_warm(
        self,
        method: Callable[Concatenate[Store, str, str, Arguments], Answer],
        tenant: str,
        user_id: str,
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Call a method of the store that reads one user (`Store.get`), on the replica that is warm for it."""
        warm = self._by_partition[self._partition(tenant, user_id)]
        with self._lone_calls.one():
            return _checked(
                await resilient(lambda: warm.run.remote(method, tenant, user_id, *args, **options), "store")
            )

    async def run(
        self,
        method: Callable[Concatenate[Store, Arguments], Answer],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Call a method of the store that reads, on any replica."""
        with self._lone_calls.one():
            return _checked(await resilient(lambda: self._handle.run.remote(method, *args, **options), "store"))

    async def write(
        self,
        method: Callable[Concatenate[Store, Arguments], Answer],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Call a method of the store that writes, on any replica.

        Raises:
            Unavailable: `OUTCOME_UNKNOWN` where whether it was done cannot be told.
        """
        with self._lone_calls.one():
            return await self._write(method, *args, **options)

    async def _write(
        self,
        method: Callable[Concatenate[Store, Arguments], Answer],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        return _checked(
            await resilient(lambda: self._handle.run.remote(method, *args, **options), "store", writes=True)
        )

    async def ping(self) -> None:
        """Read the log, past every queue."""
        _checked(await resilient(lambda: self._handle.run.remote(Store.ping), "store"))
