"""The users of a log: their rows, which number and order their writes, and the numbers (uids) of users by name.

Guarantees: writers to one user are serialised by the lock of its row, and writers to several users take the locks in
one order. The counts and versions that change under the lock are saved in the transaction of the rows that they count
and stamp. Rows of users are never removed, so a uid that was committed once can be remembered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from sqlalchemy import Connection, bindparam, select, update

from store.errors import NotFound
from store.log import quotas
from store.log.database import Log
from store.log.schema import CHUNK, insert_ignore, users
from store.records import Quotas

Name = tuple[str, str]
"""Tenant and user id."""

_MAX_REMEMBERED = 65_536  # uids


@dataclass(slots=True)
class User:
    """A user's row, locked by this transaction. Its versions and counts are changed here, then saved."""

    uid: int
    version: int
    epoch: int
    live: int
    removed_version: int
    erased_at: int
    text_bytes: int
    forgotten_version: int
    tenant: str
    live_before: int  # as in the row
    text_bytes_before: int
    past_bytes: int = 0  # of the past states that this transaction imports; they are in no row

    def stamp(self) -> int:
        """The version of the next row."""
        self.version += 1
        return self.version


# Statements that every write runs are built once: building one takes longer than running it.
_FIND_USERS = select(users.c.uid, users.c.user_id).where(
    users.c.tenant == bindparam("of_tenant"), users.c.user_id.in_(bindparam("ids", expanding=True))
)
_LOCK_USERS = (
    select(
        users.c.uid,
        users.c.version,
        users.c.epoch,
        users.c.live,
        users.c.removed_version,
        users.c.erased_at,
        users.c.text_bytes,
        users.c.forgotten_version,
        users.c.tenant,
    )
    .where(users.c.uid.in_(bindparam("uids", expanding=True)))
    .order_by(users.c.uid)
    .with_for_update()
)


def find_users(connection: Connection, names: Iterable[Name]) -> dict[Name, int]:
    """The uids of those users that have a row, with one statement per tenant."""
    by_tenant: dict[str, list[str]] = {}
    for tenant, user_id in names:
        by_tenant.setdefault(tenant, []).append(user_id)
    found = {}
    for tenant, ids in by_tenant.items():
        for start in range(0, len(ids), CHUNK):
            part = {"of_tenant": tenant, "ids": ids[start : start + CHUNK]}
            found.update({(tenant, row.user_id): row.uid for row in connection.execute(_FIND_USERS, part)})
    return found


def make_users(connection: Connection, names: Iterable[Name]) -> None:
    """Insert rows for those users that have none. The names are sorted, so that two writers cannot deadlock."""
    fresh = {"version": 0, "epoch": 0, "live": 0, "removed_version": 0, "erased_at": 0, "text_bytes": 0}
    insert_ignore(connection, users, [{"tenant": t, "user_id": u, **fresh} for t, u in sorted(set(names))])


def lock_users(connection: Connection, uids: Iterable[int]) -> dict[int, User]:
    """Lock the users' rows until the transaction ends, in the order of their uids."""
    ordered = sorted(set(uids))
    found: dict[int, User] = {}
    for start in range(0, len(ordered), CHUNK):
        rows = connection.execute(_LOCK_USERS, {"uids": ordered[start : start + CHUNK]})
        found.update({row.uid: User(*row, row.live, row.text_bytes) for row in rows})
    return found


_SAVE_USER = (
    update(users)
    .where(users.c.uid == bindparam("of_uid"))
    .values({c: bindparam(c.name) for c in (users.c.version, users.c.epoch, users.c.live)})
    .values({c: bindparam(c.name) for c in (users.c.removed_version, users.c.erased_at)})
    .values({c: bindparam(c.name) for c in (users.c.text_bytes, users.c.forgotten_version)})
)


def save_users(connection: Connection, changed: Sequence[User]) -> None:
    """Write the versions and counts of users back to their rows, and change the sizes of their tenants by as much."""
    if changed:
        rows = [
            {
                "of_uid": u.uid,
                "version": u.version,
                "epoch": u.epoch,
                "live": u.live,
                "removed_version": u.removed_version,
                "erased_at": u.erased_at,
                "text_bytes": u.text_bytes,
                "forgotten_version": u.forgotten_version,
            }
            for u in changed
        ]
        connection.execute(_SAVE_USER, rows)
        quotas.save(connection, quotas.growth(changed))


class Users:
    """The users of one store's log. Remembers the uids of the users that were used last.

    Args:
        limits: how much each tenant may hold.
        dim: of the vectors, which are a part of it.
    """

    def __init__(self, log: Log, limits: Quotas, dim: int) -> None:
        self._log = log
        self._limits = limits
        self._dim = dim
        self._uids: OrderedDict[Name, int] = OrderedDict()

    @contextmanager
    def writing(
        self, names: Sequence[Name], *, make: bool = True, of_many: bool = False
    ) -> Iterator[tuple[Connection, dict[Name, User]]]:
        """A write transaction in which the rows of the users are locked. They are saved at its end.

        Args:
            of_many: whether several callers write, each of which is refused alone. They must ask `room` themselves.

        Raises:
            NotFound: a user has no row, and `make` is false.
            QuotaExceeded: at its end: a tenant would hold more than it may. Nothing was written.
        """
        with self._log.write() as connection:
            self._log.lock_model(connection)
            locked = self._lock(connection, names, make)
            before = {name: replace(user) for name, user in locked.items()}
            yield connection, locked
            if self._limits.any() and not of_many:
                self.room(connection, names).take(quotas.growth(locked.values(), with_past=True))
            save_users(connection, [user for name, user in locked.items() if user != before[name]])
        self._remember({name: user.uid for name, user in locked.items()})

    def room(self, connection: Connection, names: Sequence[Name]) -> quotas.Room:
        """What the tenants of these users may still add."""
        return quotas.Room(connection, self._limits, {tenant for tenant, _ in names}, self._dim)

    def find(self, connection: Connection, names: Iterable[Name]) -> dict[Name, int]:
        """The uids of those users that have a row."""
        wanted = list(dict.fromkeys(names))
        found = {name: self._uids[name] for name in wanted if name in self._uids}
        if len(found) < len(wanted):
            fresh = find_users(connection, [name for name in wanted if name not in found])
            self._remember(fresh)
            found |= fresh
        return found

    def uid(self, connection: Connection, name: Name) -> int:
        """The uid of one user.

        Raises:
            NotFound: the user has no row.
        """
        uid = self.find(connection, [name]).get(name)
        if uid is None:
            raise NotFound(f"there is no user {name[1]!r}", "user_id")
        return uid

    def _lock(self, connection: Connection, names: Sequence[Name], make: bool) -> dict[Name, User]:
        wanted = list(dict.fromkeys(names))
        uids = {name: self._uids[name] for name in wanted if name in self._uids}
        unknown = [name for name in wanted if name not in uids]
        if unknown:
            if make:
                make_users(connection, unknown)
            uids |= find_users(connection, unknown)  # not remembered yet: new rows may be rolled back
        for name in wanted:
            if name not in uids:
                raise NotFound(f"there is no user {name[1]!r}", "user_id")
        locked = lock_users(connection, uids.values())
        return {name: locked[uids[name]] for name in wanted}

    def _remember(self, uids: dict[Name, int]) -> None:
        """Remember the uids of users whose rows are committed."""
        self._uids.update(uids)
        while len(self._uids) > _MAX_REMEMBERED:
            self._uids.popitem(last=False)
