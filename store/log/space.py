"""The space of erased rows and of tombstones, which is given back in small steps while stores serve the log.

Guarantees: once the steps return False, tombstones older than an hour are gone. On SQLite blank rows then take at most
a quarter of the pages in use, and free pages at most an eighth of the file, or 1 MiB if that is more. So the file has
at most 1.6 times the size that the live rows need, and a few megabytes. Each step is one transaction of some
milliseconds. An interrupted step leaves no trace, and any process may take the next one.

On SQLite the rows of `contents` are treated as a circular log. A step takes rows from the beginning of the table,
copies those that are still written to the end, and removes the blank rows that remain. The pages that this frees are
used again, and the file is cut off behind its last page in use. A log that memserve 0.1 made keeps its free pages
for later rows until `compact` has rewritten its file once.

Rows are never removed close to a row that is not blank. When SQLite removes a row it may move the rows of the same page
and of the next two pages, and leaves copies behind. Therefore some pages of blank rows always stay at the beginning.
"""

from __future__ import annotations

from sqlalchemy import Connection, delete, func, select

from store.log.database import Log
from store.log.erasing import BLANK_SPACE, count_erased, erased_bytes, replace
from store.log.schema import contents, history, memories
from store.log.threads import erase_unused_names
from store.log.users import lock_users, save_users

TOMBSTONES_US = 3_600_000_000  # how long a tombstone is kept; then only the user remembers the deletion
_TOMBSTONES = 50  # a step
_SPARE_BYTES = 1 << 20  # blank or free space that is not worth a step
_MOVED = 64  # rows a step
_MOVED_BYTES = 128 << 10
_REMOVED_BYTES = 256 << 10  # of blank rows, a step
_GUARD_PAGES = 4  # at least three whole pages, whatever the first and the last of them hold besides
_CUT_PAGES = 64  # a step

_ROWS = select(
    contents.c.cid,
    contents.c.blank,
    func.length(contents.c.text) + func.length(contents.c.embedding) + 10,  # at most the size of the row
    BLANK_SPACE,
).order_by(contents.c.cid)


class Space:
    """Gives the space of one log back. Several processes may do it at a time."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._nothing_at = (0, 0)  # the erased bytes, and how many are enough, when there was nothing to move or remove

    def step(self, now: int) -> bool:
        """Do one step of work. Returns True if there is more to do.

        Raises:
            LogUnavailable: another process holds a lock.
        """
        log = self._log
        if remove_tombstones(log, now):
            return True
        if log.path is None:
            return False
        pages = log.pages()
        with log.read() as connection:
            erased = erased_bytes(connection)
        enough = max((pages.total - pages.free) * pages.size // 4, _SPARE_BYTES)
        if erased > enough and not self._had_nothing(erased, enough):
            with log.write() as connection:
                if _move_the_beginning(connection, pages.size, enough):
                    return True
            self._nothing_at = erased, enough
        if pages.can_be_cut and pages.free > max(pages.total // 8, _SPARE_BYTES // pages.size):
            log.cut_free_pages(_CUT_PAGES)
            return True
        return False

    def _had_nothing(self, erased: int, enough: int) -> bool:
        """Whether the last look found nothing to do and no row was erased since. A look reads whole rows."""
        return erased <= self._nothing_at[0] and enough >= self._nothing_at[1]


def remove_tombstones(log: Log, now: int) -> int:
    """Remove some tombstones that are older than an hour. Returns their number.

    The user keeps the time of the newest deletion that was removed, so that an older write is still refused, and its
    version, so that an index that may still hold the memory is dropped.
    """
    due = memories.c.deleted == 1, memories.c.updated_at < now - TOMBSTONES_US
    with log.read() as connection:
        uids = connection.execute(select(memories.c.uid).where(*due).limit(_TOMBSTONES)).scalars().all()
    if not uids:
        return 0
    with log.write() as connection:
        users = lock_users(connection, uids)
        statement = select(
            memories.c.label, memories.c.uid, memories.c.version, memories.c.updated_at, memories.c.thread
        )
        found = connection.execute(statement.where(*due, memories.c.uid.in_(users)).limit(_TOMBSTONES)).all()
        for _, uid, version, deleted_at, thread in found:
            if thread is not None:  # a program of an older schema deleted the memory
                erase_unused_names(connection, uid, [thread])
            user = users[uid]
            user.erased_at = max(user.erased_at, deleted_at)
            user.forgotten_version = max(user.forgotten_version, version)
        labels = [row.label for row in found]
        connection.execute(delete(history).where(history.c.label.in_(labels)))
        connection.execute(delete(memories).where(memories.c.label.in_(labels)))
        save_users(connection, list(users.values()))
    return len(found)


def _move_the_beginning(connection: Connection, page_size: int, enough: int) -> bool:
    """Copy the first written rows to the end, and remove blank rows. Returns False if there was nothing to do.

    No row is copied if the blank rows behind the first written one take `enough` bytes at most. Copying only makes that
    space smaller, so the steps come to an end.
    """
    behind = erased_bytes(connection)
    guard_bytes = _GUARD_PAGES * page_size
    smallest_part = (page_size - 12) * 32 // 255 - 23  # of a row that continues on overflow pages, on its own page
    seen: list[tuple[int, int, int]] = []  # cid, least number of bytes on its page, space
    moved: list[int] = []
    moved_bytes = kept_bytes = removed_bytes = removed = 0  # kept_bytes: on their pages, of the rows after the removed
    rows = connection.execute(_ROWS)
    for cid, blank, length, space in rows:
        if blank:
            behind -= space
        else:
            if behind <= enough or len(moved) == _MOVED or moved_bytes > _MOVED_BYTES:
                break
            moved.append(cid)
            moved_bytes += space
        seen.append((cid, min(length, smallest_part), space))
        kept_bytes += seen[-1][1]
        while kept_bytes - seen[removed][1] >= guard_bytes:
            kept_bytes -= seen[removed][1]
            removed_bytes += seen[removed][2]
            removed += 1
        if removed_bytes > _REMOVED_BYTES:
            break
    rows.close()
    if moved:
        replace(connection, moved, with_vectors=True)
    if removed:
        connection.execute(delete(contents).where(contents.c.cid <= seen[removed - 1][0]))
        count_erased(connection, -removed_bytes)
    return bool(moved or removed)
