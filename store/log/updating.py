"""The update of one memory.

All functions run inside a caller's write transaction, under the lock of the user's row.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson
from sqlalchemy import Connection, Row

from store.errors import Conflict, InvalidInput, NotFound
from store.log import audit, reading, receipts, rows, writing
from store.log.threads import erase_unused_names, read_name, write_names
from store.log.users import User
from store.records import Memory, NewMemory, Unset, Vector


@dataclass(frozen=True, slots=True)
class Change:
    """The fields to change of the memory `id`: see `Store.update`."""

    id: str
    text: str | Unset
    vector: Vector | Unset
    metadata: dict[str, Any] | Unset
    metadata_merge: dict[str, Any] | Unset
    expires_at: datetime | Unset | None
    happened_at: datetime | Unset | None
    thread: str | Unset | None
    if_version: int | None
    issued_at: datetime | None


def update(
    connection: Connection,
    user: User,
    user_id: str,
    change: Change,
    *,
    model: int,
    dim: int,
    now: int,
    write_id: str | None,
    by: str | None,
) -> Memory:
    """Make the change, unless it was made before under this write id. Returns the memory as the change left it.

    Raises:
        NotFound, Conflict, InvalidInput: see `Store.update`.
    """

    def make() -> receipts.Answer:
        sent = _sent_at(change, now)
        found = reading.by_key(connection, rows.user_key(user.uid, change.id), model, now)
        if found is None:
            raise NotFound(f"there is no memory {change.id!r}", "id")
        if change.issued_at is not None and sent <= max(user.erased_at, reading.deleted_at(connection, found.label)):
            raise Conflict(f"the memory {change.id!r} was deleted after this write was sent", "id", "deleted")
        new = decide(change, found, dim, now)
        before = user.version
        version, at = _write(connection, user, found, new, model=model, now=now)
        if user.version > before:
            audit.write(connection, audit.of_write(user, by, "memories.updated", [change.id]), now)
        # Only what a memory has of these is in the answer, so that older programs can read the others.
        placed = [] if new.happened_at is None and new.thread is None else [new.happened_at, new.thread_key]
        return [change.id, version, at, new.expires_at, *placed]

    answer = receipts.make_once(connection, user.uid, "update", make, write_id=write_id, now=now)
    if answer[0] != change.id:
        raise receipts.write_id_reused()
    return _memory_of(connection, user, user_id, answer, model=model, now=now)


def _memory_of(
    connection: Connection, user: User, user_id: str, answer: receipts.Answer, *, model: int, now: int
) -> Memory:
    """The memory as an update left it, even if it was updated again since, if its thread still has a memory.

    Raises:
        Conflict: the memory was deleted since.
    """
    id, version, updated_at, expires_at, happened_at, thread = [*answer, None, None][:6]
    current = reading.by_key(connection, rows.user_key(user.uid, id), model, now)
    if current is not None and current.version == version:
        return rows.memory(current, user_id)
    content = reading.contents_of(connection, user.uid, [version]).get((user.uid, version))
    if current is None or content is None:
        raise receipts.deleted_since()
    text, metadata = content
    created, updated = rows.moment(current.created_at), rows.moment(updated_at)
    expires = None if expires_at is None else rows.moment(expires_at)
    happened = None if happened_at is None else rows.moment(happened_at)
    name = None if thread is None else read_name(connection, user.uid, thread)
    return Memory(
        id,
        user_id,
        text,
        orjson.loads(metadata),
        created,
        updated,
        expires,
        version,
        happened_at=happened,
        thread=name,
    )


def _sent_at(change: Change, now: int) -> int:
    """When the change was sent; it must expire later than that."""
    sent = now if change.issued_at is None else rows.micros(change.issued_at, "issued_at")
    if isinstance(change.expires_at, datetime) and rows.micros(change.expires_at, "expires_at") <= sent:
        raise InvalidInput("must be in the future", "expires_at")
    return sent


def decide(change: Change, found: Row[Any], dim: int, now: int) -> rows.Checked:
    """The values that the memory in the row `found` will have.

    Raises:
        Conflict: the memory has another version than the change expects.
        NotFound: the memory would have expired already.
        InvalidInput: a new value is invalid.
    """
    before = rows.memory(found, "")
    if change.if_version is not None and before.version != change.if_version:
        message = f"the memory has version {before.version}, not {change.if_version}"
        raise Conflict(message, "if_version", "version_mismatch")
    if isinstance(change.vector, Unset):
        vector = rows.load_vectors([found.embedding], [found.vector_crc], dim)[0]
    else:
        vector = change.vector
    new = NewMemory(
        change.id,
        before.text if isinstance(change.text, Unset) else change.text,
        vector,
        _metadata(change, before.metadata),
        before.expires_at if isinstance(change.expires_at, Unset) else change.expires_at,
        happened_at=before.happened_at if isinstance(change.happened_at, Unset) else change.happened_at,
        thread=before.thread if isinstance(change.thread, Unset) else change.thread,
    )
    checked = rows.checked(new, dim)
    if checked.expires_at is not None and checked.expires_at <= now:  # it has expired since the change was sent
        raise NotFound(f"there is no memory {change.id!r}", "id")
    return checked


def _metadata(change: Change, before: dict[str, Any]) -> dict[str, Any]:
    """The metadata that a memory with the metadata `before` will have."""
    if not isinstance(change.metadata, Unset):
        return change.metadata
    if isinstance(change.metadata_merge, Unset):
        return before
    rows.dump_metadata(change.metadata_merge, "metadata_merge")
    removed = {name for name, value in change.metadata_merge.items() if value is None}
    return {name: value for name, value in (before | change.metadata_merge).items() if name not in removed}


def _write(
    connection: Connection, user: User, found: Row[Any], memory: rows.Checked, *, model: int, now: int
) -> tuple[int, int]:
    """Give the memory in the row `found` a new state, unless it has these values already.

    Returns the state's version, and the time when it began.
    """
    digest = rows.content_hash(user.uid, memory.text, memory.canonical)
    before = found.content_hash, found.expires_at, found.vector_crc, found.happened_at, found.thread
    if before == (digest, memory.expires_at, memory.vector_crc, memory.happened_at, memory.thread_key):
        return found.version, found.updated_at
    row = {
        "of_key": found.key,
        "new_created_at": None,
        "version": user.stamp(),
        "event": "updated",
        "updated_at": now,
        "expires_at": memory.expires_at,
        "deleted": 0,
        "content_hash": digest,
        "happened_at": memory.happened_at,
        "thread": memory.thread_key,
    }
    user.text_bytes += memory.text_bytes - rows.text_bytes(found.text, found.metadata)
    writing.write_changes(connection, [row])
    writing.write_contents(connection, [writing.contents_row(memory, user.uid, user.version, model)])
    if memory.thread is not None:
        write_names(connection, {user.uid: [memory.thread]})
    if found.thread not in (None, memory.thread_key):
        erase_unused_names(connection, user.uid, [found.thread])
    return user.version, now
