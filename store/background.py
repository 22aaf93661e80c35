"""What a store does while nobody waits: fold, rebuild, save, purge what is outdated, and clean up after erasures.

Guarantees: a step takes some milliseconds, but for hnswlib's own write of a large graph (0.1 to 0.3 s at 100,000 rows)
and the emptying of SQLite's write-ahead log, which takes as long as the disk does. While steps are called at least
every 10 s, 60 s after an erasure no file of this store holds what was erased, whichever process erased it.
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
from store.log import reading, receipts, writing
from store.log.database import Log
from store.log.reading import Position
from store.log.users import lock_users, save_users
from store.log.vouching import vouch
from store.searching import Searcher

_SWEEP_US = 15_000_000  # between two looks for what was erased elsewhere
_SWEEP_OWN_US = 5_000_000  # where this store erased something
_PURGE_US = 1_000_000  # between two looks for what has expired
_PURGE = 100  # memories a step
_FORGET_US = 60_000_000  # between two looks for records of writes that are kept no longer
_FORGET = 1000  # records a step
_FREED_BYTES = 16 << 20  # so much is given back to the system
_WAIT_S = 0.005  # for the disk, a step
_SAVE_US = 600_000_000  # between two snapshots of one user
_SAVE_GROWTH = 1.1  # a graph is saved again when it has grown by so much


class Background:
    """The pending work of one store."""

    def __init__(
        self,
        log: Log,
        resident: Resident,
        snapshots: Snapshots | None,
        searcher: Searcher,
    ) -> None:
        self._log = log
        self._resident = resident
        self._snapshots = snapshots
        self._searcher = searcher
        self._unfolded = searcher.changed
        self._unsaved: OrderedDict[int, None] = OrderedDict()
        self._saved_rows: dict[int, int] = {}
        self._saved_at: dict[int, int] = {}
        self._swept_at = self._purged_at = self._forgot_at = 0
        self._removed = False
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshots")  # its thread starts when needed
        self._discarded = False  # what is being saved holds something that was erased meanwhile
        self._saving: tuple[Pending, Future[None]] | None = None

    def removed(self, uid: int, *, whole: bool) -> None:
        """Content of a user was erased by this store: its copies here go, the write-ahead log's within seconds."""
        if whole:
            self._resident.drop(uid)
        self._removed = True
        with suppress(OSError):  # the erasure is committed whatever becomes of the file; the sweep tries again
            self._remove_snapshots(uid)

    def step(self, now: int) -> bool:
        """Do one thing. True where more is waiting. `now` in microseconds.

        Raises:
            LogUnavailable: the log or the folder of snapshots cannot be used at the moment.
        """
        try:
            return self._step(now)
        except OSError as error:
            raise LogUnavailable(f"The folder of snapshots cannot be used: {error}") from error

    def _step(self, now: int) -> bool:
        if not 0 <= now - self._swept_at < (_SWEEP_OWN_US if self._removed else _SWEEP_US):  # clocks are set back, too
            self._swept_at = now
            self._sweep()
            return True
        if not 0 <= now - self._purged_at < _PURGE_US:
            if not self._purge(now):
                self._purged_at = now
            return True
        if not 0 <= now - self._forgot_at < _FORGET_US:
            if not self._forget(now):
                self._forgot_at = now
            return True
        return self._fold() or self._save(now)

    def close(self) -> None:
        """Save the graphs that a restart would have to build again, and empty the write-ahead log.

        Nothing that another store erased before is saved.
        """
        with suppress(OSError, LogUnavailable, LogDamaged):  # a restart builds what cannot be saved
            while self._saving is not None:
                self._save(0)
            if self._snapshots is not None:
                self._sweep()
                for index in self._resident:
                    if self._saved_rows.get(index.uid) != index.live:
                        self._save_now(self._snapshots, index)
        self._disk.shutdown()
        if self._snapshots is not None:
            self._snapshots.close()
        self._log.truncate_wal()

    def _sweep(self) -> None:
        """Whatever holds content that was erased, by whichever process: the write-ahead log, snapshots, indexes."""
        self._removed = self._log.wal_bytes() > 0 and not self._log.truncate_wal()
        names = self._snapshots.names() if self._snapshots is not None else []
        left = self._snapshots.abandoned() if self._snapshots is not None else []
        uids = {name.uid for name in names} | {index.uid for index in self._resident} | {name.uid for _, name in left}
        with self._log.read() as connection:
            standing = reading.positions(connection, uids)
            for index in self._resident:
                position = standing.get(index.uid)
                if position is None or position.epoch != index.epoch or position.model != self._log.model:
                    self._resident.drop(index.uid)
                elif position.removed_version > index.version:
                    try:
                        self._searcher.catch_up(connection, index, position)
                        self._resident.measure(index)
                    except LogDamaged:  # of this user alone, and its next search says so: the others' turn comes
                        self._resident.drop(index.uid)
        if self._snapshots is not None:
            for name in names:
                if _is_stale(name, standing.get(name.uid)):
                    self._remove_snapshots(name.uid)
            for folder, name in left:
                if _is_stale(name, standing.get(name.uid)):
                    self._snapshots.remove_abandoned(folder, name)

    def _remove_snapshots(self, uid: int) -> None:
        if self._snapshots is not None:
            self._snapshots.remove(uid)
            self._saved_rows.pop(uid, None)
            if self._saving is not None and self._saving[0].name.uid == uid:
                self._discarded = True

    def _purge(self, now: int) -> bool:
        """Delete some of the memories whose time is over. True where there may be more."""
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
            self.removed(uid, whole=False)
        return len(due) == _PURGE

    def _forget(self, now: int) -> bool:
        """Remove some records of writes that nobody sends again. True where there may be more."""
        with self._log.read() as connection:
            if not receipts.any_outdated(connection, now):
                return False
        with self._log.write() as connection:
            return receipts.remove_outdated(connection, now, _FORGET) == _FORGET

    def _fold(self) -> bool:
        while self._unfolded:
            uid = next(iter(self._unfolded))
            index = self._resident.get(uid)
            if index is not None:
                try:
                    more = index.maintain()
                except BaseException:
                    self._resident.drop(uid)  # it may hold a part
                    raise
                self._resident.measure(index)
                self._resident.trim()
                if more:
                    self._unfolded.move_to_end(uid)
                    return True
                if self._resident.peak_bytes - self._resident.bytes > _FREED_BYTES:
                    self._resident.peak_bytes = self._resident.bytes
                    _give_memory_back()
                if self._snapshots is not None and index.live >= self._saved_rows.get(uid, 1) * _SAVE_GROWTH:
                    self._unsaved[uid] = None
            del self._unfolded[uid]
        return False

    def _save(self, now: int) -> bool:
        """Write snapshots, one at a time; a thread of its own waits for the disk."""
        if self._snapshots is None:
            return False
        if self._saving is not None:
            pending, written = self._saving
            if wait([written], timeout=_WAIT_S).not_done:
                return True
            self._saving = None
            try:
                written.result()
                if not self._discarded:
                    self._commit(self._snapshots, pending)
                    return True
            except LogUnavailable:
                self._saved_rows.pop(pending.name.uid, None)
                raise
            except (OSError, ValueError) as error:
                self._saved_rows.pop(pending.name.uid, None)
                raise LogUnavailable(f"A snapshot could not be written: {error}") from error
            finally:
                self._snapshots.discard(pending)
            return True
        for uid in list(self._unsaved):
            if 0 <= now - self._saved_at.get(uid, -_SAVE_US) < _SAVE_US:
                continue
            del self._unsaved[uid]
            index = self._resident.get(uid)
            begun = self._snapshots.begin(index) if index is not None else None
            if index is not None and begun is not None:
                self._saved_rows[uid] = index.live
                self._saved_at[uid] = now
                self._discarded = False
                self._saving = begun, self._disk.submit(self._snapshots.finish, begun)
                return True
        return False

    def _save_now(self, snapshots: Snapshots, index: UserIndex) -> None:
        pending = snapshots.begin(index)
        if pending is not None:
            snapshots.finish(pending)
            self._commit(snapshots, pending)

    def _commit(self, snapshots: Snapshots, pending: Pending) -> None:
        """Have the log know a snapshot, then make it the user's."""
        with self._log.write() as connection:
            vouch(connection, pending.name.uid, pending.token)
        snapshots.commit(pending)


def _give_memory_back() -> None:
    """Return what folding freed to the system: glibc keeps large blocks that it has once seen freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _is_stale(name: Name, position: Position | None) -> bool:
    """Whether a snapshot holds what was erased, or what the log does not know: a backup of it was restored."""
    if position is None or position.epoch != name.epoch:
        return True
    return not position.removed_version <= name.version <= position.version
