"""The gateway's calls to the store: writes go to any replica, reads to the one that is warm for the user's partition.

Callers take turns wherever work waits: in the queues of this gateway, and in the queue of the store, which is told the
turn and the cost of each call. Deletions by filter, exports, imports and other large calls are bulk work. A call whose
deadline passes is answered with `DeadlineExceeded` only if the store has not begun it.

A call carries the name of the store's method (`"get"`). So gateways and stores of two versions work together even if a
class or a module was renamed between them. Callers pass the method itself (`Store.get`), for its types.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from deployments.batcher import Batcher
from deployments.calls.resilient import UnbatchedCalls, resilient, with_plain_pickle
from deployments.calls.searches import QUEUED_CALLS, Answers, CoalescedSearches, turn_of
from deployments.errors import LocatedError
from deployments.fair_queue import SentTurn, Turn
from deployments.rate_limits import Ask, Lease
from store import (
    Append,
    AppendResult,
    Credential,
    ExportCursor,
    ExportPage,
    Imported,
    ImportLine,
    Key,
    Refusals,
    Search,
    SearchResult,
    Store,
)

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

Answer = TypeVar("Answer")
Arguments = ParamSpec("Arguments")


def partition_of(tenant: str, user_id: str, partitions: int) -> int:
    """The user's partition in [0, partitions). It keeps the user on a warm replica; answers do not depend on it."""
    digest = hashlib.blake2b(f"{len(tenant)}:{tenant}{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % partitions


BULK_MEMORIES = 100
"""A call that reads or writes more memories is bulk work."""

MEMORIES_A_UNIT = 16
"""The store reads or writes about so many memories in the time of one search, which costs one unit."""

KEY_LOOKUPS = 256  # in one call
KEY_LOOKUPS_IN_FLIGHT = 2
KEY_LOOKUP_MAX_WAIT_S = 10.0

PROBES = "probes"
"""The caller of checks of readiness."""

_PAGE = 200  # memories in a page of an export; assumed of erasures and deletions by filter
_BULK_READS = frozenset({Store.duplicates.__name__})
_BULK_WRITES = frozenset({Store.delete_where.__name__, Store.erase_user.__name__})


def _cost(memories: int) -> int:
    return 1 + memories // MEMORIES_A_UNIT


def _sent(turn: Turn, memories: int) -> SentTurn:
    """The turn of a call that reads or writes so many memories, as the store is told it."""
    return turn.caller, turn.bulk, turn.remaining_s(time.monotonic()), _cost(memories)


def _result(answer: Answer | LocatedError) -> Answer:
    """The store's answer. The store returns its errors as values; they are raised here."""
    if isinstance(answer, LocatedError):
        raise answer
    return answer


class StoreCalls:
    """Calls to the Store deployment.

    Appends, searches and lookups of keys are batched. `QUEUED_CALLS` full calls of each may wait. Other calls are made
    one for each request, `MAX_UNBATCHED_CALLS` at a time. Beyond these limits a caller may have no more than its share,
    and is refused with `Overloaded`, erasures too. A refused call was not made.

    The caller is the user that a call is about; an append for several users is a caller of its own.

    Args:
        handle: the Store deployment.
        partitions: number of partitions that users hash to.
        append_in_flight: write calls at a time, of bulk work and of other work each.
        append_memories: memories in one write call.
        max_wait_s: the longest time that an append or a search may wait here; None for no limit.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        *,
        partitions: int,
        append_in_flight: int,
        append_memories: int,
        max_wait_s: float | None,
    ) -> None:
        self._handle = with_plain_pickle(handle)
        self._by_partition = [
            with_plain_pickle(handle, session_id=f"partition-{number}") for number in range(partitions)
        ]
        self._appends: Batcher[tuple[Sequence[Append], Turn], list[AppendResult]] = Batcher(
            self._append,
            in_flight=append_in_flight,
            budget=append_memories,
            max_queued=QUEUED_CALLS * append_memories,
            max_wait_s=max_wait_s,
            cost=lambda item: _memories(item[0]),
            separate_slots=True,
        )
        self._searches = CoalescedSearches(
            self._search,
            partition_of=lambda request: self._partition(request.tenant, request.user_id),
            partitions=partitions,
            max_wait_s=max_wait_s,
        )
        self._key_lookups: Batcher[Credential, Key | None] = Batcher(
            self._find_keys,
            in_flight=KEY_LOOKUPS_IN_FLIGHT,
            budget=KEY_LOOKUPS,
            max_queued=QUEUED_CALLS * KEY_LOOKUPS,
            max_wait_s=KEY_LOOKUP_MAX_WAIT_S,
        )
        self._unbatched = UnbatchedCalls("store")

    def reconfigure(self, *, append_in_flight: int, append_memories: int, max_wait_s: float | None) -> None:
        """Change these arguments of the constructor. Calls that wait or run are kept."""
        self._appends.reconfigure(
            in_flight=append_in_flight,
            budget=append_memories,
            max_queued=QUEUED_CALLS * append_memories,
            max_wait_s=max_wait_s,
        )
        self._searches.reconfigure(max_wait_s=max_wait_s)

    async def _append(self, items: list[tuple[Sequence[Append], Turn]]) -> Sequence[list[AppendResult] | Exception]:
        calls = [call for call, _ in items]
        turn = turn_of([turn for _, turn in items])
        return await self._write(Store.append_together, turn, sum(map(_memories, calls)), calls)

    async def _search(self, partition: int, requests: list[Search], turn: Turn) -> tuple[str, Answers]:
        warm, number = self._by_partition[partition], len(requests)
        return _result(await resilient(lambda: warm.search.remote(_sent(turn, number), requests), "store"))

    def _partition(self, tenant: str, user_id: str) -> int:
        return partition_of(tenant, user_id, len(self._by_partition))

    async def _find_keys(self, credentials: list[Credential]) -> Sequence[Key | None]:
        return await self._run(self._handle, Store.find_keys, Turn(), 0, credentials)

    async def find_key(self, credential: Credential, found_before: bool) -> Key | None:
        """`Store.find_keys` of one credential, in one call with the others that wait.

        Keys that were found before go first. So lookups of keys that do not exist cannot delay what was revoked.

        Raises:
            StoreError: the log cannot be read.
            Overloaded, DeadlineExceeded, Unavailable: the store did not look the key up.
        """
        turn = Turn(credential.id, bulk=not found_before, deadline=None)
        return await self._key_lookups.submit(credential, turn)

    async def append(self, call: Sequence[Append]) -> list[AppendResult]:
        """Commit one call, all of it or nothing, in one transaction with the other calls that wait.

        Raises:
            StoreError: the call cannot be made.
            Overloaded: at once, if too many memories of the caller wait.
            DeadlineExceeded: the call was still queued when its deadline passed.
        """
        users = {(request.tenant, request.user_id) for request in call}
        turn = Turn.of_user(*users.pop()) if len(users) == 1 else Turn()
        turn = turn.in_bulk(_memories(call) > BULK_MEMORIES)
        return await self._appends.submit((call, turn), turn)

    async def search(self, request: Search) -> SearchResult:
        """Search one user.

        Raises:
            StoreError: the search cannot be made.
            Overloaded: at once, if too many searches of the user wait.
            DeadlineExceeded: the search was still queued when its deadline passed.
        """
        return await self._searches.search(request, Turn.of_user(request.tenant, request.user_id))

    async def read_user(
        self,
        method: Callable[Concatenate[Store, str, str, Arguments], Answer],
        tenant: str,
        user_id: str,
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Call a method that reads one user (`Store.get`), on the replica that is warm for the user."""
        memories = _PAGE if method.__name__ in _BULK_READS else _named(args, options)
        turn = Turn.of_user(tenant, user_id).in_bulk(memories > BULK_MEMORIES)
        warm = self._by_partition[self._partition(tenant, user_id)]
        with self._unbatched.admit(turn):
            return await self._run(warm, method, turn, memories, tenant, user_id, *args, **options)

    async def export_page(self, tenant: str, user_id: str, cursor: ExportCursor | None) -> ExportPage:
        """`Store.export_page`. Raises Overloaded only for the first page of an export, which has no cursor."""
        turn = Turn.of_user(tenant, user_id, bulk=True, begun=cursor is not None)
        warm = self._by_partition[self._partition(tenant, user_id)]
        with self._unbatched.admit(turn):
            return await self._run(warm, Store.export_page, turn, _PAGE, tenant, user_id, cursor)

    async def read(
        self,
        method: Callable[Concatenate[Store, Arguments], Answer],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Call a method that reads several users (`Store.users`), on any replica."""
        turn = Turn(bulk=True)
        with self._unbatched.admit(turn):
            return await self._run(self._handle, method, turn, _PAGE, *args, **options)

    async def write(
        self,
        method: Callable[Concatenate[Store, str, str, Arguments], Answer],
        tenant: str,
        user_id: str,
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Call a method that writes one user (`Store.update`), on any replica.

        Raises:
            Unavailable: `OUTCOME_UNKNOWN` if it is not known whether the write was made.
        """
        memories = _PAGE if method.__name__ in _BULK_WRITES else _named(args, options)
        turn = Turn.of_user(tenant, user_id).in_bulk(memories > BULK_MEMORIES)
        with self._unbatched.admit(turn):
            return await self._write(method, turn, memories, tenant, user_id, *args, **options)

    async def write_keys(
        self,
        method: Callable[Concatenate[Store, str, Arguments], Answer],
        tenant: str,
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Call a method that makes or revokes a key of a tenant (`Store.create_key`), on any replica.

        If the replica is lost, the call is sent again. Then two keys may have been made; nobody has the first one.

        Raises:
            Unavailable: `OUTCOME_UNKNOWN` if it is not known whether the write was made.
        """
        turn = Turn()
        with self._unbatched.admit(turn):
            return await self._write(method, turn, 0, tenant, *args, **options)

    async def import_page(
        self,
        tenant: str,
        user_id: str,
        lines: Sequence[ImportLine],
        *,
        issued_at: datetime,
        epoch: int | None,
        by: str | None,
    ) -> Imported:
        """`Store.import_page`. Raises Overloaded only for the first page of an import, which has no `epoch` yet."""
        begin = epoch is None
        turn = Turn.of_user(tenant, user_id, bulk=True, begun=not begin)
        with self._unbatched.admit(turn):
            return await self._write(
                Store.import_page,
                turn,
                len(lines),
                tenant,
                user_id,
                lines,
                begin=begin,
                issued_at=issued_at,
                epoch=epoch,
                by=by,
            )

    async def lease(self, ask: Ask) -> Lease:
        """Ask the replica that has a bucket for a part of it: see deployments/rate_limits.py.

        Raises:
            Overloaded, Unavailable: the replica did not answer.
        """
        owner = self._by_partition[self._partition("", ask.name)]
        return await resilient(lambda: owner.lease.remote(ask), "store")

    async def record_refusals(self, refusals: Sequence[Refusals]) -> None:
        """`Store.record_refusals`, without queueing here."""
        await self._write(Store.record_refusals, Turn(bulk=True), 0, refusals)

    async def _write(
        self,
        method: Callable[Concatenate[Store, Arguments], Answer],
        turn: Turn,
        memories: int,
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        name = method.__name__
        return _result(
            await resilient(
                lambda: self._handle.run.remote(name, _sent(turn, memories), *args, **options), "store", writes=True
            )
        )

    async def _run(
        self,
        replica: DeploymentHandle,
        method: Callable[Concatenate[Store, Arguments], Answer],
        turn: Turn,
        memories: int,
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Call a method that reads about so many memories."""
        name = method.__name__
        return _result(
            await resilient(lambda: replica.run.remote(name, _sent(turn, memories), *args, **options), "store")
        )

    async def ping(self) -> None:
        """Read the log, without queueing here. All pings are one caller: no key says who asks for them."""
        await self._run(self._handle, Store.ping, Turn(PROBES, deadline=None), 0)


def _named(args: tuple[object, ...], options: Mapping[str, object]) -> int:
    """The most memories that a call with these arguments is about: its limit, or the length of its list of ids."""
    limit = options.get("limit")
    return limit if isinstance(limit, int) else max((len(one) for one in args if isinstance(one, list)), default=0)


def _memories(call: Sequence[Append]) -> int:
    return sum(len(request.memories) for request in call)
