"""Imports: the memories of parsed NDJSON lines are written to the log with their versions, times and history.

Guarantees: the lines of one call are all written or none of them, in one transaction of the caller. An import may be
repeated: lines whose memory exists with the same content, vector, thread and time of its event are `unchanged`, and so
are lines whose memory has expired since it was imported. An import never restores what was erased after it was sent,
except for a memory that was deleted more than an hour before its line was written: the log no longer knows of it.

All functions that take a connection run inside a caller's write transaction, under the lock of the user's row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from store.errors import Conflict, InvalidInput
from store.log import audit
from store.log.export import PAGE, PAGE_BYTES
from store.log.ndjson import ImportLine
from store.log.reading import with_contents
from store.log.rows import content_hash, damaged, dump_vector, text_bytes, thread_key, user_key
from store.log.schema import CHUNK, contents, history, memories
from store.log.threads import erase_unused_names, write_names
from store.log.users import User
from store.log.writing import contents_row, remove_memories, write_changes, write_contents
from store.records import Imported


class CheckedLine(NamedTuple):
    """A line whose vector fits the log: the bytes to store, and their checksum."""

    line: ImportLine
    embedding: bytes
    vector_crc: int

    @property
    def text(self) -> str:
        """The text of the memory."""
        return self.line.text

    @property
    def metadata(self) -> str:
        """The metadata of the memory as JSON."""
        return self.line.metadata


@dataclass(slots=True)
class _Plan:
    """The rows that an import writes."""

    memories: dict[bytes, dict[str, Any]] = field(default_factory=dict)  # by key
    history: dict[bytes, list[dict[str, Any]]] = field(default_factory=dict)  # by key of the memory, without labels
    contents: list[dict[str, Any]] = field(default_factory=list)
    changes: dict[bytes, dict[str, Any]] = field(default_factory=dict)  # by key: memories that get another vector,
    # thread or time of their event
    vectors: dict[bytes, dict[str, Any]] = field(default_factory=dict)  # by key: their rows of `contents`
    names: set[str] = field(default_factory=set)  # of the threads that memories are put into
    left: set[int] = field(default_factory=set)  # the threads that memories are taken out of


def pages(lines: Iterable[ImportLine]) -> Iterator[list[ImportLine]]:
    """The lines in pages, as an export has them."""
    page: list[ImportLine] = []
    size = 0
    for line in lines:
        page.append(line)
        size += len(line.text) + len(line.metadata)
        size += sum(len(state.text or "") + len(state.metadata) for state in line.history)
        if len(page) == PAGE or size >= PAGE_BYTES:
            yield page
            page, size = [], 0
    if page:
        yield page


def check(lines: Sequence[ImportLine], model: str, dim: int) -> list[CheckedLine]:
    """Check that the lines' vectors are vectors of this log.

    Raises:
        InvalidInput: a vector is missing, was made by another model, has another length, or is zero or not finite.
    """
    checked = []
    for line in lines:
        if line.model is not None and line.model != model:
            message = f"names the model {line.model}, but this log serves {model}"
            raise InvalidInput(message, "model", None, line.position)
        if line.vector is None:
            raise InvalidInput("must hold the vector of the text", "vector", None, line.position)
        try:
            checked.append(CheckedLine(line, *dump_vector(line.vector, dim, "vector")))
        except InvalidInput as error:
            raise error.at(error.field, line.position) from error
    return checked


def begin_import(connection: Connection, user: User, issued_at: int | None) -> None:
    """Prepare a user without memories to receive the imported versions, by removing its tombstones.

    The time of the newest tombstone becomes that of the user's erasure, so that older writes are still refused. If that
    time would refuse this import as well, the tombstones stay: they tell which of the lines were deleted.
    """
    if user.live:
        return
    last = select(func.max(memories.c.updated_at)).where(memories.c.uid == user.uid)
    newest = connection.execute(last).scalar() or 0
    if issued_at is not None and issued_at <= newest:
        return
    remove_memories(connection, user)
    user.erased_at = max(user.erased_at, newest)
    user.version = user.removed_version = user.forgotten_version = 0
    user.epoch += 1


def import_lines(
    connection: Connection,
    user: User,
    lines: Sequence[CheckedLine],
    *,
    model_id: int,
    issued_at: int | None,
    epoch: int | None,
    now: int,
    by: str | None,
) -> Imported:
    """Write some lines.

    A memory that exists with the same content gets the vector, the thread and the time of the event that the line has
    and that are other ones, unless the memory was changed after `issued_at`.

    Args:
        epoch: of the user when the import began; None for the first lines. It tells whether the user was erased since.
            `User.erased_at` would refuse an import that takes more than an hour, since it is also the time of the
            newest tombstone that was removed.

    Raises:
        Conflict: the user has a memory with a line's id and other content, or erased a line's memory or everything
            after `issued_at`.
    """
    erased = issued_at is not None and issued_at <= user.erased_at if epoch is None else epoch != user.epoch
    if erased:
        raise Conflict("the user was erased after this import was sent", None, "erased", lines[0].line.position)
    keys = [user_key(user.uid, checked.line.id) for checked in lines]
    known = _known(connection, keys, model_id)
    fresh = [
        (key, checked)
        for key, checked in zip(keys, lines, strict=True)
        if not _has_expired(checked.line, known.get(key))
    ]
    tombstones = {key: known[key] for key, _ in fresh if key in known and known[key].deleted}
    for key, (line, _, _) in fresh if issued_at is not None else ():
        if key in tombstones and issued_at <= tombstones[key].updated_at:
            message = f"the memory {line.id!r} was deleted after this import was sent"
            raise Conflict(message, "id", "deleted", line.position)
    labels = {key: row.label for key, row in tombstones.items()}
    named = [state.version for _, checked in fresh for state in checked.line.history]
    taken = _taken_versions(connection, user.uid, named, set(labels.values()))
    plan = _plan(user, fresh, known, taken, model_id)
    for key, checked in fresh:
        row = known.get(key)
        if row is not None and not row.deleted and (issued_at is None or row.updated_at < issued_at):
            _plan_change(plan, user, row, checked, model_id=model_id, now=now)
    _write(connection, user.uid, plan, labels)
    changed = [checked.line.id for key, checked in fresh if key in plan.memories or key in plan.changes]
    audit.write(connection, audit.of_write(user, by, "memories.imported", list(dict.fromkeys(changed))), now)
    imported = len(plan.memories) + len(plan.changes)
    return Imported(imported, len(lines) - imported, user.epoch)


def _known(connection: Connection, keys: Sequence[bytes], model_id: int) -> dict[bytes, Any]:
    """The rows of the memories and tombstones that have these keys."""
    statement = (
        select(
            memories.c.key,
            memories.c.label,
            memories.c.deleted,
            memories.c.content_hash,
            memories.c.expires_at,
            memories.c.updated_at,
            memories.c.happened_at,
            memories.c.thread,
            contents.c.vector_crc,
            contents.c.embedding,
        )
        .select_from(with_contents(model_id))
        .where(memories.c.key.in_(keys))
    )
    return {row.key: row for row in connection.execute(statement)}


def _has_expired(line: ImportLine, row: Any) -> bool:
    """Whether `row` is the tombstone of the line's memory, and the memory was deleted because it had expired."""
    return row is not None and row.deleted and line.expires_at is not None and line.expires_at <= row.updated_at


def _taken_versions(connection: Connection, uid: int, versions: Sequence[int], tombstones: Set[int]) -> set[int]:
    """Those of the versions that a state of the user has, whether or not its text was erased.

    The history under the labels of `tombstones` does not count, since this import replaces it.
    """
    taken: set[int] = set()
    for start in range(0, len(versions), CHUNK):
        wanted = versions[start : start + CHUNK]
        current = select(memories.c.version).where(memories.c.uid == uid, memories.c.version.in_(wanted))
        taken.update(connection.execute(current).scalars())
        past = select(history.c.label, history.c.version).where(history.c.uid == uid, history.c.version.in_(wanted))
        taken.update(version for label, version in connection.execute(past) if label not in tombstones)
    return taken


def _plan(
    user: User,
    lines: Sequence[tuple[bytes, CheckedLine]],
    known: Mapping[bytes, Any],
    taken: set[int],
    model_id: int,
) -> _Plan:
    """Decide what is new, what is unchanged and what contradicts the log; advance the user's version and count."""
    plan = _Plan()
    for key, checked in lines:
        line, row, planned = checked.line, known.get(key), plan.memories.get(key)
        content = content_hash(user.uid, line.text, line.canonical), line.expires_at
        existing = None
        if planned is not None:
            existing = planned["content_hash"], planned["expires_at"]
        elif row is not None and not row.deleted:
            existing = row.content_hash, row.expires_at
        if existing is not None:
            if existing != content:
                raise Conflict(f"the memory {line.id!r} has other content", "id", "id_conflict", line.position)
            if planned is not None:
                _place(plan, planned, line, (planned["happened_at"], planned["thread"]))
                if line.given_vector:
                    plan.vectors[key] |= {"embedding": checked.embedding, "vector_crc": checked.vector_crc}
            continue
        past_versions = _advance(user, line, taken)
        user.live += 1
        user.text_bytes += text_bytes(line.text, line.metadata)
        plan.memories[key] = {
            "uid": user.uid,
            "key": key,
            "version": user.version,
            "event": line.event,
            "created_at": line.created_at,
            "updated_at": line.updated_at,
            "expires_at": line.expires_at,
            "deleted": 0,
            "content_hash": content[0],
            "id": line.id,
        }
        _place(plan, plan.memories[key], line, (None, None))
        if row is not None and row.thread is not None:  # a tombstone that a program of an older schema made
            plan.left.add(row.thread)
        plan.vectors[key] = contents_row(checked, user.uid, user.version, model_id)
        plan.contents.append(plan.vectors[key])
        for state, version in zip(line.history, past_versions, strict=True):
            past = {"uid": user.uid, "version": version, "event": state.event, "at": state.at}
            plan.history.setdefault(key, []).append(past)
            if state.text is not None:
                user.past_bytes += text_bytes(state.text, state.metadata)
                plan.contents.append(contents_row(state, user.uid, version, model_id))
    return plan


def _plan_change(plan: _Plan, user: User, row: Any, checked: CheckedLine, *, model_id: int, now: int) -> None:
    """Plan that the memory in `row` gets the vector, thread and time of its line, if the line has other ones."""
    line, key = checked.line, row.key
    planned = plan.changes.get(key)  # by an earlier line with the same id
    crc = row.vector_crc if planned is None else plan.vectors[key]["vector_crc"]
    before = (row.happened_at, row.thread) if planned is None else (planned["happened_at"], planned["thread"])
    after = _placed(line, *before)
    brings_vector = line.given_vector and crc != checked.vector_crc
    if after == before and not brings_vector:
        return
    if planned is None:
        if row.embedding is None and not brings_vector:
            raise damaged("a memory has no vector")
        planned = plan.changes[key] = {
            "of_key": key,
            "new_created_at": None,
            "version": user.stamp(),
            "event": "updated",
            "updated_at": now,
            "expires_at": row.expires_at,
            "deleted": 0,
            "content_hash": row.content_hash,
        }
        plan.vectors[key] = contents_row(checked, user.uid, user.version, model_id)
        plan.vectors[key] |= {"embedding": row.embedding, "vector_crc": row.vector_crc}
        plan.contents.append(plan.vectors[key])
    _place(plan, planned, line, before)
    if brings_vector:
        plan.vectors[key] |= {"embedding": checked.embedding, "vector_crc": checked.vector_crc}


def _placed(line: ImportLine, happened_at: int | None, thread: int | None) -> tuple[int | None, int | None]:
    """The time and the thread of a memory with this line that has these already."""
    return (
        happened_at if line.happened_at is None else line.happened_at,
        thread if line.thread is None else thread_key(line.thread),
    )


def _place(plan: _Plan, row: dict[str, Any], line: ImportLine, before: tuple[int | None, int | None]) -> None:
    """Give a planned row the time and the thread of its line, in place of those `before`, if the line has them."""
    row["happened_at"], row["thread"] = _placed(line, *before)
    if line.thread is not None:
        plan.names.add(line.thread)
    if before[1] is not None:
        plan.left.add(before[1])


def _advance(user: User, line: ImportLine, taken: set[int]) -> list[int]:
    """Advance the user to the version that the line's memory gets. Returns the versions of its past states.

    They are those of the line, unless the user is beyond them or has one of them already.
    """
    past = [state.version for state in line.history]
    if line.version <= user.version or not taken.isdisjoint(past):
        past = [user.stamp() for _ in past]
        user.stamp()
    else:
        user.version = line.version
    taken.update(past, [user.version])
    return past


def _write(connection: Connection, uid: int, plan: _Plan, tombstones: Mapping[bytes, int]) -> None:
    """Write the rows of a plan. `tombstones` are the labels of those that its memories replace, by key."""
    if tombstones:
        connection.execute(delete(history).where(history.c.label.in_(tombstones.values())))
    added = [row for key, row in plan.memories.items() if key not in tombstones]
    if added:
        connection.execute(insert(memories), added)
    # A tombstone becomes the memory again, under its label. If its row were replaced, an index that has the label would
    # never learn that it was deleted.
    replaced = [{"of_label": tombstones[key], **row} for key, row in plan.memories.items() if key in tombstones]
    if replaced:
        connection.execute(update(memories).where(memories.c.label == bindparam("of_label")), replaced)
    write_changes(connection, list(plan.changes.values()))
    write_contents(connection, plan.contents)
    write_names(connection, {uid: plan.names})
    erase_unused_names(connection, uid, plan.left)
    if plan.history:
        labels = select(memories.c.key, memories.c.label).where(memories.c.key.in_(plan.history))
        rows = [{"label": label, **past} for key, label in connection.execute(labels) for past in plan.history[key]]
        connection.execute(insert(history), rows)
