"""Appends of many callers as one set of changes: planned in memory, then written in statements for all of them.

Guarantees: a call's memories are written all, or none of them; a later call of the batch sees what the earlier ones
wrote. How many statements there are does not grow with calls, users or memories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select

from store.errors import Conflict, StoreError
from store.records import Appended, AppendResult
from store.rows import Checked, content_hash, user_key
from store.schema import memories
from store.writing import CHUNK, User, bury, content_of, write_changes, write_contents


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
    contents: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class _Plan:
    """What one call would change: states by key, ids by content hash, and (key, row, row of `contents`)."""

    known: dict[bytes, _State] = field(default_factory=dict)
    twins: dict[bytes, list[str]] = field(default_factory=dict)
    rows: list[tuple[bytes, dict[str, Any], dict[str, Any]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CheckedAppend:
    """An Append whose memories have the form of rows; `first` of its call's memories came before them."""

    user: tuple[str, str]
    memories: list[Checked]
    skip_duplicates: bool
    upsert: bool
    issued_at: int
    first: int


# Statements that every batch runs are made once: making one costs more than running it.
_STATE = (
    memories.c.key,
    memories.c.uid,
    memories.c.id,
    memories.c.version,
    memories.c.content_hash,
    memories.c.expires_at,
    memories.c.deleted,
    memories.c.updated_at,
)
_BY_KEYS = select(*_STATE).where(memories.c.key.in_(bindparam("wanted", expanding=True)))
_BY_HASHES = (
    select(*_STATE)
    .where(memories.c.content_hash.in_(bindparam("wanted", expanding=True)))
    .order_by(memories.c.uid, memories.c.version)
)


def append(
    connection: Connection,
    calls: Sequence[Sequence[CheckedAppend]],
    locked: dict[tuple[str, str], User],
    model: int,
    now: int,
) -> list[list[AppendResult] | StoreError]:
    """Write the calls' memories in order; a call in which one memory conflicts is left out whole.

    Args:
        locked: the calls' users, whose versions and counts are advanced.
    """
    requests = [request for call in calls for request in call]
    batch = _Batch(model, now, *_known(connection, requests, locked, now))
    results = [batch.plan(call, locked) for call in calls]
    for wave in batch.waves:
        if wave.added:
            connection.execute(insert(memories), wave.added)
        write_changes(connection, wave.changed)
        write_contents(connection, wave.contents)
    return results


def _known(
    connection: Connection, requests: Sequence[CheckedAppend], locked: dict[tuple[str, str], User], now: int
) -> tuple[dict[bytes, _State], dict[bytes, list[str]]]:
    """What the log holds under the requests' keys; and, where duplicates are to be skipped, ids by content hash.

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
    twins: dict[bytes, list[str]] = {}
    for statement, wanted in ((_BY_KEYS, list(keys)), (_BY_HASHES, list(hashes))):
        for start in range(0, len(wanted), CHUNK):
            rows = connection.execute(statement, {"wanted": wanted[start : start + CHUNK]}).all()
            for key, uid, id, version, digest, expires_at, deleted, at in rows:
                if not deleted and expires_at is not None and expires_at <= now:
                    bury(connection, by_uid[uid], [key], now)
                    if key in keys:
                        known[key] = _State(id, by_uid[uid].version, b"", None, expires_at)
                else:
                    known[key] = _State(id, version, digest, expires_at, at if deleted else None)
                    if statement is _BY_HASHES:
                        twins.setdefault(digest, []).append(id)
    return known, twins


class _Batch:
    """The changes of one transaction, as its requests add them: each request sees those before it."""

    def __init__(self, model: int, now: int, known: dict[bytes, _State], twins: dict[bytes, list[str]]) -> None:
        self.waves = [_Wave()]
        self._model = model
        self._now = now
        self._known = known  # by key
        self._twins = twins  # ids by content hash: who has, or had earlier in this transaction, that content

    def plan(
        self, call: Sequence[CheckedAppend], locked: dict[tuple[str, str], User]
    ) -> list[AppendResult] | StoreError:
        """Add the rows of one call, all or none, and advance its users."""
        plan = _Plan()
        results = []
        before = [(locked[request.user].version, locked[request.user].live) for request in call]
        try:
            for request in call:
                user = locked[request.user]
                if request.issued_at <= user.erased_at:
                    param = f"memories.{request.first}.user_id"
                    raise Conflict("The user was erased after this write was sent.", param, "erased")
                appended = [self._plan_one(n, request, user, plan) for n in range(len(request.memories))]
                results.append(AppendResult(appended, user.version))
        except Conflict as conflict:
            for request, (version, live) in zip(call, before, strict=True):
                locked[request.user].version, locked[request.user].live = version, live
            return conflict
        self._known.update(plan.known)
        for digest, ids in plan.twins.items():
            self._twins.setdefault(digest, []).extend(ids)
        for key, row, content in plan.rows:
            if key in self.waves[-1].touched:
                self.waves.append(_Wave())
            wave = self.waves[-1]
            wave.touched.add(key)
            (wave.changed if "of_key" in row else wave.added).append(row)
            wave.contents.append(content)
        return results

    def _plan_one(
        self,
        number: int,
        request: CheckedAppend,
        user: User,
        plan: _Plan,
    ) -> Appended:
        """What becomes of one memory; its row and its state go to `plan`."""
        memory, param = request.memories[number], f"memories.{request.first + number}.id"
        key = user_key(user.uid, memory.id)
        digest = content_hash(user.uid, memory.text, memory.canonical)
        if key in plan.known:
            raise Conflict(f"The call holds the id {memory.id!r} twice.", param, "duplicate_id")
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
            for twin in [*self._twins.get(digest, ()), *plan.twins.get(digest, ())]:
                held = plan.known.get(user_key(user.uid, twin)) or self._known[user_key(user.uid, twin)]
                if held.digest == digest and held.deleted_at is None:
                    return Appended(twin, "unchanged", held.version)
        row = {
            "version": user.stamp(),
            "event": "updated" if live else "added",
            "updated_at": self._now,
            "expires_at": memory.expires_at,
            "deleted": 0,
            "content_hash": digest,
        }
        if state is None:
            row |= {"uid": user.uid, "key": key, "id": memory.id, "created_at": self._now}
        else:
            row |= {"of_key": key, "born_at": None if live else self._now}
        plan.rows.append((key, row, content_of(memory, user.uid, user.version, self._model)))
        plan.twins.setdefault(digest, []).append(memory.id)
        user.live += not live
        plan.known[key] = _State(memory.id, user.version, digest, memory.expires_at, None)
        return Appended(memory.id, "updated" if live else "added", user.version)
