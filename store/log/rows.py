"""The values of rows: checked before they are written, and verified when they are read.

Guarantees: a memory that passed `checked()` can be stored and read back unchanged on SQLite and PostgreSQL. A row whose
text, metadata or vector was changed by anything but the store raises LogDamaged when it is read.

The checks take the path of the value within its item (`metadata`, `history.0.at`), which becomes the field of the
error. Whoever checks a list adds the position of the item.
"""

from __future__ import annotations

import hashlib
import math
import struct
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from store.errors import InvalidInput, LogDamaged
from store.log.schema import contents, memories, names
from store.records import Memory, NewMemory, Vector

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_EARLIEST = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_LATEST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_MAX_DEPTH = 32  # of nested metadata
_CLOCKS_APART_US = 60_000_000
CONTENT = (
    memories.c.label,
    memories.c.id,
    contents.c.text,
    contents.c.metadata,
    memories.c.created_at,
    memories.c.updated_at,
    memories.c.expires_at,
    memories.c.version,
    memories.c.content_hash,
    memories.c.uid,
    memories.c.key,
    memories.c.happened_at,
    memories.c.thread,
    names.c.text.label("thread_name"),
)
"""The columns of `reading.with_names` that `memory()` reads, in its order."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A NewMemory that was checked, with the values of its row."""

    id: str
    text: str
    metadata: str
    canonical: bytes  # the metadata with sorted keys, for the content hash
    expires_at: int | None
    embedding: bytes
    vector_crc: int
    generated_id: bool = False
    given_vector: bool = False
    created_at: int | None = None
    happened_at: int | None = None
    thread: str | None = None

    @property
    def thread_key(self) -> int | None:
        """The thread as the log refers to it."""
        return None if self.thread is None else thread_key(self.thread)

    @property
    def text_bytes(self) -> int:
        """The size of the text and the metadata in UTF-8."""
        return text_bytes(self.text, self.metadata)


def checked(memory: NewMemory, dim: int) -> Checked:
    """Check one memory.

    Raises:
        InvalidInput: `field` is the path of the invalid value within the memory.
    """
    check_new_id(memory.id, "id")
    check_text(memory.text, "text")
    stored, canonical = dump_metadata(memory.metadata, "metadata")
    embedding, crc = dump_vector(memory.vector, dim, "vector")
    if memory.thread is not None:
        check_id(memory.thread, "thread")
    return Checked(
        memory.id,
        memory.text,
        stored,
        canonical,
        None if memory.expires_at is None else micros(memory.expires_at, "expires_at"),
        embedding,
        crc,
        memory.generated_id,
        memory.given_vector,
        None if memory.created_at is None else micros(memory.created_at, "created_at"),
        None if memory.happened_at is None else micros(memory.happened_at, "happened_at"),
        memory.thread,
    )


def check_new_id(value: str, field: str) -> None:
    """Check an id as `check_id` does, and refuse "." and "..".

    HTTP clients remove these from a URL's path, which leaves the URL of the whole user.
    """
    check_id(value, field)
    if value in (".", ".."):
        raise InvalidInput("must not be . or .., which clients remove from a URL's path", field)


def check_id(value: str, field: str) -> None:
    """Check that an id has 1 to 256 characters, none of them a control character."""
    if not isinstance(value, str) or not 1 <= len(value) <= 256:
        raise InvalidInput("must be a string of 1 to 256 characters", field)
    if not (value.isascii() and value.isprintable()) and any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise InvalidInput("must not contain control characters", field)


def check_text(value: str, field: str) -> None:
    """Check a text that both databases must be able to store: valid Unicode without NUL."""
    if not isinstance(value, str):
        raise InvalidInput("must be a string", field)
    if "\0" in value:
        raise InvalidInput("must not contain NUL characters", field)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"must be valid Unicode: {error.reason}", field) from error


def dump_metadata(value: dict[str, Any], field: str) -> tuple[str, bytes]:
    """The JSON text to store, and the canonical JSON (with sorted keys) for the content hash."""
    if not isinstance(value, dict):
        raise InvalidInput("must be a JSON object", field)
    if not value:
        return "{}", b"{}"
    _check_json(value, (field,))
    try:
        return orjson.dumps(value).decode(), orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"must be JSON: {error}", field) from error


def _check_json(value: Any, path: tuple[str | int, ...]) -> None:
    """Check one value of metadata, and the values in it.

    The path is joined only for an error: a key may be as long as the request's body and have millions of items.
    """
    problem = _problem_of(value) if len(path) <= _MAX_DEPTH + 1 else f"must not be nested more than {_MAX_DEPTH} deep"
    if problem is not None:
        raise InvalidInput(problem, ".".join(map(str, path)))
    if isinstance(value, dict):
        for key, item in value.items():
            _check_json(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_json(item, (*path, number))


def _problem_of(value: Any) -> str | None:
    """Why a value cannot be stored as JSON, its items aside; None if it can."""
    if isinstance(value, str):
        return "must not contain NUL characters" if "\0" in value else None
    if isinstance(value, float):
        return None if math.isfinite(value) else "is not finite"
    if isinstance(value, dict):
        sound = all(isinstance(key, str) and "\0" not in key for key in value)
        return None if sound else "must have keys that are strings without NUL characters"
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**63 else "must be an integer of at most 64 bits"
    if value is None or isinstance(value, list):
        return None
    return f"must be JSON, not a {type(value).__name__}"


def check_vector(vector: npt.ArrayLike, dim: int, field: str) -> Vector:
    """The vector as `(dim,) float32`, if it is finite and not zero."""
    try:
        array = np.ascontiguousarray(vector, dtype="<f4")
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"must be a list of {dim} numbers", field) from error
    if array.shape != (dim,):
        raise InvalidInput(f"has the shape {array.shape}, but the vectors of the log have ({dim},)", field)
    norm = float(np.linalg.norm(array))
    if not math.isfinite(norm):
        if np.isfinite(array).all():  # only the sum of its squares is out of range
            raise InvalidInput("is too long to be normalised", field)
        raise InvalidInput("is not finite", field)
    if norm < 1e-18:
        raise InvalidInput("must not be zero: a zero vector has no direction", field)
    return array


def dump_vector(vector: npt.ArrayLike, dim: int, field: str) -> tuple[bytes, int]:
    """The bytes to store, and their checksum."""
    data = check_vector(vector, dim, field).tobytes()
    return data, zlib.crc32(data)


def load_vectors(blobs: Sequence[bytes], checksums: Sequence[int], dim: int) -> Vector:
    """The stored vectors as a new (n, dim) float32 array.

    Raises:
        LogDamaged: the length or the checksum of a vector is wrong.
    """
    for blob, checksum in zip(blobs, checksums, strict=True):
        if len(blob) != 4 * dim or zlib.crc32(blob) != checksum:
            raise damaged("a vector is not the one that was written")
    return np.frombuffer(b"".join(blobs), dtype="<f4").reshape(len(blobs), dim).astype(np.float32)


def unit_vectors(blobs: Sequence[bytes]) -> Vector:
    """The stored vectors, none of them zero, as (n, dim) float32 of length 1."""
    vectors = np.frombuffer(b"".join(blobs), "<f4").reshape(len(blobs), -1).astype(np.float64)
    unit: Vector = (vectors / np.sqrt((vectors**2).sum(axis=1))[:, None]).astype(np.float32)
    return unit


def text_bytes(text: str, metadata: str) -> int:
    """The size of a text and its metadata in UTF-8."""
    return sum(len(value) if value.isascii() else len(value.encode()) for value in (text, metadata))


def check_past(at: int, field: str, now: int) -> int:
    """The time of something that has happened. A future time would take precedence over every later write.

    Another machine's clock may be a minute ahead.
    """
    if at > now + _CLOCKS_APART_US:
        raise InvalidInput("must not be in the future", field)
    return at


def user_key(uid: int, id: str) -> bytes:
    """A 16-byte key for one memory of one user, so that one statement can look up memories of many users."""
    return hashlib.blake2b(id.encode(), digest_size=16, salt=struct.pack("<Q", uid)).digest()


def thread_key(name: str) -> int:
    """A positive number of 63 bits for the name of a thread: its hash."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1 or 1


def is_named(thread: int | None, name: str | None) -> bool:
    """Whether `name` is the name of a memory's thread, or both are None."""
    return (None if name is None else thread_key(name)) == thread


def content_hash(uid: int, text: str, canonical: bytes) -> bytes:
    """A 16-byte hash of the text and the canonical metadata of one user's memory."""
    hashed = hashlib.blake2b(text.encode(), digest_size=16, salt=struct.pack("<Q", uid))
    hashed.update(b"\0")
    hashed.update(canonical)
    return hashed.digest()


def stored_hash(uid: int, text: str, metadata: str) -> bytes:
    """The content hash of a stored text and its stored metadata."""
    if metadata == "{}":
        return content_hash(uid, text, b"{}")
    return content_hash(uid, text, orjson.dumps(orjson.loads(metadata), option=orjson.OPT_SORT_KEYS))


def micros(moment: datetime, field: str) -> int:
    """Microseconds since 1970 UTC. A time without a zone is refused."""
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise InvalidInput("must be a time with a zone", field)
    value = (moment - _EPOCH) // _MICROSECOND
    if not _EARLIEST <= value <= _LATEST:
        raise InvalidInput("must be in the years 1 to 9999 in UTC", field)
    return value


def moment(micros: int) -> datetime:
    """The stored time as an aware datetime in UTC."""
    return _EPOCH + timedelta(microseconds=micros)


def memory(
    row: Any,
    user_id: str,
    score: float | None = None,
    vector: Vector | None = None,
    scores: dict[str, float] | None = None,
) -> Memory:
    """The Memory in a row of CONTENT.

    Raises:
        LogDamaged: the text, the metadata or the name of the thread is not what was written.
    """
    _, id, text, metadata, created_at, updated_at, expires_at, version, digest, uid, key = row[:11]
    happened_at, thread, name = row[11:14]
    try:
        if text is None or stored_hash(uid, text, metadata) != digest or user_key(uid, id) != key:
            raise ValueError("hash")
        if not is_named(thread, name):
            raise ValueError("thread")
        parsed = orjson.loads(metadata)
        expires = None if expires_at is None else moment(expires_at)
        created = moment(created_at)
        updated = created if updated_at == created_at else moment(updated_at)  # sharing one value makes pickling faster
        happened = None if happened_at is None else moment(happened_at)
        return Memory(
            id, user_id, text, parsed, created, updated, expires, version, score, vector, scores, happened, name
        )
    except (ValueError, TypeError, OverflowError, struct.error) as error:
        raise damaged(f"memory {id!r} is not what was written") from error


def damaged(problem: str) -> LogDamaged:
    """The error for a row or a file that is not what was written."""
    return LogDamaged(f"The log is damaged: {problem}. Run: memserve log verify")
