"""The names of threads, each kept once for a user as long as a live memory is in the thread: see `schema.names`.

Guarantees: a name is erased in the transaction that removes the last memory from its thread, as the text of a deleted
memory is. A program of an older schema does not do that; then it is done with the memory's tombstone, an hour later.

All functions run inside a caller's write transaction, under the lock of the user's row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from sqlalchemy import Connection, and_, bindparam, exists, literal_column, select

from store.log.erasing import erase_contents, erasure
from store.log.rows import thread_key
from store.log.schema import CHUNK, THREAD_NAME, contents, insert_ignore, memories

_OF_KEYS = (
    select(memories.c.thread)
    .distinct()
    .where(memories.c.key.in_(bindparam("keys", expanding=True)), memories.c.thread.is_not(None))
)
_IN_USE = (
    exists()
    .select_from(memories)
    .where(memories.c.uid == contents.c.uid, memories.c.thread == -contents.c.version, memories.c.deleted == 0)
    .correlate(contents)
)
_UNUSED = erasure(
    and_(
        contents.c.uid == bindparam("of_uid"),
        contents.c.version.in_(bindparam("versions", expanding=True)),
        contents.c.model == THREAD_NAME,
        ~_IN_USE,
    )
)


def write_names(connection: Connection, names: Mapping[int, Iterable[str]]) -> None:
    """Add the names of threads that memories were put into, by uid. Names that are there already stay."""
    rows = [
        {
            "blank": 0,
            "uid": uid,
            "version": -thread_key(name),
            "model": THREAD_NAME,
            "vector_crc": 0,
            "text": name,
            "metadata": "",
            "embedding": b"",
        }
        for uid, of_user in names.items()
        for name in of_user
    ]
    if rows:
        insert_ignore(connection, contents, rows)


def read_name(connection: Connection, uid: int, thread: int) -> str | None:
    """The name of a user's thread; None if no live memory is in it."""
    statement = select(contents.c.text).where(
        contents.c.uid == uid,
        contents.c.version == -thread,
        contents.c.model == THREAD_NAME,
        contents.c.blank == literal_column("0"),
    )
    found: str | None = connection.execute(statement).scalar()
    return found


def threads_of(connection: Connection, keys: Sequence[bytes]) -> set[int]:
    """The threads of the memories with these keys."""
    found: set[int] = set()
    for start in range(0, len(keys), CHUNK):
        found.update(connection.execute(_OF_KEYS, {"keys": keys[start : start + CHUNK]}).scalars())
    return found


def erase_unused_names(connection: Connection, uid: int, threads: Collection[int]) -> None:
    """Erase the names of those threads of a user that no live memory is in any more."""
    versions = [-thread for thread in threads]
    for start in range(0, len(versions), CHUNK):
        part = {"of_uid": uid, "versions": versions[start : start + CHUNK]}
        erase_contents(connection, _UNUSED, part)
