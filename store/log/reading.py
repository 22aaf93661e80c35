"""The queries of the log. All functions run inside a caller's read transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import (
    BigInteger,
    BindParameter,
    Column,
    Connection,
    FromClause,
    and_,
    bindparam,
    case,
    func,
    literal_column,
    select,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from store.errors import InvalidInput
from store.log.filter_sql import condition
from store.log.rows import CONTENT, damaged, load_vectors
from store.log.schema import CHUNK, THREAD_NAME, contents, history, memories, meta, names, not_expired, users
from store.records import Filter, Vector

NEVER = np.iinfo(np.int64).max
NO_THREAD = 0
MAX_ANSWER = 16 << 20
"""The most characters of texts and metadata in one answer, unless it has a single memory, which may be longer."""


class byte_length(FunctionElement[int]):
    """The length of a text in bytes of UTF-8."""

    type = BigInteger()
    inherit_cache = True


@compiles(byte_length)
def _octet_length(element: byte_length, compiler: SQLCompiler, **options: Any) -> str:
    return f"octet_length({compiler.process(element.clauses, **options)})"


@compiles(byte_length, "sqlite")
def _blob_length(element: byte_length, compiler: SQLCompiler, **options: Any) -> str:
    return f"length(CAST({compiler.process(element.clauses, **options)} AS BLOB))"


class Position(NamedTuple):
    """A user's row, and the model that the log serves."""

    uid: int
    version: int
    epoch: int
    live: int
    removed_version: int
    erased_at: int
    forgotten_version: int
    model: str | None

    def reaches(self, epoch: int, version: int) -> bool:
        """Whether an index of this epoch and version can catch up with the log, or has done so."""
        return epoch == self.epoch and self.forgotten_version <= version <= self.version


class Places(NamedTuple):
    """When n memories were made and what they tell happened, in microseconds, and their threads; (n,) int64 each.

    `happened` is `created` for a memory without a time of its own. A memory in no thread has NO_THREAD.
    """

    created: npt.NDArray[np.int64]
    happened: npt.NDArray[np.int64]
    threads: npt.NDArray[np.int64]


class Changes(NamedTuple):
    """Changed rows that an index lacks, in the order of their versions.

    For each of the n rows: labels (n,) int64, versions (n,) int64, kept (n,) bool, which is False if the memory was
    deleted. For the m kept rows: expires (m,) int64 in microseconds or NEVER, vectors (m, dim) float32 as the model
    made them, their texts if they were asked for, and their places. Without places, all are at the time 0.
    """

    labels: npt.NDArray[np.int64]
    versions: npt.NDArray[np.int64]
    kept: npt.NDArray[np.bool_]
    expires: npt.NDArray[np.int64]
    vectors: Vector
    texts: Sequence[str] | None = None
    places: Places | None = None


VECTOR = (contents.c.vector_crc, contents.c.embedding)
"""The columns of `with_contents` with a vector's checksum and its bytes; NULL if the memory has no vector."""


def with_contents(model: int | BindParameter[int]) -> FromClause:
    """Memories joined with their current contents and their vectors of `model`; NULLs if the log is damaged."""
    return memories.outerjoin(
        contents,
        and_(
            contents.c.uid == memories.c.uid,
            contents.c.version == memories.c.version,
            contents.c.model == model,
            contents.c.blank == literal_column("0"),
        ),
    )


def with_names(model: int | BindParameter[int]) -> FromClause:
    """`with_contents`, joined with the names of the memories' threads; NULL if a memory is in none."""
    return with_contents(model).outerjoin(
        names,
        and_(
            names.c.uid == memories.c.uid,
            names.c.version == -memories.c.thread,
            names.c.model == literal_column(str(THREAD_NAME)),
            names.c.blank == literal_column("0"),
        ),
    )


def _load(pairs: Sequence[tuple[Any, Any]], dim: int) -> Vector:
    """The vectors of rows of VECTOR."""
    if any(blob is None for _, blob in pairs):
        raise damaged("a memory has no vector")
    return load_vectors([blob for _, blob in pairs], [checksum for checksum, _ in pairs], dim)


# Statements that every search runs are built once: building one takes longer than running it.
_POSITIONS = select(
    users.c.uid,
    users.c.version,
    users.c.epoch,
    users.c.live,
    users.c.removed_version,
    users.c.erased_at,
    users.c.forgotten_version,
    select(meta.c.value).where(meta.c.name == "model").scalar_subquery(),
).where(users.c.uid.in_(bindparam("uids", expanding=True)))
_MEMORIES = with_contents(bindparam("serving", type_=BigInteger))
_NAMED = with_names(bindparam("serving", type_=BigInteger))
_PLACE = (
    memories.c.created_at,
    func.coalesce(memories.c.happened_at, memories.c.created_at),
    func.coalesce(memories.c.thread, NO_THREAD),
)
_CHANGES = (
    select(memories.c.label, memories.c.version, memories.c.deleted, memories.c.expires_at, *_PLACE, *VECTOR)
    .select_from(_MEMORIES)
    .where(memories.c.uid == bindparam("of_uid"), memories.c.version > bindparam("after"))
    .order_by(memories.c.version)
    .limit(CHUNK)
)
_LIVE = _CHANGES.where(memories.c.deleted == 0)
TEXT_READ = 200_000
"""The characters of a text whose words count."""
_TEXT_CHUNK = 1_000  # rows with texts that are in memory at a time
_TEXT_TO_SPLIT = func.substr(contents.c.text, 1, TEXT_READ)
_CHANGES_AND_TEXTS = _CHANGES.add_columns(_TEXT_TO_SPLIT).limit(_TEXT_CHUNK)
_LIVE_AND_TEXTS = _LIVE.add_columns(_TEXT_TO_SPLIT).limit(_TEXT_CHUNK)
_TEXTS = (
    select(memories.c.label, memories.c.version, _TEXT_TO_SPLIT)
    .select_from(_MEMORIES)
    .where(memories.c.uid == bindparam("of_uid"), memories.c.version > bindparam("after"), memories.c.deleted == 0)
    .order_by(memories.c.version)
    .limit(_TEXT_CHUNK)
)
_PLACES = select(memories.c.label, *_PLACE).where(memories.c.uid == bindparam("of_uid"), memories.c.deleted == 0)
_BY_LABEL = (
    select(*CONTENT)
    .select_from(_NAMED)
    .where(memories.c.label.in_(bindparam("labels", expanding=True)), memories.c.deleted == 0)
)
_VECTORS = (
    select(memories.c.label, *VECTOR)
    .select_from(_MEMORIES)
    .where(memories.c.label.in_(bindparam("labels", expanding=True)), memories.c.deleted == 0)
)
_BY_KEY = (
    select(*CONTENT, *VECTOR)
    .select_from(_NAMED)
    .where(
        memories.c.key == bindparam("of_key"),
        memories.c.deleted == 0,
        not_expired(memories.c.expires_at, bindparam("now", type_=BigInteger)),
    )
)


def positions(connection: Connection, uids: Iterable[int]) -> dict[int, Position]:
    """The positions of the users that exist, by uid."""
    ordered = list(set(uids))
    found: dict[int, Position] = {}
    for start in range(0, len(ordered), CHUNK):
        rows = connection.execute(_POSITIONS, {"uids": ordered[start : start + CHUNK]})
        found.update({row[0]: Position(*row) for row in rows})
    return found


def changes(
    connection: Connection, uid: int, after: int, model: int, dim: int, *, with_texts: bool = False
) -> Iterator[Changes]:
    """The rows of a user that changed after a version, a few thousand at a time; after 0, only the live ones.

    Of each text the first `TEXT_READ` characters are read.

    Raises:
        LogDamaged: a vector is missing or is not the one that was written, or a text is missing.
    """
    if with_texts:
        most, statement = _TEXT_CHUNK, _LIVE_AND_TEXTS if after == 0 else _CHANGES_AND_TEXTS
    else:
        most, statement = CHUNK, _LIVE if after == 0 else _CHANGES
    while True:
        rows = connection.execute(statement, {"of_uid": uid, "after": after, "serving": model}).all()
        if rows:
            yield _changes(rows, dim, with_texts=with_texts)
        if len(rows) < most:
            return
        after = rows[-1].version


def _changes(rows: Sequence[Any], dim: int, *, with_texts: bool) -> Changes:
    alive = [row for row in rows if not row[2]]
    try:
        return Changes(
            np.fromiter((row[0] for row in rows), np.int64, len(rows)),
            np.fromiter((row[1] for row in rows), np.int64, len(rows)),
            np.fromiter((not row[2] for row in rows), np.bool_, len(rows)),
            np.fromiter((NEVER if row[3] is None else row[3] for row in alive), np.int64, len(alive)),
            _load([row[7:9] for row in alive], dim),
            _texts([row[9] for row in alive]) if with_texts else None,
            _places([row[4:7] for row in alive]),
        )
    except (TypeError, ValueError, OverflowError) as error:  # a column does not hold a number
        raise damaged(str(error)) from error


def places(connection: Connection, uid: int) -> tuple[npt.NDArray[np.int64], Places]:
    """The labels (n,) of a user's memories, ascending, and their places."""
    rows = connection.execute(_PLACES, {"of_uid": uid}).all()
    rows = sorted(rows, key=lambda row: row[0])
    return np.fromiter((row[0] for row in rows), np.int64, len(rows)), _places([row[1:] for row in rows])


def _places(found: Sequence[Any]) -> Places:
    """The rows of _PLACE."""
    return Places(*np.array(found, np.int64).reshape(len(found), 3).T.copy())


def texts(connection: Connection, uid: int, model: int) -> Iterator[tuple[npt.NDArray[np.int64], Sequence[str]]]:
    """The labels (n,) and the texts of a user's memories in the order of their versions, a thousand at a time.

    Of each text the first `TEXT_READ` characters are read.

    Raises:
        LogDamaged: a text is missing.
    """
    after = 0
    while True:
        rows = connection.execute(_TEXTS, {"of_uid": uid, "after": after, "serving": model}).all()
        yield np.fromiter((row[0] for row in rows), np.int64, len(rows)), _texts([row[2] for row in rows])
        if len(rows) < _TEXT_CHUNK:
            return
        after = rows[-1].version


def _texts(found: Sequence[Any]) -> Sequence[str]:
    """Texts that were read, if they are texts: SQLite may hold anything in a column."""
    if not all(isinstance(text, str) for text in found):
        raise damaged("a memory has no text")
    return found


def by_label(connection: Connection, labels: Sequence[int], model: int) -> dict[int, Any]:
    """The CONTENT of live memories, by label.

    Raises:
        InvalidInput: they are too long for one answer; see MAX_ANSWER.
    """
    found: dict[int, Any] = {}
    size = 0
    for start in range(0, len(labels), CHUNK):
        part = {"labels": labels[start : start + CHUNK], "serving": model}
        with connection.execute(_BY_LABEL, part) as rows:
            for row in rows:
                found[row[0]] = row
                size += _length(row)
                _check_answer(size, len(found), "top_k")
    return found


def _length(row: Any) -> int:
    return len(row.text or "") + len(row.metadata or "")


def _check_answer(size: int, number: int, field: str) -> None:
    """Raise InvalidInput if memories are too long for one answer. `field` can ask for fewer of them."""
    if size > MAX_ANSWER and number > 1:
        message = f"asks for memories with more than {MAX_ANSWER} characters together"
        raise InvalidInput(message, field, "answer_too_large")


def keys_of(connection: Connection, uid: int, labels: Sequence[int]) -> dict[int, bytes]:
    """The keys of those of a user's memories that are live, by label."""
    found: dict[int, bytes] = {}
    for start in range(0, len(labels), CHUNK):
        statement = select(memories.c.label, memories.c.key).where(
            memories.c.label.in_(labels[start : start + CHUNK]), memories.c.uid == uid, memories.c.deleted == 0
        )
        found.update({label: key for label, key in connection.execute(statement)})
    return found


def vectors(connection: Connection, labels: Sequence[int], model: int, dim: int) -> Vector:
    """The vectors of memories, (n, dim) float32 as the model made them, in the order of the labels.

    Raises:
        LogDamaged: a vector is missing or is not the one that was written.
    """
    found: dict[int, Any] = {}
    for start in range(0, len(labels), CHUNK):
        part = {"labels": labels[start : start + CHUNK], "serving": model}
        found.update({row[0]: row for row in connection.execute(_VECTORS, part)})
    rows = [found.get(label) for label in labels]
    return _load([row[1:] if row is not None else (None, None) for row in rows], dim)


def by_key(connection: Connection, key: bytes, model: int, now: int) -> Any | None:
    """The CONTENT and the VECTOR of one memory, unless it was deleted or has expired."""
    return connection.execute(_BY_KEY, {"of_key": key, "serving": model, "now": now}).first()


def by_keys(
    connection: Connection,
    keys: Sequence[bytes],
    model: int,
    now: int,
    *,
    with_vectors: bool = False,
    for_answer: bool = False,
) -> dict[bytes, Any]:
    """The CONTENT of those memories that were not deleted and have not expired, by key; and the VECTOR if wanted.

    Raises:
        InvalidInput: they are `for_answer` and too long for one; see MAX_ANSWER.
    """
    statement = (
        select(*CONTENT, *(VECTOR if with_vectors else ()))
        .select_from(with_names(model))
        .where(memories.c.key.in_(keys), memories.c.deleted == 0, not_expired(memories.c.expires_at, now))
    )
    found: dict[bytes, Any] = {}
    size = 0
    with connection.execute(statement) as rows:
        for row in rows:
            found[row.key] = row
            size += _length(row)
            if for_answer:
                _check_answer(size, len(found), "ids")
    return found


def deleted_at(connection: Connection, label: int) -> int:
    """When a memory that was added again was last deleted; 0 if never."""
    statement = select(func.max(history.c.at)).where(history.c.label == label, history.c.event == "deleted")
    return connection.execute(statement).scalar() or 0


def matching(
    connection: Connection, uid: int, column: Column[Any], *, filter: Filter, model: int, now: int
) -> list[Any]:
    """The values of `column` for the user's memories that match a filter."""
    statement = select(column).select_from(with_contents(model))
    statement = statement.where(
        memories.c.uid == uid,
        memories.c.deleted == 0,
        not_expired(memories.c.expires_at, now),
        condition(filter, connection.dialect.name),
    )
    return list(connection.execute(statement).scalars())


def matching_since(
    connection: Connection, uid: int, after: int, *, filter: Filter, model: int
) -> tuple[list[int], list[int]]:
    """The labels of rows that changed after a version, and of those among them that match a filter.

    The first list includes deleted memories, and both include expired ones. After version 0 the first list holds only
    the matches.
    """
    matches = and_(memories.c.deleted == 0, condition(filter, connection.dialect.name))
    statement = select(memories.c.label, case((matches, 1), else_=0)).select_from(with_contents(model))
    if after == 0:
        statement = statement.where(matches)
    rows = connection.execute(statement.where(memories.c.uid == uid, memories.c.version > after)).all()
    return [label for label, _ in rows], [label for label, matched in rows if matched]


def expired(connection: Connection, now: int, limit: int) -> list[tuple[int, bytes]]:
    """(uid, key) of up to `limit` memories that have expired, of any users."""
    statement = select(memories.c.uid, memories.c.key).where(memories.c.expires_at <= now).limit(limit)
    return [(uid, key) for uid, key in connection.execute(statement)]


def contents_of(connection: Connection, uid: int, versions: Sequence[int]) -> dict[tuple[int, int], tuple[str, str]]:
    """The text and the metadata of those states that were not erased, by (uid, version)."""
    found: dict[tuple[int, int], tuple[str, str]] = {}
    for start in range(0, len(versions), CHUNK):
        statement = select(contents.c.version, contents.c.text, contents.c.metadata).where(
            contents.c.uid == uid,
            contents.c.version.in_(versions[start : start + CHUNK]),
            contents.c.blank == literal_column("0"),
        )
        found.update({(uid, version): (text, metadata) for version, text, metadata in connection.execute(statement)})
    return found
