"""The gateway's calls to the store: writes go to any replica, reads to the one that is warm for the user's partition.

A call carries the name of the store's method (`"get"`). So gateways and stores of two versions work together even if a
class or a module was renamed between them. Callers pass the method itself (`Store.get`), for its types.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

from ray.serve.handle import DeploymentHandle

from deployments.batcher import Batcher
from deployments.calls.resilient import UnbatchedCalls, resilient, with_plain_pickle
from deployments.calls.searches import QUEUED_CALLS, Answers, CoalescedSearches
from store import Append, AppendResult, Search, SearchResult, Store, StoreError

Answer = TypeVar("Answer")
Arguments = ParamSpec("Arguments")


def partition_of(tenant: str, user_id: str, partitions: int) -> int:
    """The user's partition in [0, partitions). It keeps the user on a warm replica; answers do not depend on it."""
    digest = hashlib.blake2b(f"{len(tenant)}:{tenant}{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % partitions


def _result(answer: Answer | StoreError) -> Answer:
    """The store's answer. The store returns its errors as values; they are raised here."""
    if isinstance(answer, StoreError):
        raise answer
    return answer


class StoreCalls:
    """Calls to the Store deployment.

    Appends and searches are batched. `QUEUED_CALLS` full calls of each may wait; more are refused with `Overloaded`.
    Other calls are made one for each request, `MAX_UNBATCHED_CALLS` at a time; more are refused with `Overloaded`,
    erasures too. A refused call was not made.

    Args:
        handle: the Store deployment.
        partitions: number of partitions that users hash to.
        append_in_flight: write calls at a time.
        append_memories: memories in one write call.
    """

    def __init__(
        self, handle: DeploymentHandle, *, partitions: int, append_in_flight: int, append_memories: int
    ) -> None:
        self._handle = with_plain_pickle(handle)
        self._by_partition = [
            with_plain_pickle(handle, session_id=f"partition-{number}") for number in range(partitions)
        ]
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
        self._unbatched = UnbatchedCalls("store")

    def reconfigure(self, *, append_in_flight: int, append_memories: int) -> None:
        """Change these arguments of the constructor. Calls that wait or run are kept."""
        self._appends.reconfigure(
            in_flight=append_in_flight, budget=append_memories, max_queued=QUEUED_CALLS * append_memories
        )

    async def _append(self, calls: list[Sequence[Append]]) -> Sequence[list[AppendResult] | Exception]:
        return await self._write(Store.append_together, calls)

    async def _search(self, partition: int, requests: list[Search]) -> tuple[str, Answers]:
        warm = self._by_partition[partition]
        return _result(await resilient(lambda: warm.search.remote(requests), "store"))

    def _partition(self, tenant: str, user_id: str) -> int:
        return partition_of(tenant, user_id, len(self._by_partition))

    async def append(self, call: Sequence[Append]) -> list[AppendResult]:
        """Commit one call, all of it or nothing, in one transaction with the other calls that wait.

        Raises:
            StoreError: the call cannot be made.
            Overloaded: at once, if too many memories wait.
        """
        return await self._appends.submit(call)

    async def search(self, request: Search) -> SearchResult:
        """Search one user. Raises StoreError, or Overloaded at once if too many searches wait."""
        return await self._searches.search(request)

    async def read_user(
        self,
        method: Callable[Concatenate[Store, str, str, Arguments], Answer],
        tenant: str,
        user_id: str,
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Call a method that reads one user (`Store.get`), on the replica that is warm for the user."""
        warm, name = self._by_partition[self._partition(tenant, user_id)], method.__name__
        with self._unbatched.admit():
            return _result(await resilient(lambda: warm.run.remote(name, tenant, user_id, *args, **options), "store"))

    async def read(
        self,
        method: Callable[Concatenate[Store, Arguments], Answer],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Call a method that reads, on any replica."""
        name = method.__name__
        with self._unbatched.admit():
            return _result(await resilient(lambda: self._handle.run.remote(name, *args, **options), "store"))

    async def write(
        self,
        method: Callable[Concatenate[Store, Arguments], Answer],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Call a method that writes, on any replica.

        Raises:
            Unavailable: `OUTCOME_UNKNOWN` if it is not known whether the write was made.
        """
        with self._unbatched.admit():
            return await self._write(method, *args, **options)

    async def _write(
        self,
        method: Callable[Concatenate[Store, Arguments], Answer],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        name = method.__name__
        return _result(await resilient(lambda: self._handle.run.remote(name, *args, **options), "store", writes=True))

    async def ping(self) -> None:
        """Read the log, without queueing."""
        _result(await resilient(lambda: self._handle.run.remote(Store.ping.__name__), "store"))
