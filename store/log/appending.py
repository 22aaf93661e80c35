"""Appends of many callers as one set of changes: planned in memory, then written with statements for all of them.

Guarantees: either all memories of a call are written or none. A later call of the batch sees what the earlier ones
wrote. The number of statements does not grow with calls, users or memories.

An error's position is the index of the memory among all memories of its call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, insert

from store.errors import Conflict, InvalidInput, QuotaExceeded, StoreError
from store.log import audit, quotas, receipts
from store.log.existing import State, Stored, load_first_versions, load_states, load_stored
from store.log.rows import Checked, check_id, check_new_id, check_past, content_hash, micros, unit_vectors, user_key
from store.log.rows import checked as checked_memory
from store.log.schema import memories
from store.log.similar import Find, Found, NearDuplicates
from store.log.threads import erase_unused_names, write_names
from store.log.users import User
from store.log.writing import contents_row, write_changes, write_contents
from store.records import Action, Append, Appended, AppendResult


@dataclass(frozen=True, slots=True)
class CheckedAppend:
    """An Append that was checked. `first` is the position of its first memory in the call."""

    user: tuple[str, str]
    memories: list[Checked]
    skip_duplicates: bool
    upsert: bool
    issued_at: int
    first: int
    write_id: str | None
    by: str | None
    duplicate_score: float | None = None


def checked(call: Sequence[Append], dim: int, now: int, *, audited: bool) -> list[CheckedAppend]:
    """Check the requests of one call. If writes are not audited, they forget which key asked for them.

    Raises:
        InvalidInput: `position` is the memory's in the call, if the error is about a memory.
    """
    accepted: list[CheckedAppend] = []
    first = 0
    for request in call:
        check_new_id(request.user_id, "user_id")
        if request.write_id is not None:
            check_id(request.write_id, "write_id")
        if request.write_id != call[0].write_id:
            raise InvalidInput("must be the same for all requests of one call", "write_id")
        if not request.memories:
            raise InvalidInput("must not be empty", "memories")
        rows = []
        for position, memory in enumerate(request.memories, first):
            try:
                row = checked_memory(memory, dim)
                if row.created_at is not None:
                    check_past(row.created_at, "created_at", now)
                rows.append(row)
            except InvalidInput as error:
                raise error.at(error.field, position) from error
        user = request.tenant, request.user_id
        skip = request.on_duplicate == "skip"
        if request.duplicate_score is not None:
            _check_duplicate_score(request.duplicate_score, skip=skip)
        issued_at = micros(request.issued_at, "issued_at")
        accepted.append(
            CheckedAppend(
                user,
                rows,
                skip,
                request.upsert,
                issued_at,
                first,
                request.write_id,
                request.by if audited else None,
                request.duplicate_score,
            )
        )
        first += len(rows)
    return accepted


def _check_duplicate_score(score: float, *, skip: bool) -> None:
    if not skip:
        raise InvalidInput("needs on_duplicate: skip", "duplicate_score")
    if not isinstance(score, int | float) or isinstance(score, bool) or not 0 < score <= 1:
        raise InvalidInput("must be a number above 0, and at most 1", "duplicate_score")


def append(
    connection: Connection,
    calls: Sequence[Sequence[CheckedAppend]],
    locked: dict[tuple[str, str], User],
    *,
    model: int,
    now: int,
    room: quotas.Room,
    find: Find,
) -> list[list[AppendResult] | StoreError]:
    """Write the calls' memories in order. A call with a memory that cannot be written is left out whole.

    A call that was made before under its write id returns what it returned then.

    Args:
        locked: the calls' users, whose versions and counts are advanced.
        room: what their tenants may still add.
        find: finds near duplicates in the log, as it is before this transaction.
    """
    keys = [_record_keys(call, locked) for call in calls]
    made = receipts.find(connection, [key for of_call in keys for key in of_call])
    new_calls = [call for call, of_call in zip(calls, keys, strict=True) if made.keys().isdisjoint(of_call)]
    new_requests = [request for call in new_calls for request in call]
    near = _find_near(new_requests, locked, find)
    states, by_hash = _load(connection, new_requests, locked, near, model=model, now=now)
    batch = _Batch(model, now, room, states, by_hash, near=None if near is None else NearDuplicates(near))
    records: list[receipts.Record] = []
    results: list[list[AppendResult] | StoreError] = []
    for call, of_call in zip(calls, keys, strict=True):
        if not made.keys().isdisjoint(of_call):
            results.append(_recorded_results(call, [made.get(key) for key in of_call]))
            continue
        result = batch.add(call, locked)
        results.append(result)
        if of_call and not isinstance(result, StoreError):
            new = [
                receipts.Record(key, locked[request.user].uid, "append", _as_answer(one))
                for key, request, one in zip(of_call, call, result, strict=True)
            ]
            made.update((record.key, record) for record in new)  # one batch may contain the same call twice
            records += new
    for wave in batch.waves:
        if wave.added:
            connection.execute(insert(memories), wave.added)
        write_changes(connection, wave.changed)
        write_contents(connection, wave.contents)
    write_names(connection, batch.names)
    for uid, threads in batch.left.items():
        erase_unused_names(connection, uid, threads)
    receipts.write(connection, records, now)
    audit.write(connection, batch.events, now)
    return results


def _record_keys(call: Sequence[CheckedAppend], locked: dict[tuple[str, str], User]) -> list[bytes]:
    """The key of each request's record; empty if the call has no write id."""
    return [
        receipts.key_of(locked[request.user].uid, request.write_id, part)
        for part, request in enumerate(call)
        if request.write_id is not None
    ]


def _as_answer(result: AppendResult) -> receipts.Answer:
    return [result.version, [[one.id, one.status, one.version] for one in result.memories]]


def _recorded_results(
    call: Sequence[CheckedAppend], records: Sequence[receipts.Record | None]
) -> list[AppendResult] | StoreError:
    """The results of the call when it was made, from the records of its requests."""
    results = []
    for request, record in zip(call, records, strict=True):
        if record is None or record.kind != "append":
            return receipts.write_id_reused()
        if record.answer is None:
            return Conflict("the user was erased after this write was made", "user_id", "erased", request.first)
        version, memories = record.answer
        if len(memories) != len(request.memories):
            return receipts.write_id_reused()
        results.append(AppendResult([Appended(*one) for one in memories], version))
    return results


def _find_near(requests: Sequence[CheckedAppend], locked: dict[tuple[str, str], User], find: Find) -> Found | None:
    """The near duplicates in the log of the memories of requests. None if no request has a `duplicate_score`."""
    wanted: defaultdict[tuple[int, float], dict[bytes, None]] = defaultdict(dict)
    for request in requests:
        if request.duplicate_score is not None:
            of_user = wanted[locked[request.user].uid, request.duplicate_score]
            of_user |= dict.fromkeys(memory.embedding for memory in request.memories)
    found: Found = {}
    for (uid, least), embeddings in wanted.items():
        near = find(uid, unit_vectors(list(embeddings)), least)
        found |= {(uid, least, embedding): keys for embedding, keys in zip(embeddings, near, strict=True)}
    return found if wanted else None


def _load(
    connection: Connection,
    requests: Sequence[CheckedAppend],
    locked: dict[tuple[str, str], User],
    near: Found | None,
    *,
    model: int,
    now: int,
) -> tuple[dict[bytes, State], dict[bytes, list[bytes]]]:
    """The memories in the log that the requests may affect: see `load_states`."""
    keys: set[bytes] = set().union(*near.values()) if near else set()
    hashes: set[bytes] = set()
    generated: set[bytes] = set()
    changing: set[bytes] = set()
    for request in requests:
        uid = locked[request.user].uid
        for memory in request.memories:
            key = user_key(uid, memory.id)
            keys.add(key)
            if memory.generated_id:
                generated.add(key)
            if request.upsert or memory.given_vector or memory.created_at is not None or _is_placed(memory):
                changing.add(key)
            if request.skip_duplicates:
                hashes.add(content_hash(uid, memory.text, memory.canonical))
    states, by_hash = load_states(connection, keys, hashes, {user.uid: user for user in locked.values()}, now)
    load_first_versions(connection, states, generated)
    load_stored(connection, states, changing.union(*by_hash.values()), model)
    return states, by_hash


_ACTIONS: tuple[tuple[Action, str], ...] = (("memories.added", "added"), ("memories.updated", "updated"))


@dataclass(slots=True)
class _Wave:
    """Changes that touch each memory at most once, and so can be written in any order."""

    touched: set[bytes] = field(default_factory=set)
    added: list[dict[str, Any]] = field(default_factory=list)
    changed: list[dict[str, Any]] = field(default_factory=list)
    contents: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class _Plan:
    """The changes of one call: states by key, keys by content hash, and (key, row, row of `contents`).

    `given` are the keys of the memories that the call itself has and that change the log. `names` are those of the
    threads that memories are put into, and `left` the threads that memories are taken out of, by uid.
    """

    given: set[bytes] = field(default_factory=set)
    states: dict[bytes, State] = field(default_factory=dict)
    by_hash: dict[bytes, list[bytes]] = field(default_factory=dict)
    rows: list[tuple[bytes, dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    events: list[audit.NewEvent] = field(default_factory=list)
    names: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    left: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))


class _Batch:
    """The changes of one transaction. Each call that is added sees the changes of those before it."""

    def __init__(
        self,
        model: int,
        now: int,
        room: quotas.Room,
        states: dict[bytes, State],
        by_hash: dict[bytes, list[bytes]],
        *,
        near: NearDuplicates | None,
    ) -> None:
        self._near = near  # None if nobody asks for near duplicates
        self.waves = [_Wave()]
        self.events: list[audit.NewEvent] = []
        self._room = room
        self.names: defaultdict[int, set[str]] = defaultdict(set)  # see `_Plan`
        self.left: defaultdict[int, set[int]] = defaultdict(set)
        self._model = model
        self._now = now
        self._states = states  # by key
        self._by_hash = by_hash  # keys of memories that have, or had earlier in this transaction, that content

    def add(
        self, call: Sequence[CheckedAppend], locked: dict[tuple[str, str], User]
    ) -> list[AppendResult] | StoreError:
        """Add the changes of one call, all or none, and advance its users."""
        plan = _Plan()
        before = [replace(locked[request.user]) for request in call]
        mark = self._near.mark() if self._near is not None else {}
        try:
            results = [self._plan_request(request, locked[request.user], plan) for request in call]
            self._room.take(_growth(call, before, locked))
        except (Conflict, InvalidInput, QuotaExceeded) as error:
            locked.update((request.user, user) for request, user in zip(call, before, strict=True))
            if self._near is not None:
                self._near.forget_since(mark)
            return error
        self._take(plan)
        return results

    def _take(self, plan: _Plan) -> None:
        self.events += plan.events
        self._states.update(plan.states)
        for uid, names in plan.names.items():
            self.names[uid] |= names
        for uid, threads in plan.left.items():
            self.left[uid] |= threads
        for digest, keys in plan.by_hash.items():
            self._by_hash.setdefault(digest, []).extend(keys)
        for key, row, content in plan.rows:
            if key in self.waves[-1].touched:
                self.waves.append(_Wave())
            wave = self.waves[-1]
            wave.touched.add(key)
            (wave.changed if "of_key" in row else wave.added).append(row)
            wave.contents.append(content)

    def _plan_request(self, request: CheckedAppend, user: User, plan: _Plan) -> AppendResult:
        if request.issued_at <= user.erased_at:
            raise Conflict("the user was erased after this write was sent", "user_id", "erased", request.first)
        before = user.version
        appended = []
        for position, memory in enumerate(request.memories, request.first):
            try:
                appended.append(self._plan_memory(memory, request, user, plan))
            except (Conflict, InvalidInput) as error:
                raise error.at(error.field, position) from error
        version = user.version
        for action, status in _ACTIONS:
            changed = [one.id for one in appended if one.status == status and one.version > before]
            plan.events += audit.of_write(user, request.by, action, changed)
        if version == before and any(one.status == "added" for one in appended):
            version = max(one.version for one in appended)  # an earlier attempt added them: return its version
        return AppendResult(appended, version)

    def _plan_memory(self, memory: Checked, request: CheckedAppend, user: User, plan: _Plan) -> Appended:
        """Add the row and the new state of one memory to the plan, if it changes the log."""
        key = user_key(user.uid, memory.id)
        if key in plan.given:
            raise Conflict(f"the call contains {memory.id!r} twice", "id", "duplicate_id")
        digest = content_hash(user.uid, memory.text, memory.canonical)
        state = plan.states.get(key) or self._states.get(key)
        near = self._near_to(memory, request.duplicate_score, user.uid, plan)
        decision = decide(memory, digest, state, request, self._with_content(digest, plan), near=near)
        if isinstance(decision, Appended):
            return decision
        if decision.id == memory.id:
            plan.given.add(key)
        else:
            key = user_key(user.uid, decision.id)
            state = plan.states.get(key) or self._states[key]
        if state is not None and state.stored is not None and state.digest == digest and not memory.given_vector:
            memory = replace(memory, embedding=state.stored.embedding, vector_crc=state.stored.vector_crc)
        plan.states[key] = new = self._next_state(memory, digest, state, decision, user)
        plan.by_hash.setdefault(digest, []).append(key)
        if self._near is not None:
            self._near.add(user.uid, key, memory.embedding)
        if memory.thread is not None:
            plan.names[user.uid].add(memory.thread)
        if state is not None and state.thread not in (None, new.thread):
            plan.left[user.uid].add(state.thread)
        row: dict[str, Any] = {
            "version": new.version,
            "event": decision.event,
            "updated_at": self._now,
            "expires_at": new.expires_at,
            "deleted": 0,
            "content_hash": digest,
            "happened_at": new.happened_at,
            "thread": new.thread,
        }
        if state is None:
            row |= {"uid": user.uid, "key": key, "id": memory.id, "created_at": new.created_at}
        else:
            row |= {"of_key": key, "new_created_at": new.created_at}
        plan.rows.append((key, row, contents_row(memory, user.uid, new.version, self._model)))
        return Appended(decision.id, decision.event, new.version)

    def _next_state(self, memory: Checked, digest: bytes, state: State | None, change: Change, user: User) -> State:
        """The state that follows `state`. Advances the user's version and counts."""
        live = state is not None and state.deleted_at is None
        created_at = self._now if change.created_at is None else change.created_at
        happened_at, thread = memory.happened_at, memory.thread_key
        if state is not None and live:
            created_at = state.created_at if change.created_at is None else created_at
            happened_at = state.happened_at if happened_at is None else happened_at
            thread = state.thread if thread is None else thread
        before = 0 if state is None or state.stored is None else state.stored.text_bytes
        size = memory.text_bytes
        version = user.stamp()
        user.live += not live
        user.text_bytes += size - before
        return State(
            id=change.id,
            version=version,
            digest=digest,
            created_at=created_at,
            expires_at=change.expires_at,
            deleted_at=None,
            first=version if state is None else state.first,
            stored=Stored(memory.embedding, memory.vector_crc, size),
            happened_at=happened_at,
            thread=thread,
        )

    def _with_content(self, digest: bytes, plan: _Plan) -> Iterator[State]:
        """The live memories with that content, oldest first."""
        for key in dict.fromkeys([*self._by_hash.get(digest, ()), *plan.by_hash.get(digest, ())]):
            state = plan.states.get(key) or self._states[key]
            if state.digest == digest and state.deleted_at is None:
                yield state

    def _near_to(self, memory: Checked, least: float | None, uid: int, plan: _Plan) -> Iterator[State]:
        """The live memories whose vectors are that similar, the nearest first."""
        if self._near is None or least is None:
            return
        for key in self._near.of(uid, memory.embedding, least):
            state = plan.states.get(key) or self._states[key]
            if state.deleted_at is None:
                yield state


def _growth(
    call: Sequence[CheckedAppend], before: Sequence[User], locked: dict[tuple[str, str], User]
) -> dict[str, quotas.Size]:
    """By how much a call makes each tenant larger. `before` are the users of its requests as they were before it."""
    first = {request.user: user for request, user in zip(call, before, strict=True)}
    grown: dict[str, quotas.Size] = {}
    for name, user in first.items():
        more = quotas.Size(locked[name].live - user.live, locked[name].text_bytes - user.text_bytes)
        grown[user.tenant] = grown.get(user.tenant, quotas.Size(0, 0)).plus(more)
    return grown


class Change(NamedTuple):
    """A new state of the memory `id`. If `created_at` is None, a live memory keeps its time; another one gets now."""

    event: Literal["added", "updated"]
    id: str
    expires_at: int | None
    created_at: int | None


def decide(
    memory: Checked,
    digest: bytes,
    state: State | None,
    request: CheckedAppend,
    duplicates: Iterable[State],
    *,
    near: Iterable[State] = (),
) -> Appended | Change:
    """The effect of an append on one memory: the answer if it changes nothing, or else the new state.

    Args:
        digest: the content hash of the memory.
        state: of the memory with its id, if there is one.
        duplicates: live memories of the user with the same content, oldest first.
        near: live memories of the user that are near duplicates, nearest first.

    Raises:
        Conflict: the id has other content, or the memory was deleted after the write was sent.
        InvalidInput: the memory had expired when the write was sent.
    """
    live = state is not None and state.deleted_at is None
    if state is not None:
        if memory.generated_id:  # this write was made before, and its answer was lost
            return Appended(memory.id, "added", state.first)
        if state.deleted_at is None:
            if (state.digest, state.expires_at) == (digest, memory.expires_at):
                same_time = memory.created_at in (None, state.created_at)
                if same_time and _is_of(memory, state) and not _brings_vector(memory, state):
                    return Appended(memory.id, "unchanged", state.version)
            elif not request.upsert:
                raise Conflict(f"the memory {memory.id!r} has other content", "id", "id_conflict")
        elif request.issued_at <= state.deleted_at:
            raise Conflict(f"the memory {memory.id!r} was deleted after this write was sent", "id", "deleted")
    twin = _stand_in(memory, duplicates) if request.skip_duplicates and not live else None
    if twin is not None and _lasts(twin, memory.expires_at) and not _brings_vector(memory, twin):
        return Appended(twin.id, "unchanged", twin.version)
    if twin is None and not live:
        for similar in near:
            if _is_of(memory, similar) and _lasts(similar, memory.expires_at):
                return Appended(similar.id, "unchanged", similar.version)
    # Checked last: a write that is sent again returns the answer of the first time, even if it has expired by now.
    if memory.expires_at is not None and memory.expires_at <= request.issued_at:
        raise InvalidInput("must be in the future", "expires_at")
    if twin is not None:
        expires_at = twin.expires_at if _lasts(twin, memory.expires_at) else memory.expires_at
        return Change("updated", twin.id, expires_at, None)
    return Change("updated" if live else "added", memory.id, memory.expires_at, memory.created_at)


def _stand_in(memory: Checked, duplicates: Iterable[State]) -> State | None:
    """The duplicate that stands in for a memory: the oldest that needs no change, or else the oldest."""
    oldest = None
    for duplicate in duplicates:
        if not _is_of(memory, duplicate):
            continue
        if _lasts(duplicate, memory.expires_at) and not _brings_vector(memory, duplicate):
            return duplicate
        oldest = oldest or duplicate
    return oldest


def _lasts(state: State, until: int | None) -> bool:
    """Whether a memory does not expire before a time, or never if that is None."""
    return state.expires_at is None or (until is not None and state.expires_at >= until)


def _is_placed(memory: Checked) -> bool:
    """Whether the caller gave a thread, or a time that the memory tells of."""
    return memory.thread is not None or memory.happened_at is not None


def _is_of(memory: Checked, state: State) -> bool:
    """Whether a state has the thread of a memory and tells of the same time, as far as these were given."""
    return memory.happened_at in (None, state.happened_at) and memory.thread_key in (None, state.thread)


def _brings_vector(memory: Checked, state: State) -> bool:
    """Whether the caller gave another vector than the one that the state has."""
    return memory.given_vector and (state.stored is None or state.stored.vector_crc != memory.vector_crc)
