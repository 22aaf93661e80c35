"""The store of one process: the log, and the indexes that are in memory.

Guarantees:
- A write is on disk when the call returns. A call that raises has written nothing (an import: nothing of its last
  page), unless the code of the error is `outcome_unknown`.
- A search sees every write that was committed before it was called, by whichever process.
- A write that carries a write id is made once, however often it is sent within an hour and to whichever store.
- The rows of a user are found under its tenant and user id only.
- Any number of stores may work on one log at once. If one dies, only its cache is lost.

A store must not be used by several threads at once: one worker thread owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from store.access import Access
from store.background import Background
from store.errors import Conflict, InvalidInput, NotFound, StoreError
from store.index.resident import Resident
from store.index.snapshots import Snapshots
from store.log import appending, deleting, export, filters, importing, listing, reading, rows, updating
from store.log.database import Log, Synchronous
from store.log.export import ExportCursor, ExportPage
from store.log.ndjson import ImportLine, parse_lines
from store.log.users import Users
from store.records import (
    UNSET,
    Append,
    AppendResult,
    DuplicatesPage,
    Filter,
    HistoryEvent,
    HistoryPage,
    Imported,
    IndexOptions,
    Memory,
    Order,
    Page,
    Quotas,
    Search,
    SearchResult,
    Unset,
    UsersPage,
    UserStats,
    Vector,
)
from store.searching import Searcher

MAX_GROUPS = 100
"""Groups of near duplicates in a page."""


class Store(Access):
    """A durable memory store. Made by `Store.open`."""

    def __init__(
        self,
        log: Log,
        *,
        dim: int,
        index: IndexOptions,
        index_budget_bytes: int,
        snapshots: Snapshots | None,
        quotas: Quotas,
        audit_days: int,
        now: Callable[[], datetime],
    ) -> None:
        super().__init__(log, audited=audit_days > 0, most_keys=quotas.keys, now=now)
        self.dim = dim
        self.resident = Resident(index_budget_bytes)
        self.snapshots = snapshots
        self._closed = False
        self._users = Users(log, quotas, dim)
        self._searcher = Searcher(log, self.resident, snapshots, dim=dim, options=index)
        self._background = Background(log, self.resident, snapshots, self._searcher, audit_days)

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
        quotas: Quotas | None = None,
        audit_days: int = 30,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> Store:
        """Open the log at `url` for vectors of `model` with `dim` dimensions. A log that does not exist is made.

        Args:
            url: see `Log.open`.
            index_budget_bytes: memory for the indexes of this store.
            snapshot_dir: a local folder, which stores of the same log may share. With None no snapshots are kept.
            lock_timeout_s: how long a write waits for another writer.
            quotas: the most that each tenant may hold. By default there is no limit.
            audit_days: how long events are kept. With 0 writes leave no events, and others are removed soon.
            now: the clock.

        Raises:
            LogUnavailable, LogDamaged, SchemaMismatch, ModelMismatch: see store/errors.py.
            InvalidInput: the URL or `synchronous` cannot be used.
            OSError: the folder of snapshots cannot be made or written.
        """
        options = index or IndexOptions()
        log = Log.open(url, synchronous=synchronous, lock_timeout_s=lock_timeout_s)
        try:
            log.serve_model(model, dim)
            snapshots = None
            if snapshot_dir is not None:
                snapshots = Snapshots(Path(snapshot_dir), log_id=log.log_id, model=model, dim=dim, options=options)
        except BaseException:
            log.close()
            raise
        return cls(
            log,
            dim=dim,
            index=options,
            index_budget_bytes=index_budget_bytes,
            snapshots=snapshots,
            quotas=quotas or Quotas(),
            audit_days=audit_days,
            now=now,
        )

    # Writes

    def append(self, requests: Sequence[Append]) -> list[AppendResult | StoreError]:
        """Write all requests in one transaction. Returns one result per request, in order.

        If a request cannot be written, its result is the error, and the others are written.

        Raises:
            LogUnavailable, LogDamaged, ModelMismatch: nothing was written, unless the code is `outcome_unknown`.
        """
        written = self.append_together([(request,) for request in requests])
        return [result if isinstance(result, StoreError) else result[0] for result in written]

    def append_together(self, calls: Sequence[Sequence[Append]]) -> list[list[AppendResult] | StoreError]:
        """Write all calls in one transaction. Of one call, either all requests are written or none.

        Returns one result per call, in order. If a call cannot be written, its result is the error, and the others are
        written. The position of an error counts the memories of the whole call.

        Raises:
            LogUnavailable, LogDamaged, ModelMismatch: nothing was written, unless the code is `outcome_unknown`.
        """
        results: list[list[AppendResult] | StoreError | None] = []
        accepted: list[Sequence[appending.CheckedAppend]] = []
        received = self._micros()
        for call in calls:
            try:
                accepted.append(appending.checked(call, self.dim, received, audited=self._audited))
                results.append(None)
            except InvalidInput as error:
                results.append(error)
        if accepted:
            names = [request.user for call in accepted for request in call]
            self._warm_up(request.user for call in accepted for request in call if request.duplicate_score is not None)
            with self._users.writing(names, of_many=True) as (connection, locked):
                now = self._micros()  # read under the lock, so that the times of a user's memories follow its versions
                room = self._users.room(connection, names)
                find = partial(self._searcher.near_duplicates, connection, now=now)
                written = iter(
                    appending.append(
                        connection, accepted, locked, model=self.log.model_id, now=now, room=room, find=find
                    )
                )
            results = [next(written) if result is None else result for result in results]
        return [result for result in results if result is not None]

    def _warm_up(self, names: Iterable[tuple[str, str]]) -> None:
        """Bring the indexes of users up to date before a transaction needs them, in which other writers would wait."""
        wanted = list(dict.fromkeys(names))
        if wanted:
            with self._reading() as connection:
                self._searcher.warm_up(connection, self._users.find(connection, wanted).values())
            self.resident.trim()

    def update(
        self,
        tenant: str,
        user_id: str,
        id: str,
        *,
        text: str | Unset = UNSET,
        vector: Vector | Unset = UNSET,
        metadata: dict[str, Any] | Unset = UNSET,
        metadata_merge: dict[str, Any] | Unset = UNSET,
        expires_at: datetime | Unset | None = UNSET,
        happened_at: datetime | Unset | None = UNSET,
        thread: str | Unset | None = UNSET,
        if_version: int | None = None,
        issued_at: datetime | None = None,
        write_id: str | None = None,
        by: str | None = None,
    ) -> Memory:
        """Change the fields that are given. If they have these values already, nothing changes.

        Args:
            vector: may be given without a text.
            metadata_merge: keys to set in the metadata as it is when the update is made; None removes a key. Not
                together with `metadata`.
            happened_at, thread: see `NewMemory`; None removes them.
            by: the id of the key that asks for it, for the audit; with None nothing is recorded.
            write_id: names this write. If it is sent again under its write id, here or to another store, it changes
                nothing and gets its first answer again: the memory as it was then.

        Raises:
            NotFound: this user has no such memory.
            Conflict: the memory has another version than `if_version`; or it was erased after `issued_at` and added
                again; or it was erased since the first write under this write id.
            InvalidInput: also if a new text comes without its vector, or `expires_at` had passed at `issued_at`.
        """
        rows.check_id(id, "id")
        if text is not UNSET and vector is UNSET:
            raise InvalidInput("must be given with a new text", "vector")
        if metadata is not UNSET and metadata_merge is not UNSET:
            raise InvalidInput("must not be given with metadata", "metadata_merge")
        change = updating.Change(
            id, text, vector, metadata, metadata_merge, expires_at, happened_at, thread, if_version, issued_at
        )
        with self._users.writing([(tenant, user_id)], make=False) as (connection, locked):
            now = self._micros()  # under the lock: see `append_together`
            user, model = locked[tenant, user_id], self.log.model_id
            return updating.update(
                connection,
                user,
                user_id,
                change,
                model=model,
                dim=self.dim,
                now=now,
                write_id=write_id,
                by=self._actor(by),
            )

    def delete(self, tenant: str, user_id: str, id: str, *, write_id: str | None = None, by: str | None = None) -> int:
        """Delete one memory, with its vector and the contents of its history. Returns the user's version after it.

        Args:
            write_id, by: see `update`.

        Raises:
            NotFound: this user has no such memory.
            InvalidInput: no memory can have this id.
        """
        rows.check_id(id, "id")
        with self._users.writing([(tenant, user_id)], make=False) as (connection, locked):
            now = self._micros()  # under the lock: see `append_together`
            user, model_id = locked[tenant, user_id], self.log.model_id
            version = deleting.delete(
                connection, user, id, model_id=model_id, now=now, write_id=write_id, by=self._actor(by)
            )
        self._background.drop_copies(user.uid, whole=False)
        return version

    def delete_many(
        self, tenant: str, user_id: str, ids: Sequence[str], *, write_id: str | None = None, by: str | None = None
    ) -> tuple[int, Sequence[str]]:
        """Delete a user's memories with these ids, in one transaction.

        Returns how many there were, and the ids that are of no memory of the user, in order.

        Args:
            write_id, by: see `update`.

        Raises:
            InvalidInput: an id, at its position, is of no memory.
        """
        distinct = self._distinct(ids)
        make = write_id is not None  # the record that there was nothing to delete needs a user
        try:
            with self._users.writing([(tenant, user_id)], make=make) as (connection, locked):
                now = self._micros()  # under the lock: see `append_together`
                user, model_id = locked[tenant, user_id], self.log.model_id
                deleted, missing = deleting.delete_many(
                    connection, user, distinct, model_id=model_id, now=now, write_id=write_id, by=self._actor(by)
                )
        except NotFound:
            return 0, distinct
        if deleted:
            self._background.drop_copies(user.uid, whole=False)
        return deleted, missing

    def delete_where(
        self, tenant: str, user_id: str, filter: Filter, *, write_id: str | None = None, by: str | None = None
    ) -> int:
        """Delete a user's memories that match, in one transaction. Returns their number.

        Args:
            write_id, by: see `update`.

        Raises:
            InvalidInput: the filter is empty (`erase_user` deletes everything) or cannot be used.
        """
        filters.check(filter)
        make = write_id is not None  # the record that there was nothing to delete needs a user
        try:
            with self._users.writing([(tenant, user_id)], make=make) as (connection, locked):
                now = self._micros()  # under the lock: see `append_together`
                user, model_id = locked[tenant, user_id], self.log.model_id
                deleted = deleting.delete_where(
                    connection, user, filter, model_id=model_id, now=now, write_id=write_id, by=self._actor(by)
                )
        except NotFound:
            return 0
        if deleted:
            self._background.drop_copies(user.uid, whole=False)
        return deleted

    def erase_user(
        self, tenant: str, user_id: str, *, write_id: str | None = None, by: str | None = None
    ) -> tuple[int, int]:
        """Delete everything of a user: memories, history, snapshots, cached copies.

        No write that was issued before can restore any of it. Background steps remove it from SQLite's files within a
        minute; PostgreSQL removes it when it vacuums the tables. Events lose the ids of the user and of its memories;
        their times, keys, actions and counts stay. Returns the number of memories that were deleted, and
        the user's version after the erasure.

        Args:
            write_id, by: see `update`.
        """
        rows.check_id(user_id, "user_id")
        with self._users.writing([(tenant, user_id)]) as (connection, locked):
            user = locked[tenant, user_id]
            now = self._micros()  # read under the lock, so that every write before it is older than the erasure
            erased, version = deleting.erase(connection, user, now=now, write_id=write_id, by=self._actor(by))
        self._background.drop_copies(user.uid, whole=True)
        return erased, version

    def import_lines(
        self,
        tenant: str,
        user_id: str,
        lines: Iterable[bytes],
        *,
        first: int = 0,
        begin: bool = True,
        issued_at: datetime | None = None,
        by: str | None = None,
    ) -> Imported:
        """Import NDJSON, as `export` makes it, a few hundred lines or a few MiB of text per transaction.

        Args:
            first: the position of the first line, in errors.
            begin, issued_at, by: see `import_page`.

        Raises:
            InvalidInput, Conflict: see `import_page`. The pages before it are written.
        """
        imported = unchanged = 0
        epoch: int | None = None
        parsed = parse_lines(lines, self._now, first)
        for page in importing.pages(parsed):
            done = self.import_page(tenant, user_id, page, begin=begin, issued_at=issued_at, epoch=epoch, by=by)
            begin, epoch = False, done.epoch
            imported, unchanged = imported + done.imported, unchanged + done.unchanged
        return Imported(imported, unchanged)

    def import_page(
        self,
        tenant: str,
        user_id: str,
        lines: Sequence[ImportLine],
        *,
        begin: bool = True,
        issued_at: datetime | None = None,
        epoch: int | None = None,
        by: str | None = None,
    ) -> Imported:
        """Import parsed lines, at least one, in one transaction.

        A user without memories gets the versions of the export. Otherwise the memories get new versions.

        Args:
            begin: False for lines that continue an import.
            by: see `update`.
            issued_at: see `Append`. With None, memories are imported even if they were erased at any time.
            epoch: for lines that continue an import, the `epoch` of its first page. Without it, an import that takes
                more than an hour is refused if any memory of the user was deleted meanwhile.

        Raises:
            InvalidInput: a line cannot be used. `position` is the line's own.
            Conflict: a line has the id of a memory with other content, or its memory was erased after `issued_at`.
        """
        rows.check_new_id(user_id, "user_id")
        issued_us = None if issued_at is None else rows.micros(issued_at, "issued_at")
        checked = importing.check(lines, self.log.model, self.dim)
        with self._users.writing([(tenant, user_id)]) as (connection, locked):
            user = locked[tenant, user_id]
            if begin:
                importing.begin_import(connection, user, issued_us)
            return importing.import_lines(
                connection,
                user,
                checked,
                model_id=self.log.model_id,
                issued_at=issued_us,
                epoch=epoch,
                now=self._micros(),
                by=self._actor(by),
            )

    # Reads

    def search(self, requests: Sequence[Search]) -> list[SearchResult | StoreError]:
        """Answer all requests from one state of the log, which holds every write that was committed before the call.

        Returns one result per request, in order. If a request cannot be answered, its result is the error, and the
        others are answered.

        Raises:
            LogUnavailable, LogDamaged, ModelMismatch: no request could be answered.
        """
        now = self._micros()
        with self.log.read() as connection:
            uids = self._users.find(connection, [(request.tenant, request.user_id) for request in requests])
            results = self._searcher.search(connection, requests, uids, now)
        self.resident.trim()
        return results

    def get(self, tenant: str, user_id: str, id: str, *, include_vector: bool = False) -> Memory:
        """One memory.

        Raises:
            NotFound: this user has no such memory.
            InvalidInput: no memory can have this id.
        """
        rows.check_id(id, "id")
        with self._reading() as connection:
            uid = self._users.uid(connection, (tenant, user_id))
            row = reading.by_key(connection, rows.user_key(uid, id), self.log.model_id, self._micros())
            if row is None:
                raise NotFound(f"there is no memory {id!r}", "id")
            vector = self._vector(row) if include_vector else None
        return rows.memory(row, user_id, None, vector)

    def get_many(
        self, tenant: str, user_id: str, ids: Sequence[str], *, include_vectors: bool = False
    ) -> tuple[Sequence[Memory], Sequence[str]]:
        """The memories with these ids in their order, each once; and the ids that are of no memory of the user.

        Raises:
            InvalidInput: no memory can have the id at this position; or the memories have more than 16 million
                characters of text and metadata together (`answer_too_large`).
        """
        distinct = self._distinct(ids)
        with self._reading() as connection:
            uid = self._users.find(connection, [(tenant, user_id)]).get((tenant, user_id), 0)
            keys = [rows.user_key(uid, id) for id in distinct]
            found = reading.by_keys(
                connection,
                keys,
                self.log.model_id,
                self._micros(),
                with_vectors=include_vectors,
                for_answer=True,
            )
        memories = [
            rows.memory(row, user_id, None, self._vector(row) if include_vectors else None)
            for row in (found.get(key) for key in keys)
            if row is not None
        ]
        return memories, [id for id, key in zip(distinct, keys, strict=True) if key not in found]

    def list(
        self,
        tenant: str,
        user_id: str,
        *,
        limit: int = 100,
        cursor: str | None = None,
        filter: Filter | None = None,
        order: Order = "-created_at",
    ) -> Page:
        """One page of a user's memories. A user that does not exist has an empty one.

        A page ends early if its texts are long: only `next_cursor` tells whether it is the last.

        Raises:
            InvalidInput: the limit is not from 1 to 1000, the order is unknown, the cursor belongs to another list, or
                the filter cannot be used.
        """
        if filter is not None:
            filters.check(filter)
        of = ("memories", tenant, user_id)
        with self._reading() as connection:
            uid = self._users.find(connection, [(tenant, user_id)]).get((tenant, user_id), 0)
            found, following = listing.page_of_memories(
                connection,
                uid,
                model=self.log.model_id,
                limit=limit,
                cursor=self._cursors.open(cursor, *of),
                filter=filter,
                order=order,
                now=self._micros(),
            )
        return Page([rows.memory(row, user_id) for row in found], self._cursors.seal(following, *of))

    def duplicates(
        self, tenant: str, user_id: str, *, score: float = 0.95, limit: int = 20, cursor: str | None = None
    ) -> DuplicatesPage:
        """Groups of memories that are near duplicates: a memory, and the newer ones that are as similar to it.

        A memory that is that similar to an older one begins no group. The call looks at 200 memories at most, so a page
        may have few groups or none: only `next_cursor` tells whether it is the last. A group has at most 50 memories.

        Args:
            score: the least cosine similarity.
            limit: groups, 1 to 100.

        Raises:
            InvalidInput: the score or the limit is out of range, or the cursor belongs to another list.
            LogDamaged: a memory of the user is not what was written.
        """
        if not isinstance(score, int | float) or not 0 < score <= 1:
            raise InvalidInput("must be a number above 0, and at most 1", "score")
        if not isinstance(limit, int) or not 1 <= limit <= MAX_GROUPS:
            raise InvalidInput(f"must be an integer in 1 to {MAX_GROUPS}", "limit")
        of = ("duplicates", tenant, user_id)
        opened = self._cursors.open(cursor, *of)
        after = 0 if opened is None else listing.decode_cursor(opened, "duplicates", (int,))[0]
        with self._reading() as connection:
            uid = self._users.find(connection, [(tenant, user_id)]).get((tenant, user_id))
            if uid is None:
                return DuplicatesPage([], None)
            position = reading.positions(connection, [uid])[uid]
            groups, last = self._searcher.duplicates(
                connection, position, after, least=score, limit=limit, now=self._micros()
            )
            found = reading.by_label(connection, [label for group in groups for label, _ in group], self.log.model_id)
        if any(row.uid != uid for row in found.values()):
            raise self._searcher.drop_foreign_index(uid)
        self.resident.trim()
        memories = [
            [rows.memory(found[label], user_id, similarity) for label, similarity in group if label in found]
            for group in groups
        ]
        following = None if last is None else listing.encode_cursor("duplicates", [last])
        return DuplicatesPage(memories, self._cursors.seal(following, *of))

    def history(self, tenant: str, user_id: str, id: str) -> Sequence[HistoryEvent]:
        """All states of one memory, oldest first. Raises as `history_page` does."""
        page = self.history_page(tenant, user_id, id, limit=listing.MAX_PAGE)
        events = page.events
        while page.next_cursor is not None:
            page = self.history_page(tenant, user_id, id, limit=listing.MAX_PAGE, cursor=page.next_cursor)
            events += page.events
        return events

    def history_page(
        self, tenant: str, user_id: str, id: str, *, limit: int = 100, cursor: str | None = None
    ) -> HistoryPage:
        """One page of the states of one memory, oldest first.

        Raises:
            NotFound: this user never had such a memory, the user was erased, or the memory has just expired.
            InvalidInput: no memory can have this id, the limit is not from 1 to 1000, or the cursor belongs to another
                list.
        """
        rows.check_id(id, "id")
        of = ("history", tenant, user_id, id)
        after = self._cursors.open(cursor, *of)
        with self._reading() as connection:
            key = rows.user_key(self._users.uid(connection, (tenant, user_id)), id)
            events, following = listing.page_of_states(connection, key, limit=limit, cursor=after, now=self._micros())
        if not events and cursor is None:
            raise NotFound(f"there is no memory {id!r}", "id")
        return HistoryPage(events, self._cursors.seal(following, *of))

    def user(self, tenant: str, user_id: str) -> UserStats:
        """The number of one user's memories, its version and its size; all zero if the user does not exist."""
        with self._reading() as connection:
            uid = self._users.find(connection, [(tenant, user_id)]).get((tenant, user_id))
            if uid is None:
                return UserStats(user_id, 0, 0, 0, None, False)
            found = listing.one_user(connection, uid)
        return self._stats(*found)

    def users(self, tenant: str, *, prefix: str = "", limit: int = 100, cursor: str | None = None) -> UsersPage:
        """One page of the tenant's users that have memories, ordered by user id.

        Raises:
            InvalidInput: the limit is not from 1 to 1000, or the cursor belongs to another list.
        """
        with self._reading() as connection:
            after = self._cursors.open(cursor, "users", tenant)
            found, following = listing.page_of_users(connection, tenant, prefix=prefix, limit=limit, cursor=after)
        return UsersPage([self._stats(*row) for row in found], self._cursors.seal(following, "users", tenant))

    def export(self, tenant: str, user_id: str) -> Iterator[bytes]:
        """NDJSON in the order of versions: one line for each memory, with its vector and history, ending in a newline.

        The log is read page by page. Each memory is exported once. If it changes meanwhile, its state before or after
        the change is exported. Memories that are added meanwhile are left out.

        Raises:
            Conflict: the user was erased meanwhile.
        """
        deduplicator = export.Deduplicator()
        cursor: ExportCursor | None = None
        while True:
            page = self.export_page(tenant, user_id, cursor)
            yield from deduplicator.new_lines(page)
            cursor = page.next_cursor
            if cursor is None:
                return

    def export_page(self, tenant: str, user_id: str, cursor: ExportCursor | None = None) -> ExportPage:
        """Some lines of an export, from the beginning or from a page's `next_cursor`.

        The pages of an export must pass through one `Deduplicator`, which drops memories of earlier pages.

        Raises:
            Conflict: the user was erased since the first page.
        """
        with self._reading() as connection:
            uid = self._users.find(connection, [(tenant, user_id)]).get((tenant, user_id))
            if uid is None:
                return export.EMPTY_PAGE
            position = reading.positions(connection, [uid])[uid]
            if cursor is None:
                cursor = export.begin_export(connection, position)
            if cursor.epoch != position.epoch:
                raise Conflict("the user was erased during its export", "user_id", "erased")
            return export.export_page(
                connection,
                uid,
                cursor,
                model=self.log.model,
                model_id=self.log.model_id,
                dim=self.dim,
                now=self._micros(),
            )

    # The rest

    def background_step(self) -> bool:
        """Do one bounded step of background work. Returns True if there is more to do at once.

        The steps move new rows into graphs, rebuild graphs, save snapshots, delete expired memories, remove erased
        contents from every file, remove old events, and save when keys were used. Call this repeatedly while the store
        is idle, and at least every 10 s.
        """
        self._keys.save_uses()
        return self._background.step(self._micros())

    def ping(self) -> None:
        """Raise LogUnavailable unless the log can be read now."""
        self.log.ping()

    def close(self) -> None:
        """Save the graphs that a restart would have to build, drop the indexes and close the log.

        Closing a second time does nothing.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._background.close()
        finally:
            self.resident.clear()
            self.log.close()

    @staticmethod
    def _distinct(ids: Sequence[str]) -> Sequence[str]:
        """The ids without repetitions, in order, if memories can have them."""
        for position, id in enumerate(ids):
            try:
                rows.check_id(id, "id")
            except InvalidInput as error:
                raise error.at(None, position) from error
        return [*dict.fromkeys(ids)]

    def _actor(self, by: str | None) -> str | None:
        """The key that is named in the events of a write; None if nothing is to be recorded."""
        return by if self._audited else None

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """A read transaction, if the log still serves this store's model.

        Raises:
            ModelMismatch: the log was switched to another model.
        """
        with self.log.read() as connection:
            self.log.require_model(connection)
            yield connection

    def _stats(self, uid: int, user_id: str, live: int, version: int, text_bytes: int) -> UserStats:
        index = self.resident.get(uid)
        size = text_bytes + live * 4 * self.dim
        return UserStats(user_id, live, version, size, index.kind if index else None, index is not None)

    def _vector(self, row: Any) -> Vector:
        """(dim,) float32 of a row of `reading.by_key`."""
        found: Vector = rows.load_vectors([row.embedding], [row.vector_crc], self.dim)[0]
        return found
