"""What the writes with a write id have done: one that is sent again is answered as the first time, and not made again.

Guarantees: the record of a write is committed with the write, and both are looked for and made under the lock of the
user's row. So of two stores that try one write at the same moment one makes it, and both answer alike. A record holds
numbers, and the ids of memories, for `KEEP_US` at least. When a user is erased its records lose what they say, but
those that hold nothing but a count or a version, and keep that there was such a write.

What may be lost: a write that is sent again after `KEEP_US` is made again. One that failed has no record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import orjson
from sqlalchemy import Connection, bindparam, delete, insert, select, update

from store.errors import Conflict, LogDamaged
from store.log.rows import check_id, user_key
from store.log.schema import writes

Kind = Literal["append", "update", "delete", "delete_where", "erase"]
Answer = list[Any]
"""What a write answered, as JSON holds it."""

KEEP_US = 3_600_000_000
_PART = 5000  # records a statement
_SPEAKING = ("append", "update")  # kinds whose answers lead to memories


class Record(NamedTuple):
    """What one write, or one request of an append, has done. `answer` is None where the user was erased since."""

    key: bytes
    uid: int
    kind: str
    answer: Answer | None


_FIND = select(writes.c.key, writes.c.uid, writes.c.kind, writes.c.answer).where(
    writes.c.key.in_(bindparam("wanted", expanding=True))
)


def key_of(uid: int, write_id: str, part: int = 0) -> bytes:
    """Names one write of one user, or the part of it that is the call's request of that number."""
    return user_key(uid, f"{part} {write_id}")


def find(connection: Connection, keys: Sequence[bytes]) -> dict[bytes, Record]:
    """The records that there are, by key. The users are locked: what another store has written is seen.

    Raises:
        LogDamaged: a record cannot be read.
    """
    found: dict[bytes, Record] = {}
    for start in range(0, len(keys), _PART):
        for key, uid, kind, answer in connection.execute(_FIND, {"wanted": keys[start : start + _PART]}):
            try:
                found[key] = Record(key, uid, kind, None if answer is None else orjson.loads(answer))
            except ValueError as error:
                raise LogDamaged(f"The log is damaged: the record of a write is not JSON: {error}.") from error
    return found


def keep(connection: Connection, records: Iterable[Record], now: int) -> None:
    """Add the records of writes of this transaction."""
    rows = [
        {"key": key, "uid": uid, "at": now, "kind": kind, "answer": orjson.dumps(answer).decode()}
        for key, uid, kind, answer in records
    ]
    if rows:
        connection.execute(insert(writes), rows)


def once(
    connection: Connection, uid: int, kind: Kind, make: Callable[[], Answer], *, write_id: str | None, now: int
) -> Answer:
    """Make a write of one user unless it was made before. Returns what it answers, or answered then.

    Raises:
        Conflict: the user was erased since the write was made, or the write id is that of another write.
        InvalidInput: for a write id that is none.
    """
    if write_id is None:
        return make()
    check_id(write_id, "write_id")
    key = key_of(uid, write_id)
    found = find(connection, [key]).get(key)
    if found is None:
        answer = make()
        keep(connection, [Record(key, uid, kind, answer)], now)
        return answer
    if found.kind != kind:
        raise reused()
    if found.answer is None:
        raise gone()
    return found.answer


def reused() -> Conflict:
    """The error of a write id that was given to two writes."""
    return Conflict("The write id was given to another write before.", "write_id", "write_id_reused")


def gone() -> Conflict:
    """The error of an update whose memory is no longer there."""
    return Conflict("The update was made, and the memory has been deleted since.", "id", "deleted")


def forget(connection: Connection, uid: int) -> None:
    """Empty the records that lead to memories of a user. That there were such writes stays known."""
    statement = update(writes).where(writes.c.uid == uid, writes.c.kind.in_(_SPEAKING), writes.c.answer.is_not(None))
    connection.execute(statement.values(answer=None))


def outdated(connection: Connection, now: int) -> bool:
    """Whether there is a record that has been kept long enough."""
    return connection.execute(select(writes.c.key).where(writes.c.at < now - KEEP_US).limit(1)).first() is not None


def purge(connection: Connection, now: int, limit: int) -> int:
    """Remove some records that have been kept long enough. Returns how many.

    It passes over those that another transaction holds, so that it never waits for one that may wait for it.
    """
    statement = select(writes.c.key).where(writes.c.at < now - KEEP_US).limit(limit)
    keys = list(connection.execute(statement.with_for_update(skip_locked=True)).scalars())
    if keys:
        connection.execute(delete(writes).where(writes.c.key.in_(keys)))
    return len(keys)
