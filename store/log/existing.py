"""Reads the memories in the log that a batch of appends may affect, with a few statements for all of them."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

from sqlalchemy import BigInteger, Connection, bindparam, func, literal_column, select

from store.log.reading import byte_length
from store.log.schema import CHUNK, contents, history, memories
from store.log.users import User
from store.log.writing import delete_memories


@dataclass(frozen=True, slots=True)
class Stored:
    """The vector of a state, and the size of its text and metadata."""

    embedding: bytes
    vector_crc: int
    text_bytes: int


@dataclass(frozen=True, slots=True)
class State:
    """The state of the memory with some id: the one in the log, or the one that the batch has planned so far."""

    id: str
    version: int
    digest: bytes  # the content hash
    created_at: int
    expires_at: int | None
    deleted_at: int | None
    # The version of its oldest state. For a memory that was in the log before this batch it is set only if the append
    # has a generated id: `load_first_versions`.
    first: int
    # For a memory that was in the log before this batch it is set only if the batch may change it: `load_stored`.
    stored: Stored | None = None
    happened_at: int | None = None
    thread: int | None = None


# Statements that every batch runs are built once: building one takes longer than running it.
_STATE = (
    memories.c.key,
    memories.c.uid,
    memories.c.id,
    memories.c.version,
    memories.c.content_hash,
    memories.c.created_at,
    memories.c.expires_at,
    memories.c.deleted,
    memories.c.updated_at,
    memories.c.happened_at,
    memories.c.thread,
)
_BY_KEYS = select(*_STATE).where(memories.c.key.in_(bindparam("wanted", expanding=True)))
_BY_HASHES = (
    select(*_STATE)
    .where(memories.c.content_hash.in_(bindparam("wanted", expanding=True)))
    .order_by(memories.c.uid, memories.c.version)
)
_STORED = (
    select(
        memories.c.key,
        contents.c.embedding,
        contents.c.vector_crc,
        byte_length(contents.c.text) + byte_length(contents.c.metadata),
    )
    .join(contents, (contents.c.uid == memories.c.uid) & (contents.c.version == memories.c.version))
    .where(
        memories.c.key.in_(bindparam("wanted", expanding=True)),
        memories.c.deleted == 0,
        contents.c.model == bindparam("serving", type_=BigInteger),
        contents.c.blank == literal_column("0"),
    )
)
_FIRST_VERSIONS = (
    select(memories.c.key, func.min(history.c.version))
    .join(history, history.c.label == memories.c.label)
    .where(memories.c.key.in_(bindparam("wanted", expanding=True)))
    .group_by(memories.c.key)
)


def load_states(
    connection: Connection, keys: Set[bytes], hashes: Set[bytes], users: dict[int, User], now: int
) -> tuple[dict[bytes, State], dict[bytes, list[bytes]]]:
    """The memories with these keys or content hashes, by key; and the keys of the latter, by content hash.

    A memory that has expired and was not removed yet is deleted first.

    Args:
        users: the owners of the memories, by uid, locked.
    """
    states: dict[bytes, State] = {}
    by_hash: dict[bytes, list[bytes]] = {}
    for statement, wanted in ((_BY_KEYS, list(keys)), (_BY_HASHES, list(hashes))):
        for start in range(0, len(wanted), CHUNK):
            rows = connection.execute(statement, {"wanted": wanted[start : start + CHUNK]}).all()
            for key, uid, id, version, digest, created_at, expires_at, deleted, at, happened_at, thread in rows:
                if not deleted and expires_at is not None and expires_at <= now:
                    delete_memories(connection, users[uid], [key], now)
                    if key in keys:
                        states[key] = State(id, users[uid].version, b"", created_at, None, expires_at, version)
                else:
                    deleted_at = at if deleted else None
                    states[key] = State(
                        id,
                        version,
                        digest,
                        created_at,
                        expires_at,
                        deleted_at,
                        version,
                        happened_at=happened_at,
                        thread=thread,
                    )
                    if statement is _BY_HASHES:
                        by_hash.setdefault(digest, []).append(key)
    return states, by_hash


def load_first_versions(connection: Connection, states: dict[bytes, State], keys: Set[bytes]) -> None:
    """Set `first` of the states with these keys. No statement is run if there are none."""
    wanted = [key for key in states if key in keys]
    for start in range(0, len(wanted), CHUNK):
        for key, version in connection.execute(_FIRST_VERSIONS, {"wanted": wanted[start : start + CHUNK]}):
            states[key] = replace(states[key], first=version)


def load_stored(connection: Connection, states: dict[bytes, State], keys: Set[bytes], model: int) -> None:
    """Set `stored` of the live states with these keys. No statement is run if there are none."""
    wanted = [key for key in keys if key in states and states[key].deleted_at is None]
    for start in range(0, len(wanted), CHUNK):
        part = {"wanted": wanted[start : start + CHUNK], "serving": model}
        for key, embedding, crc, size in connection.execute(_STORED, part):
            states[key] = replace(states[key], stored=Stored(embedding, crc, size))
