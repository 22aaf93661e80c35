"""Appends of many callers as one set of changes: planned in memory, then written in statements for all of them.

Guarantees: a call's memories are written all, or none of them; a later call of the batch sees what the earlier ones
wrote. How many statements there are does not grow with calls, users or memories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, insert

from store.errors import Conflict, InvalidInput, StoreError
from store.log import receipts
from store.log.known import State, find_oldest, states
from store.log.rows import Checked, check_id, check_new_id, content_hash, micros, user_key
from store.log.rows import checked as checked_memory
from store.log.schema import memories
from store.log.users import User
from store.log.writing import content_of, write_changes, write_contents
from store.records import Append, Appended, AppendResult


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

    known: dict[bytes, State] = field(default_factory=dict)
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
    write_id: str | None


def checked(call: Sequence[Append], dim: int) -> list[CheckedAppend]:
    """Check the requests of one call.

    Raises:
        InvalidInput: with the path of the field; `memories.3` is the fourth of the call.
    """
    taken: list[CheckedAppend] = []
    first = 0
    for request in call:
        check_new_id(request.user_id, "user_id")
        if request.write_id is not None:
            check_id(request.write_id, "write_id")
        if request.write_id != call[0].write_id:
            raise InvalidInput("The requests of one call carry the same write id.", "write_id")
        rows = [checked_memory(memory, dim, f"memories.{n}") for n, memory in enumerate(request.memories, first)]
        user = request.tenant, request.user_id
        skip = request.on_duplicate == "skip"
        issued_at = micros(request.issued_at, "issued_at")
        taken.append(CheckedAppend(user, rows, skip, request.upsert, issued_at, first, request.write_id))
        first += len(rows)
        if not rows:
            raise InvalidInput("There is no memory in the request.", "memories")
    return taken


def append(
    connection: Connection,
    calls: Sequence[Sequence[CheckedAppend]],
    locked: dict[tuple[str, str], User],
    model: int,
    now: int,
) -> list[list[AppendResult] | StoreError]:
    """Write the calls' memories in order; a call in which one memory cannot be written is left out whole.

    A call that was made before under its write id is answered as then.

    Args:
        locked: the calls' users, whose versions and counts are advanced.
    """
    keys = [_write_keys(call, locked) for call in calls]
    made = receipts.find(connection, [key for of_call in keys for key in of_call])
    fresh = [call for call, of_call in zip(calls, keys, strict=True) if made.keys().isdisjoint(of_call)]
    batch = _Batch(model, now, *_known(connection, [request for call in fresh for request in call], locked, now))
    records: list[receipts.Record] = []
    results: list[list[AppendResult] | StoreError] = []
    for call, of_call in zip(calls, keys, strict=True):
        if not made.keys().isdisjoint(of_call):
            results.append(_answered(call, [made.get(key) for key in of_call]))
            continue
        result = batch.plan(call, locked)
        results.append(result)
        if of_call and not isinstance(result, StoreError):
            new = [
                receipts.Record(key, locked[request.user].uid, "append", _answer(one))
                for key, request, one in zip(of_call, call, result, strict=True)
            ]
            made.update((record.key, record) for record in new)  # the same call may come twice in one batch
            records += new
    for wave in batch.waves:
        if wave.added:
            connection.execute(insert(memories), wave.added)
        write_changes(connection, wave.changed)
        write_contents(connection, wave.contents)
    receipts.keep(connection, records, now)
    return results


def _write_keys(call: Sequence[CheckedAppend], locked: dict[tuple[str, str], User]) -> list[bytes]:
    """The key of each request's record; none without a write id."""
    return [
        receipts.key_of(locked[request.user].uid, request.write_id, part)
        for part, request in enumerate(call)
        if request.write_id is not None
    ]


def _answer(result: AppendResult) -> receipts.Answer:
    return [result.version, [[one.id, one.status, one.version] for one in result.memories]]


def _answered(
    call: Sequence[CheckedAppend], records: Sequence[receipts.Record | None]
) -> list[AppendResult] | StoreError:
    """What the call was answered when it was made, out of the records of its requests."""
    results = []
    for request, record in zip(call, records, strict=True):
        if record is None or record.kind != "append":
            return receipts.reused()
        if record.answer is None:
            param = f"memories.{request.first}.user_id"
            return Conflict("The user was erased after this write was made.", param, "erased")
        version, memories = record.answer
        if len(memories) != len(request.memories):
            return receipts.reused()
        results.append(AppendResult([Appended(*one) for one in memories], version))
    return results


def _known(
    connection: Connection, requests: Sequence[CheckedAppend], locked: dict[tuple[str, str], User], now: int
) -> tuple[dict[bytes, State], dict[bytes, list[str]]]:
    """What the log holds under the requests' keys; and, where duplicates are to be skipped, ids by content hash."""
    keys: set[bytes] = set()
    hashes: set[bytes] = set()
    for request in requests:
        uid = locked[request.user].uid
        keys.update(user_key(uid, memory.id) for memory in request.memories)
        if request.skip_duplicates:
            hashes.update(content_hash(uid, memory.text, memory.canonical) for memory in request.memories)
    known, twins = states(connection, keys, hashes, {user.uid: user for user in locked.values()}, now)
    if known:
        find_oldest(
            connection,
            known,
            {
                user_key(locked[request.user].uid, memory.id)
                for request in requests
                for memory in request.memories
                if memory.generated_id
            },
        )
    return known, twins


class _Batch:
    """The changes of one transaction, as its requests add them: each request sees those before it."""

    def __init__(self, model: int, now: int, known: dict[bytes, State], twins: dict[bytes, list[str]]) -> None:
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
                version = user.version
                appended = [self._plan_one(n, request, user, plan) for n in range(len(request.memories))]
                if user.version == version and any(one.status == "added" for one in appended):
                    version = max(one.version for one in appended)  # an earlier try added them: its version
                else:
                    version = user.version
                results.append(AppendResult(appended, version))
        except (Conflict, InvalidInput) as error:
            for request, (version, live) in zip(call, before, strict=True):
                locked[request.user].version, locked[request.user].live = version, live
            return error
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
        if state is not None and memory.generated_id:  # this write was made before; the answer to it was lost
            return Appended(memory.id, "added", state.first)
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
        if memory.expires_at is not None and memory.expires_at <= request.issued_at:
            # Not before: one that is sent again is answered as the first time, though its time is over by now.
            raise InvalidInput("expires_at must be in the future.", f"memories.{request.first + number}.expires_at")
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
        first = user.version if state is None else state.first
        plan.known[key] = State(memory.id, user.version, digest, memory.expires_at, None, first)
        return Appended(memory.id, "updated" if live else "added", user.version)
