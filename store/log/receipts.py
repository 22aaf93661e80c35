"""Records of the writes with a write id: a write that is sent again returns its first answer and is not made again.

Guarantees: the record of a write is committed with the write, and both are looked up and made under the lock of the
user's row. So if two stores try one write at the same moment, one of them makes it and both return the same answer. A
record holds numbers and ids of memories, and is kept for at least `KEEP_US`. If a user is erased, the answers that
name memories are removed from its records; answers that are only a count or a version stay, and so does the fact that
the write was made.

What may be lost: a write that is sent again after `KEEP_US` is made again. A write that failed has no record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import orjson
from sqlalchemy import Connection, bindparam, delete, insert, select, update

from store.errors import Conflict
from store.log.rows import check_id, damaged, user_key
from store.log.schema import writes

Kind = Literal["append", "update", "delete", "delete_many", "delete_where", "erase"]
Answer = list[Any]
"""The answer of a write, as JSON holds it."""

KEEP_US = 3_600_000_000
_PER_STATEMENT = 5000  # records
_NAMING_MEMORIES = ("append", "update")  # the kinds of writes whose answers hold ids of memories


class Record(NamedTuple):
    """A write, or one request of an append. `answer` is None if the user was erased since."""

    key: bytes
    uid: int
    kind: str
    answer: Answer | None


_FIND = select(writes.c.key, writes.c.uid, writes.c.kind, writes.c.answer).where(
    writes.c.key.in_(bindparam("wanted", expanding=True))
)


def key_of(uid: int, write_id: str, part: int = 0) -> bytes:
    """The key of one write of one user, or of the request with the number `part` of a call."""
    return user_key(uid, f"{part} {write_id}")


def find(connection: Connection, keys: Sequence[bytes]) -> dict[bytes, Record]:
    """The records with these keys. The users must be locked, so that records of other stores are seen.

    Raises:
        LogDamaged: a record cannot be read.
    """
    found: dict[bytes, Record] = {}
    for start in range(0, len(keys), _PER_STATEMENT):
        for key, uid, kind, answer in connection.execute(_FIND, {"wanted": keys[start : start + _PER_STATEMENT]}):
            try:
                found[key] = Record(key, uid, kind, None if answer is None else orjson.loads(answer))
            except ValueError as error:
                raise damaged(f"the record of a write is not JSON ({error})") from error
    return found


def write(connection: Connection, records: Iterable[Record], now: int) -> None:
    """Add the records of the writes of this transaction."""
    rows = [
        {"key": key, "uid": uid, "at": now, "kind": kind, "answer": orjson.dumps(answer).decode()}
        for key, uid, kind, answer in records
    ]
    if rows:
        connection.execute(insert(writes), rows)


def make_once(
    connection: Connection, uid: int, kind: Kind, make: Callable[[], Answer], *, write_id: str | None, now: int
) -> Answer:
    """Make a write of one user unless it was made before. Returns its answer, now or then.

    Raises:
        Conflict: the user was erased since the write was made, or the write id belongs to another write.
        InvalidInput: the write id is not valid.
    """
    if write_id is None:
        return make()
    check_id(write_id, "write_id")
    key = key_of(uid, write_id)
    found = find(connection, [key]).get(key)
    if found is None:
        answer = make()
        write(connection, [Record(key, uid, kind, answer)], now)
        return answer
    if found.kind != kind:
        raise write_id_reused()
    if found.answer is None:
        raise deleted_since()
    return found.answer


def write_id_reused() -> Conflict:
    """The error for a write id that was given to two writes."""
    return Conflict("was already used for another write", "write_id", "write_id_reused")


def deleted_since() -> Conflict:
    """The error for an update that was made before and whose memory is gone."""
    return Conflict("the update was made, and the memory was deleted since", "id", "deleted")


def clear_answers(connection: Connection, uid: int) -> None:
    """Remove the answers that name memories of a user. The records stay, so the writes are not made again."""
    of_user = update(writes).where(writes.c.uid == uid, writes.c.kind.in_(_NAMING_MEMORIES))
    connection.execute(of_user.where(writes.c.answer.is_not(None)).values(answer=None))


def any_outdated(connection: Connection, now: int) -> bool:
    """Whether any record is older than `KEEP_US`."""
    return connection.execute(select(writes.c.key).where(writes.c.at < now - KEEP_US).limit(1)).first() is not None


def remove_outdated(connection: Connection, now: int, limit: int) -> int:
    """Remove up to `limit` records that are older than `KEEP_US`. Returns how many.

    Records that another transaction holds are skipped, so that the two never wait for each other.
    """
    statement = select(writes.c.key).where(writes.c.at < now - KEEP_US).limit(limit)
    keys = list(connection.execute(statement.with_for_update(skip_locked=True)).scalars())
    if keys:
        connection.execute(delete(writes).where(writes.c.key.in_(keys)))
    return len(keys)
