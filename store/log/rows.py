"""What goes into a row, and what comes out of it: checked on the way in, verified on the way out.

Guarantees: whatever passed `checked()` can be stored and read back unchanged on SQLite and PostgreSQL; a row whose
text, metadata or vector was changed by anything but the store raises LogDamaged when it is read.
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
from store.log.schema import contents, memories
from store.records import Memory, NewMemory, Vector

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_EARLIEST = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_LATEST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
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
)
"""The columns that `memory()` takes, in its order, of `reading.with_contents`."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A NewMemory in the form of a row."""

    id: str
    text: str
    metadata: str
    canonical: bytes
    expires_at: int | None
    embedding: bytes
    vector_crc: int
    generated_id: bool = False


def checked(memory: NewMemory, dim: int, param: str) -> Checked:
    """Check one memory.

    Raises:
        InvalidInput: with the path of the field below `param`.
    """
    check_new_id(memory.id, f"{param}.id")
    check_text(memory.text, f"{param}.text")
    stored, canonical = dump_metadata(memory.metadata, f"{param}.metadata")
    embedding, crc = dump_vector(memory.vector, dim, f"{param}.vector")
    expires_at = None if memory.expires_at is None else micros(memory.expires_at, f"{param}.expires_at")
    return Checked(memory.id, memory.text, stored, canonical, expires_at, embedding, crc, memory.generated_id)


def check_new_id(value: str, param: str) -> None:
    """As `check_id`, and not . or .., which clients remove from a path: what is left would name the whole user."""
    check_id(value, param)
    if value in (".", ".."):
        raise InvalidInput("An id is not . or .., which clients remove from a path.", param)


def check_id(value: str, param: str) -> None:
    """1 to 256 characters, none of them a control character."""
    if not isinstance(value, str) or not 1 <= len(value) <= 256:
        raise InvalidInput("An id has 1 to 256 characters.", param)
    if not (value.isascii() and value.isprintable()) and any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise InvalidInput("An id holds no control characters.", param)


def check_text(value: str, param: str) -> None:
    """Text that both databases can hold: valid Unicode without NUL."""
    if not isinstance(value, str):
        raise InvalidInput("A text is a string.", param)
    if "\0" in value:
        raise InvalidInput("A text holds no NUL characters.", param)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"The text is not valid Unicode: {error.reason}.", param) from error


def dump_metadata(value: dict[str, Any], param: str) -> tuple[str, bytes]:
    """The JSON text to store, and the canonical one (sorted keys) that the content hash takes."""
    if not isinstance(value, dict):
        raise InvalidInput("Metadata is a JSON object.", param)
    if not value:
        return "{}", b"{}"
    _check_json(value, (param,))
    try:
        return orjson.dumps(value).decode(), orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"Metadata is not JSON: {error}", param) from error


def _check_json(value: Any, path: tuple[str | int, ...]) -> None:
    """`path` becomes one string in an error only: a key may be as long as its body, and have millions of items."""
    if len(path) > 33:
        raise _wrong("Metadata is nested more than 32 deep.", path)
    if isinstance(value, str):
        if "\0" in value:
            raise _wrong("Metadata holds no NUL characters.", path)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _wrong("Metadata holds a number that is not finite.", path)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or "\0" in key:
                raise _wrong("The keys of metadata are strings without NUL characters.", path)
            _check_json(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_json(item, (*path, number))
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise _wrong("Metadata holds an integer that does not fit 64 bits.", path)
    elif value is not None:
        raise _wrong(f"Metadata holds a {type(value).__name__}, which is not JSON.", path)


def _wrong(message: str, path: tuple[str | int, ...]) -> InvalidInput:
    return InvalidInput(message, ".".join(map(str, path)))


def check_vector(vector: npt.ArrayLike, dim: int, param: str) -> Vector:
    """`(dim,) float32`, finite and not zero, whatever array-like came in."""
    try:
        array = np.ascontiguousarray(vector, dtype="<f4")
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"A vector is a list of {dim} numbers.", param) from error
    if array.shape != (dim,):
        raise InvalidInput(f"The vector has shape {array.shape}, the log's vectors have ({dim},).", param)
    norm = float(np.linalg.norm(array))
    if not math.isfinite(norm):
        if np.isfinite(array).all():  # only its square is out of range
            raise InvalidInput("The vector is too long to be normalised.", param)
        raise InvalidInput("The vector is not finite.", param)
    if norm < 1e-18:
        raise InvalidInput("The vector is zero: it has no direction.", param)
    return array


def dump_vector(vector: npt.ArrayLike, dim: int, param: str) -> tuple[bytes, int]:
    """The bytes to store and their checksum."""
    data = check_vector(vector, dim, param).tobytes()
    return data, zlib.crc32(data)


def load_vectors(blobs: Sequence[bytes], checksums: Sequence[int], dim: int) -> Vector:
    """(n, dim) float32, a copy.

    Raises:
        LogDamaged: a vector has another length or checksum than when it was written.
    """
    for blob, checksum in zip(blobs, checksums, strict=True):
        if len(blob) != 4 * dim or zlib.crc32(blob) != checksum:
            raise LogDamaged("The log is damaged: a vector is not what was written. See: python -m store verify")
    return np.frombuffer(b"".join(blobs), dtype="<f4").reshape(len(blobs), dim).astype(np.float32)


def user_key(uid: int, id: str) -> bytes:
    """Names one memory of one user in 16 bytes, so that one statement looks up memories of many users."""
    return hashlib.blake2b(id.encode(), digest_size=16, salt=struct.pack("<Q", uid)).digest()


def content_hash(uid: int, text: str, canonical: bytes) -> bytes:
    """Identifies the content (text and metadata) of one user's memory: equal where both are equal."""
    hashed = hashlib.blake2b(text.encode(), digest_size=16, salt=struct.pack("<Q", uid))
    hashed.update(b"\0")
    hashed.update(canonical)
    return hashed.digest()


def stored_hash(uid: int, text: str, metadata: str) -> bytes:
    """The content hash of what a row holds."""
    if metadata == "{}":
        return content_hash(uid, text, b"{}")
    return content_hash(uid, text, orjson.dumps(orjson.loads(metadata), option=orjson.OPT_SORT_KEYS))


def micros(moment: datetime, param: str) -> int:
    """Microseconds since 1970 UTC; a time without a zone is refused."""
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise InvalidInput("A time carries its zone.", param)
    value = (moment - _EPOCH) // _MICROSECOND
    if not _EARLIEST <= value <= _LATEST:
        raise InvalidInput("A time lies in the years 1 to 9999 in UTC.", param)
    return value


def moment(micros: int) -> datetime:
    """The aware datetime of a stored time."""
    return _EPOCH + timedelta(microseconds=micros)


def memory(row: Any, user_id: str, score: float | None = None, vector: Vector | None = None) -> Memory:
    """The Memory of a row of CONTENT.

    Raises:
        LogDamaged: text or metadata are not what was written.
    """
    _, id, text, metadata, created_at, updated_at, expires_at, version, digest, uid, key = row[:11]
    try:
        if text is None or stored_hash(uid, text, metadata) != digest or user_key(uid, id) != key:
            raise ValueError("hash")
        parsed = orjson.loads(metadata)
        expires = None if expires_at is None else moment(expires_at)
        created = moment(created_at)
        updated = created if updated_at == created_at else moment(updated_at)  # one value to make, and to pickle
        return Memory(id, user_id, text, parsed, created, updated, expires, version, score, vector)
    except (ValueError, TypeError, OverflowError, struct.error) as error:
        raise LogDamaged(
            f"The log is damaged: memory {id!r} is not what was written. See: python -m store verify"
        ) from error
