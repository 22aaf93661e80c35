"""The background work of a store: maintain indexes, save snapshots, remove what has outlived its time or was erased.

Guarantees: a step takes a few milliseconds, except for hnswlib's own write of a large graph (0.1 to 0.3 s at 100,000
rows) and for emptying SQLite's write-ahead log, which takes as long as the disk does. If steps are called at least
every 10 s, no file of this store holds erased contents 60 s after the erasure, whichever process erased them.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

from store.errors import LogDamaged, LogUnavailable
from store.index.resident import Resident
from store.index.snapshots import Name, Pending, Snapshots
from store.index.user_index import UserIndex
from store.log import audit, reading, receipts, writing
from store.log.database import Log
from store.log.reading import Position
from store.log.space import Space
from store.log.users import lock_users, save_users
from store.log.vouching import vouch
from store.searching import Searcher

_SWEEP_US = 15_000_000  # between two searches for copies of contents that were erased by any process
_SWEEP_OWN_US = 5_000_000  # the same after an erasure by this store
_PURGE_US = 1_000_000  # between two searches for expired memories
_PURGE = 100  # memories a step
_RECEIPTS_US = 60_000_000  # between two searches for outdated receipts
_RECEIPTS = 1000  # receipts a step
_EVENTS_US = 60_000_000  # between two searches for outdated events
_FREE_US = 1_000_000  # between two searches for space of erased rows
_FREED_BYTES = 16 << 20  # freed memory is returned to the system in such amounts
_WAIT_S = 0.005  # wait for the disk in one step
_SAVE_US = 600_000_000  # between two snapshots of one user
_SAVE_GROWTH = 1.1  # a graph is saved again when it has grown by this factor


class Background:
    """The background work of one store that is yet to be done."""

    def __init__(
        self,
        log: Log,
        resident: Resident,
        snapshots: Snapshots | None,
        searcher: Searcher,
        audit_days: int,
    ) -> None:
        self._log = log
        self._audit_days = audit_days
        self._resident = resident
        self._snapshots = snapshots
        self._searcher = searcher
        self._changed = searcher.changed
        self._unsaved: OrderedDict[int, None] = OrderedDict()
        self._saved_rows: dict[int, int] = {}
        self._saved_at: dict[int, int] = {}
        self._swept_at = self._purged_at = self._receipts_removed_at = self._events_removed_at = self._freed_at = 0
        self._space = Space(log)
        self._has_erased = False
        self._index_first = False  # in this step
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshots")  # the thread starts on first use
        self._discarded = False  # the snapshot that is being saved holds contents that were erased meanwhile
        self._saving: tuple[Pending, Future[None]] | None = None

    def drop_copies(self, uid: int, *, whole: bool) -> None:
        """Drop this store's copies of contents that it has erased; the write-ahead log is emptied within seconds.

        Args:
            uid: the user whose contents were erased.
            whole: everything of the user was erased.
        """
        if whole:
            self._resident.drop(uid)
        self._has_erased = True
        with suppress(OSError):  # the erasure is committed anyway, and the next sweep tries again
            self._remove_snapshots(uid)

    def step(self, now: int) -> bool:
        """Do one step of work. Returns True if there is more to do at once. `now` is in microseconds.

        Raises:
            LogUnavailable: the log or the folder of snapshots cannot be used at the moment.
        """
        try:
            return self._step(now)
        except OSError as error:
            raise LogUnavailable(f"The folder of snapshots cannot be used: {error}") from error

    def _step(self, now: int) -> bool:
        if (
            not 0 <= now - self._swept_at < (_SWEEP_OWN_US if self._has_erased else _SWEEP_US)
        ):  # a clock may be set back
            self._swept_at = now
            self._sweep()
            return True
        self._index_first = not self._index_first  # neither of the two may wait until the other has nothing left to do
        if self._index_first:
            return self._maintain_index() or self._save(now) or self._keep_log(now)
        return self._keep_log(now) or self._maintain_index() or self._save(now)

    def _keep_log(self, now: int) -> bool:
        """Remove from the log what has outlived its time, if a search for it is due. Returns True if it did one."""
        if not 0 <= now - self._purged_at < _PURGE_US:
            if not self._purge(now):
                self._purged_at = now
            return True
        if not 0 <= now - self._receipts_removed_at < _RECEIPTS_US:
            if not self._remove_receipts(now):
                self._receipts_removed_at = now
            return True
        if not 0 <= now - self._events_removed_at < _EVENTS_US:
            if not audit.remove_outdated(self._log, now, self._audit_days):
                self._events_removed_at = now
            return True
        if not 0 <= now - self._freed_at < _FREE_US:
            if not self._space.step(now):
                self._freed_at = now
            return True
        return False

    def close(self) -> None:
        """Save the graphs that a restart would have to build again, and empty the write-ahead log.

        Nothing that another store erased before is saved.
        """
        with suppress(OSError, LogUnavailable, LogDamaged):  # a restart builds the graphs that cannot be saved
            while self._saving is not None:
                self._save(0)
            if self._snapshots is not None:
                self._sweep()
                for index in self._resident:
                    if self._saved_rows.get(index.uid) != index.live or self._snapshots.lacks_words(index):
                        self._save_now(self._snapshots, index)
        self._disk.shutdown()
        if self._snapshots is not None:
            self._snapshots.close()
        self._log.truncate_wal()

    def _sweep(self) -> None:
        """Remove erased contents, whichever process erased them, from the write-ahead log, snapshots and indexes."""
        self._has_erased = self._log.wal_bytes() > 0 and not self._log.truncate_wal()
        names = self._snapshots.names() if self._snapshots is not None else []
        abandoned = self._snapshots.abandoned() if self._snapshots is not None else []
        uids = (
            {name.uid for name in names} | {index.uid for index in self._resident} | {name.uid for _, name in abandoned}
        )
        with self._log.read() as connection:
            positions = reading.positions(connection, uids)
            for index in self._resident:
                position = positions.get(index.uid)
                if (
                    position is None
                    or position.model != self._log.model
                    or not position.reaches(index.epoch, index.version)
                ):
                    self._resident.drop(index.uid)
                elif position.removed_version > index.version:
                    try:
                        self._searcher.catch_up(connection, index, position)
                        self._resident.measure(index)
                    except LogDamaged:  # its next search reports it; the other indexes are not affected
                        self._resident.drop(index.uid)
        if self._snapshots is not None:
            for name in names:
                if _is_stale(name, positions.get(name.uid)):
                    self._remove_snapshots(name.uid)
            for folder, name in abandoned:
                if _is_stale(name, positions.get(name.uid)):
                    self._snapshots.remove_abandoned(folder, name)

    def _remove_snapshots(self, uid: int) -> None:
        if self._snapshots is not None:
            self._snapshots.remove(uid)
            self._saved_rows.pop(uid, None)
            if self._saving is not None and self._saving[0].name.uid == uid:
                self._discarded = True

    def _purge(self, now: int) -> bool:
        """Delete some expired memories. Returns True if there may be more."""
        with self._log.read() as connection:
            due = reading.expired(connection, now, _PURGE)
        if not due:
            return False
        with self._log.write() as connection:
            self._log.lock_model(connection)
            locked = lock_users(connection, [uid for uid, _ in due])
            still = set(reading.expired(connection, now, _PURGE))
            for uid, user in locked.items():
                keys = [key for owner, key in due if owner == uid and (owner, key) in still]
                if keys:
                    writing.delete_memories(connection, user, keys, now)
            save_users(connection, list(locked.values()))
        for uid in locked:
            self.drop_copies(uid, whole=False)
        return len(due) == _PURGE

    def _remove_receipts(self, now: int) -> bool:
        """Remove some outdated receipts. Returns True if there may be more."""
        with self._log.read() as connection:
            if not receipts.any_outdated(connection, now):
                return False
        with self._log.write() as connection:
            return receipts.remove_outdated(connection, now, _RECEIPTS) == _RECEIPTS

    def _maintain_index(self) -> bool:
        """Do one step of maintenance of the index that has waited longest. Returns True if there is more to do."""
        while self._changed:
            uid = next(iter(self._changed))
            index = self._resident.get(uid)
            if index is not None:
                try:
                    more = index.maintain()
                except BaseException:
                    self._resident.drop(uid)  # the step may have been done in part
                    raise
                self._resident.measure(index)
                self._resident.trim()
                if more:
                    self._changed.move_to_end(uid)
                    return True
                if self._resident.peak_bytes - self._resident.bytes > _FREED_BYTES:
                    self._resident.peak_bytes = self._resident.bytes
                    _return_freed_memory()
                if self._snapshots is not None and (
                    index.live >= self._saved_rows.get(uid, 1) * _SAVE_GROWTH or self._snapshots.lacks_words(index)
                ):
                    self._unsaved[uid] = None
            del self._changed[uid]
        return False

    def _save(self, now: int) -> bool:
        """Save snapshots, one at a time. Another thread waits for the disk. Returns True if there is more to do."""
        if self._snapshots is None:
            return False
        if self._saving is None:
            return self._begin_saving(self._snapshots, now)
        pending, written = self._saving
        if not wait([written], timeout=_WAIT_S).not_done:
            self._saving = None
            self._finish_saving(self._snapshots, pending, written)
        return True

    def _begin_saving(self, snapshots: Snapshots, now: int) -> bool:
        """Write the graph of one index that is due. Returns False if there is none."""
        for uid in list(self._unsaved):
            if 0 <= now - self._saved_at.get(uid, -_SAVE_US) < _SAVE_US:
                continue
            del self._unsaved[uid]
            index = self._resident.get(uid)
            pending = snapshots.begin(index) if index is not None else None
            if index is not None and pending is not None:
                self._saved_rows[uid] = index.live
                self._saved_at[uid] = now
                self._discarded = False
                self._saving = pending, self._disk.submit(snapshots.finish, pending)
                return True
        return False

    def _finish_saving(self, snapshots: Snapshots, pending: Pending, written: Future[None]) -> None:
        """Commit a snapshot that was written, unless contents that it holds were erased meanwhile."""
        try:
            written.result()
            if not self._discarded:
                self._commit(snapshots, pending)
        except LogUnavailable:
            self._saved_rows.pop(pending.name.uid, None)
            raise
        except (OSError, ValueError) as error:
            self._saved_rows.pop(pending.name.uid, None)
            raise LogUnavailable(f"A snapshot could not be written: {error}") from error
        finally:
            snapshots.discard(pending)

    def _save_now(self, snapshots: Snapshots, index: UserIndex) -> None:
        pending = snapshots.begin(index)
        if pending is not None:
            snapshots.finish(pending)
            self._commit(snapshots, pending)

    def _commit(self, snapshots: Snapshots, pending: Pending) -> None:
        """Add a snapshot's token to the log, then give the snapshot to the user."""
        with self._log.write() as connection:
            vouch(connection, pending.name.uid, pending.token)
        snapshots.commit(pending)


def _return_freed_memory() -> None:
    """Return freed memory to the system. glibc keeps large blocks once it has seen one freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _is_stale(name: Name, position: Position | None) -> bool:
    """Whether a snapshot holds erased contents, or rows that the log lacks since a backup of it was restored."""
    if position is None or position.epoch != name.epoch:
        return True
    return not position.removed_version <= name.version <= position.version
