"""The store of one replica: the log, and the indexes that are resident here.

Guarantees:
- What a call returned as written is on disk; a call that raised wrote nothing.
- A search sees every write that was committed before it was called, by whichever process.
- A user's rows are found under that tenant and user id only.
- Any number of stores may work on one log at once; one that dies loses nothing but its cache.

Not for several threads at once: one worker thread owns a store.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Connection

from store import reading, rows, writing
from store.errors import InvalidInput, NotFound, StoreError
from store.index import UserIndex, normalised
from store.log import Log, Synchronous, check_model
from store.records import (
    Append,
    AppendResult,
    HistoryEvent,
    IndexOptions,
    Memory,
    Search,
    SearchResult,
    UserStats,
)

_KNOWN_USERS = 65_536


class Store:
    """A durable memory store. Made by `Store.open`."""

    def __init__(
        self, log: Log, *, dim: int, index: IndexOptions, index_budget_bytes: int, now: Callable[[], datetime]
    ) -> None:
        self.dim = dim
        self._log = log
        self._options = index
        self._budget = index_budget_bytes
        self._now = now
        self._uids: OrderedDict[tuple[str, str], int] = OrderedDict()  # rows of users are never removed
        self._resident: OrderedDict[int, UserIndex] = OrderedDict()

    @classmethod
    def open(
        cls,
        url: str,
        *,
        dim: int,
        model: str,
        synchronous: Synchronous = "FULL",
        index: IndexOptions | None = None,
        index_budget_bytes: int = 1 << 30,
        snapshot_dir: str | Path | None = None,
        lock_timeout_s: float = 5.0,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> Store:
        """Open the log at `url` for vectors of `model` with `dim` dimensions, making it where there is none.

        Raises:
            LogUnavailable, LogDamaged, SchemaMismatch, ModelMismatch: see store/errors.py.
        """
        log = Log.open(url, synchronous=synchronous, lock_timeout_s=lock_timeout_s)
        try:
            log.serve_model(model, dim)
        except BaseException:
            log.close()
            raise
        return cls(log, dim=dim, index=index or IndexOptions(), index_budget_bytes=index_budget_bytes, now=now)

    def append(self, requests: Sequence[Append]) -> list[AppendResult | StoreError]:
        """Write all requests in one transaction. One result a request, in order; one's error is its alone.

        Raises:
            LogUnavailable, LogDamaged, ModelMismatch: nothing was written.
        """
        results: list[AppendResult | StoreError | None] = []
        accepted: list[writing.CheckedAppend] = []
        for request in requests:
            try:
                accepted.append(self._checked(request))
                results.append(None)
            except InvalidInput as error:
                results.append(error)
        if accepted:
            now = self._micros()
            with self._log.write() as connection:
                self._log.current_model(connection)
                locked = self._lock(connection, [request.user for request in accepted])
                written = iter(writing.append(connection, accepted, locked, self._log.model, now))
                writing.save_users(connection, list(locked.values()))
            self._remember({name: user.uid for name, user in locked.items()})
            results = [next(written) if result is None else result for result in results]
        return [result for result in results if result is not None]

    def search(self, requests: Sequence[Search]) -> list[SearchResult | StoreError]:
        """Answer all requests from one state of the log, which holds every write that was committed before.

        Raises:
            LogUnavailable, LogDamaged, ModelMismatch: none could be answered.
        """
        now = self._micros()
        with self._log.read() as connection:
            uids = self._find(connection, [(request.tenant, request.user_id) for request in requests])
            standing = reading.positions(connection, uids.values())
            results: list[SearchResult | StoreError] = []
            for request in requests:
                try:
                    results.append(self._search_one(connection, request, uids, standing, now))
                except (InvalidInput, NotFound) as error:
                    results.append(error)
        self._trim()
        return results

    def get(self, tenant: str, user_id: str, id: str) -> Memory:
        """One memory.

        Raises:
            NotFound: this user has no such memory.
        """
        with self._log.read() as connection:
            uid = self._uid(connection, tenant, user_id)
            row = reading.by_key(connection, rows.user_key(uid, id), self._micros())
        if row is None:
            raise NotFound(f"No memory {id!r}.", "id")
        return rows.memory(row, user_id)

    def history(self, tenant: str, user_id: str, id: str) -> list[HistoryEvent]:
        """The states of one memory, oldest first.

        Raises:
            NotFound: this user never had such a memory, or was erased.
        """
        with self._log.read() as connection:
            events = reading.events(connection, rows.user_key(self._uid(connection, tenant, user_id), id))
        if not events:
            raise NotFound(f"No memory {id!r}.", "id")
        return events

    def delete(self, tenant: str, user_id: str, id: str) -> int:
        """Delete one memory with its vector and the text of its history. Returns the user's version after it.

        Raises:
            NotFound: this user has no such memory.
        """
        now = self._micros()
        with self._log.write() as connection:
            self._log.current_model(connection)
            key = rows.user_key(self._uid(connection, tenant, user_id), id)
            user = self._lock(connection, [(tenant, user_id)])[tenant, user_id]
            if reading.by_key(connection, key, now) is None:
                raise NotFound(f"No memory {id!r}.", "id")
            writing.bury(connection, user, [key], now)
            writing.save_users(connection, [user])
        return user.version

    def erase_user(self, tenant: str, user_id: str) -> tuple[int, int]:
        """Delete everything of a user. Returns how many memories there were, and the user's version after it."""
        rows.check_id(user_id, "user_id")
        with self._log.write() as connection:
            self._log.current_model(connection)
            user = self._lock(connection, [(tenant, user_id)])[tenant, user_id]
            erased = writing.erase(connection, user, self._micros())
            writing.save_users(connection, [user])
        self._resident.pop(user.uid, None)
        self._log.truncate_wal()
        return erased, user.version

    def user(self, tenant: str, user_id: str) -> UserStats:
        """What there is of one user; all zero for one that never was."""
        with self._log.read() as connection:
            uid = self._find(connection, [(tenant, user_id)]).get((tenant, user_id))
            if uid is None:
                return UserStats(user_id, 0, 0, 0, None, False)
            standing = reading.positions(connection, [uid])[uid]
            size = reading.bytes_of(connection, uid)
        index = self._resident.get(uid)
        return UserStats(
            user_id, standing.live, standing.version, size, index.kind if index else None, index is not None
        )

    def fold(self) -> bool:
        """Do one bounded step of background work; True where more is waiting."""
        return False

    def ping(self) -> None:
        """Raise LogUnavailable unless the log can be read now."""
        self._log.ping()

    def close(self) -> None:
        """Close the log and drop the indexes."""
        self._resident.clear()
        self._log.close()

    def _checked(self, request: Append) -> writing.CheckedAppend:
        rows.check_id(request.user_id, "user_id")
        if not request.memories:
            raise InvalidInput("There is no memory in the request.", "memories")
        return writing.CheckedAppend(
            (request.tenant, request.user_id),
            [rows.checked(memory, self.dim, f"memories.{n}") for n, memory in enumerate(request.memories)],
            request.on_duplicate == "skip",
            request.upsert,
            rows.micros(request.issued_at, "issued_at"),
        )

    def _search_one(
        self,
        connection: Connection,
        request: Search,
        uids: dict[tuple[str, str], int],
        standing: dict[int, reading.Position],
        now: int,
    ) -> SearchResult:
        if not request.top_k >= 1:
            raise InvalidInput("top_k is at least 1.", "top_k")
        if request.filter is not None:
            raise InvalidInput("Filters are not known yet.", "filter")
        query = normalised(rows.check_vector(request.vector, self.dim, "vector")[None, :])[0]
        uid = uids.get((request.tenant, request.user_id))
        if uid is None:
            return SearchResult([], "exact", 0)
        index = self._caught_up(connection, standing[uid])
        index.expire(now)
        hits = index.search(query, request.top_k)
        wanted = [
            (int(label), float(score))
            for label, score in zip(hits.labels, hits.scores, strict=True)
            if request.min_score is None or score >= request.min_score
        ]
        found = reading.by_label(connection, [label for label, _ in wanted])
        results = [rows.memory(found[label], request.user_id, score) for label, score in wanted]
        return SearchResult(results, index.kind, standing[uid].version)

    def _caught_up(self, connection: Connection, position: reading.Position) -> UserIndex:
        """The user's index, holding what the log holds."""
        check_model(position.model, self._log.model)
        index = self._resident.get(position.uid)
        if index is None or index.epoch != position.epoch or index.version > position.version:
            index = UserIndex(position.uid, self.dim, self._options)
            index.epoch = position.epoch
        if index.version < position.version:
            index.apply(
                reading.changes(connection, position.uid, index.version, self._log.model, self.dim), position.version
            )
        self._resident[position.uid] = index
        self._resident.move_to_end(position.uid)
        return index

    def _trim(self) -> None:
        used = sum(index.bytes for index in self._resident.values())
        while used > self._budget and len(self._resident) > 1:
            used -= self._resident.popitem(last=False)[1].bytes

    def _lock(self, connection: Connection, names: Sequence[tuple[str, str]]) -> dict[tuple[str, str], writing.User]:
        wanted = list(dict.fromkeys(names))
        unknown = [name for name in wanted if name not in self._uids]
        uids = {name: self._uids[name] for name in wanted if name in self._uids}
        if unknown:
            writing.make_users(connection, unknown)
            uids |= writing.find_users(connection, unknown)
        locked = writing.lock_users(connection, uids.values())
        return {name: locked[uids[name]] for name in wanted}

    def _find(self, connection: Connection, names: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int]:
        unknown = {name for name in names if name not in self._uids}
        if unknown:
            self._remember(writing.find_users(connection, unknown))
        return {name: self._uids[name] for name in names if name in self._uids}

    def _uid(self, connection: Connection, tenant: str, user_id: str) -> int:
        uid = self._find(connection, [(tenant, user_id)]).get((tenant, user_id))
        if uid is None:
            raise NotFound(f"No user {user_id!r}.", "user_id")
        return uid

    def _remember(self, uids: dict[tuple[str, str], int]) -> None:
        """Keep the uids of users whose row is committed."""
        self._uids.update(uids)
        while len(self._uids) > _KNOWN_USERS:
            self._uids.popitem(last=False)

    def _micros(self) -> int:
        return rows.micros(self._now(), "now")
