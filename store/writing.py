"""Every change of the log, in statements whose number does not grow with users or requests.

Guarantees: a row and the version that stamps it are written in one transaction, under the lock of the user's row; each
row of a user has a version of its own, and the user's version is the newest of them. So a reader that knows version v
asks for `version > v` and gets exactly what it lacks.

All functions run inside a caller's write transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import BigInteger, Connection, Table, bindparam, delete, func, insert, literal, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from store.errors import Conflict, StoreError
from store.records import Appended, AppendResult
from store.rows import Checked, content_hash, user_key
from store.schema import history, memories, reembedded, users

CHUNK = 5000  # look-ups and changes a statement: below every driver's limit of parameters


@dataclass(slots=True)
class User:
    """A user's row, locked by this transaction."""

    uid: int
    version: int
    epoch: int
    live: int
    removed_version: int
    erased_at: int

    def stamp(self) -> int:
        """The version of the next row."""
        self.version += 1
        return self.version


@dataclass(frozen=True, slots=True)
class _State:
    """What an append needs to know of the memory that has an id, before it or after an earlier request of its batch."""

    id: str
    version: int
    digest: bytes
    expires_at: int | None
    deleted_at: int | None


@dataclass(slots=True)
class _Wave:
    """Changes that touch each memory at most once, and so can be written in any order."""

    touched: set[bytes] = field(default_factory=set)
    added: list[dict[str, Any]] = field(default_factory=list)
    changed: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CheckedAppend:
    """An Append whose memories have the form of rows."""

    user: tuple[str, str]
    memories: list[Checked]
    skip_duplicates: bool
    upsert: bool
    issued_at: int


def insert_ignore(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    """Insert rows, leaving those that are there already."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    connection.execute(dialect.insert(table).on_conflict_do_nothing(), rows)


def find_users(connection: Connection, names: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """The uids of those users that have a row: one statement a tenant."""
    by_tenant: dict[str, list[str]] = {}
    for tenant, user_id in names:
        by_tenant.setdefault(tenant, []).append(user_id)
    found = {}
    for tenant, ids in by_tenant.items():
        for start in range(0, len(ids), CHUNK):
            statement = select(users.c.uid, users.c.user_id).where(
                users.c.tenant == tenant, users.c.user_id.in_(ids[start : start + CHUNK])
            )
            found.update({(tenant, row.user_id): row.uid for row in connection.execute(statement)})
    return found


def make_users(connection: Connection, names: Iterable[tuple[str, str]]) -> None:
    """Make sure that the users have a row. Sorted, so that two writers never wait for each other in a ring."""
    fresh = {"version": 0, "epoch": 0, "live": 0, "removed_version": 0, "erased_at": 0}
    insert_ignore(connection, users, [{"tenant": t, "user_id": u, **fresh} for t, u in sorted(set(names))])


def lock_users(connection: Connection, uids: Iterable[int]) -> dict[int, User]:
    """Lock the users' rows, in the order of their uids, until the transaction ends."""
    ordered = sorted(set(uids))
    found: dict[int, User] = {}
    for start in range(0, len(ordered), CHUNK):
        statement = (
            select(
                users.c.uid, users.c.version, users.c.epoch, users.c.live, users.c.removed_version, users.c.erased_at
            )
            .where(users.c.uid.in_(ordered[start : start + CHUNK]))
            .order_by(users.c.uid)
            .with_for_update()
        )
        found.update({row.uid: User(*row) for row in connection.execute(statement)})
    return found


_SAVE_USER = (
    update(users)
    .where(users.c.uid == bindparam("of_uid"))
    .values({c: bindparam(c.name) for c in (users.c.version, users.c.epoch, users.c.live)})
    .values(removed_version=bindparam("removed_version"), erased_at=bindparam("erased_at"))
)


def save_users(connection: Connection, changed: Sequence[User]) -> None:
    """Write back what stamping and counting changed."""
    if changed:
        rows = [
            {
                "of_uid": u.uid,
                "version": u.version,
                "epoch": u.epoch,
                "live": u.live,
                "removed_version": u.removed_version,
                "erased_at": u.erased_at,
            }
            for u in changed
        ]
        connection.execute(_SAVE_USER, rows)


_KEEP_STATE = insert(history).from_select(
    ["label", "version", "uid", "event", "at", "text", "metadata"],
    select(
        memories.c.label,
        memories.c.version,
        memories.c.uid,
        memories.c.event,
        memories.c.updated_at,
        memories.c.text,
        memories.c.metadata,
    ).where(memories.c.key == bindparam("of_key")),
)
_CHANGED = (
    "version",
    "event",
    "updated_at",
    "expires_at",
    "deleted",
    "content_hash",
    "model",
    "vector_crc",
    "text",
    "metadata",
    "embedding",
)
_CHANGE = (
    update(memories)
    .where(memories.c.key == bindparam("of_key"))
    .values({memories.c[name]: bindparam(name) for name in _CHANGED})
    .values(created_at=func.coalesce(bindparam("born_at", type_=BigInteger), memories.c.created_at))
)
_BURY = (
    update(memories)
    .where(memories.c.key == bindparam("of_key"))
    .values(
        version=bindparam("version"),
        updated_at=bindparam("updated_at"),
        event="deleted",
        deleted=1,
        expires_at=None,
        content_hash=literal(b""),
        vector_crc=0,
        text="",
        metadata="{}",
        embedding=literal(b""),
    )
)
_FORGET_HISTORY = (
    update(history)
    .where(
        history.c.label == select(memories.c.label).where(memories.c.key == bindparam("of_key")).scalar_subquery(),
    )
    .values(text=None, metadata=None)
)
_FORGET_VECTOR = delete(reembedded).where(
    reembedded.c.label == select(memories.c.label).where(memories.c.key == bindparam("of_key")).scalar_subquery()
)


def row_of(memory: Checked, digest: bytes, model: str) -> dict[str, Any]:
    """The columns that hold a memory's content."""
    return {
        "expires_at": memory.expires_at,
        "deleted": 0,
        "content_hash": digest,
        "model": model,
        "vector_crc": memory.vector_crc,
        "text": memory.text,
        "metadata": memory.metadata,
        "embedding": memory.embedding,
    }


def write_changes(connection: Connection, rows: list[dict[str, Any]]) -> None:
    """Give memories that exist a new state, keeping the old one in the history. Each key at most once."""
    if rows:
        keys = [{"of_key": row["of_key"]} for row in rows]
        connection.execute(_KEEP_STATE, keys)
        connection.execute(_CHANGE, rows)


def bury(connection: Connection, user: User, keys: Sequence[bytes], now: int) -> None:
    """Delete live memories of one user: their content, their history's and every vector; a tombstone stays."""
    for start in range(0, len(keys), CHUNK):
        part = [{"of_key": key} for key in keys[start : start + CHUNK]]
        connection.execute(_KEEP_STATE, part)
        connection.execute(_FORGET_HISTORY, part)
        connection.execute(_FORGET_VECTOR, part)
        connection.execute(_BURY, [{**row, "version": user.stamp(), "updated_at": now} for row in part])
    user.live -= len(keys)
    user.removed_version = user.version


def erase(connection: Connection, user: User, now: int) -> int:
    """Delete everything of a user but its row. Returns how many live memories there were."""
    for table in (history, reembedded, memories):
        connection.execute(delete(table).where(table.c.uid == user.uid))
    erased, user.live = user.live, 0
    user.removed_version = user.stamp()
    user.epoch += 1
    user.erased_at = now
    return erased


def append(
    connection: Connection,
    requests: Sequence[CheckedAppend],
    locked: dict[tuple[str, str], User],
    model: str,
    now: int,
) -> list[AppendResult | StoreError]:
    """Write the requests' memories in order; one whose memory conflicts is left out whole.

    Args:
        locked: the requests' users, whose versions and counts are advanced.
    """
    batch = _Batch(model, now, _known(connection, requests, locked, now))
    results = [batch.plan(request, locked[request.user]) for request in requests]
    for wave in batch.waves:
        if wave.added:
            connection.execute(insert(memories), wave.added)
        write_changes(connection, wave.changed)
    return results


def _known(
    connection: Connection, requests: Sequence[CheckedAppend], locked: dict[tuple[str, str], User], now: int
) -> dict[bytes, _State]:
    """What the log holds under the requests' keys and, where duplicates are to be skipped, content hashes.

    A memory that has expired but is not purged yet is deleted on the way.
    """
    keys: set[bytes] = set()
    hashes: set[bytes] = set()
    for request in requests:
        uid = locked[request.user].uid
        keys.update(user_key(uid, memory.id) for memory in request.memories)
        if request.skip_duplicates:
            hashes.update(content_hash(uid, memory.text, memory.canonical) for memory in request.memories)
    by_uid = {user.uid: user for user in locked.values()}
    known: dict[bytes, _State] = {}
    for column, wanted in ((memories.c.key, list(keys)), (memories.c.content_hash, list(hashes))):
        for start in range(0, len(wanted), CHUNK):
            statement = select(
                column.label("found"),
                memories.c.key,
                memories.c.uid,
                memories.c.id,
                memories.c.version,
                memories.c.content_hash,
                memories.c.expires_at,
                memories.c.deleted,
                memories.c.updated_at,
            ).where(column.in_(wanted[start : start + CHUNK]))
            for found, key, uid, id, version, digest, expires_at, deleted, at in connection.execute(statement).all():
                if not deleted and expires_at is not None and expires_at <= now:
                    bury(connection, by_uid[uid], [key], now)
                    if column is memories.c.key:
                        known[found] = _State(id, by_uid[uid].version, b"", None, expires_at)
                elif column is memories.c.key or found not in known or version < known[found].version:
                    known[found] = _State(id, version, digest, expires_at, at if deleted else None)
    return known


class _Batch:
    """The changes of one transaction, as its requests add them: each request sees those before it."""

    def __init__(self, model: str, now: int, known: dict[bytes, _State]) -> None:
        self.waves = [_Wave()]
        self._model = model
        self._now = now
        self._known = known  # by key, and by content hash

    def plan(self, request: CheckedAppend, user: User) -> AppendResult | StoreError:
        """Add one request's rows, all or none, and advance its user."""
        version, live = user.version, user.live
        fresh: dict[bytes, _State] = {}
        planned: list[tuple[bytes, dict[str, Any], bool]] = []
        try:
            if request.issued_at <= user.erased_at:
                raise Conflict("The user was erased after this write was sent.", "issued_at", "erased")
            appended = [self._plan_one(n, request, user, fresh, planned) for n in range(len(request.memories))]
        except Conflict as conflict:
            user.version, user.live = version, live
            return conflict
        self._known.update(fresh)
        for key, row, exists in planned:
            if key in self.waves[-1].touched:
                self.waves.append(_Wave())
            wave = self.waves[-1]
            wave.touched.add(key)
            (wave.changed if exists else wave.added).append(row)
        return AppendResult(appended, user.version)

    def _plan_one(
        self,
        number: int,
        request: CheckedAppend,
        user: User,
        fresh: dict[bytes, _State],
        planned: list[tuple[bytes, dict[str, Any], bool]],
    ) -> Appended:
        """What becomes of one memory; its row goes to `planned`, its state to `fresh`."""
        memory, param = request.memories[number], f"memories.{number}.id"
        key = user_key(user.uid, memory.id)
        digest = content_hash(user.uid, memory.text, memory.canonical)
        if key in fresh:
            raise Conflict(f"The request holds the id {memory.id!r} twice.", param, "duplicate_id")
        state = self._known.get(key)
        live = state is not None and state.deleted_at is None
        if state is not None and state.deleted_at is None:
            if (state.digest, state.expires_at) == (digest, memory.expires_at):
                return Appended(memory.id, "unchanged", state.version)
            if not request.upsert:
                raise Conflict(f"The id {memory.id!r} has other content.", param, "id_conflict")
        elif state is not None and state.deleted_at is not None and request.issued_at <= state.deleted_at:
            raise Conflict(f"The memory {memory.id!r} was deleted after this write was sent.", param, "deleted")
        if request.skip_duplicates and not live:
            twin = fresh.get(digest) or self._known.get(digest)
            if twin is not None and self._holds(user_key(user.uid, twin.id), digest, fresh):
                return Appended(twin.id, "unchanged", twin.version)
        stamp = {"version": user.stamp(), "event": "updated" if live else "added", "updated_at": self._now}
        row = row_of(memory, digest, self._model) | stamp
        if state is None:
            row |= {"uid": user.uid, "key": key, "id": memory.id, "created_at": self._now}
        else:
            row |= {"of_key": key, "born_at": None if live else self._now}
        planned.append((key, row, state is not None))
        user.live += not live
        fresh[key] = fresh[digest] = _State(memory.id, user.version, digest, memory.expires_at, None)
        return Appended(memory.id, "updated" if live else "added", user.version)

    def _holds(self, key: bytes, digest: bytes, fresh: dict[bytes, _State]) -> bool:
        """Whether that memory still has that content, after the earlier changes of this transaction."""
        state = fresh.get(key) or self._known.get(key)
        return state is None or (state.digest == digest and state.deleted_at is None)


def or_never(column: Any, now: int) -> Any:
    """Condition: the time in `column` is not over, or there is none."""
    return or_(column.is_(None), column > now)
