"""Exports: all memories of a user as NDJSON, page by page.

Guarantees: an export holds each memory once, in the order of versions, even if others write meanwhile: a memory that
changes is exported as it was before or after the change, and memories that are added meanwhile are left out. An export
that is imported into a user without memories, and with none deleted since the import was sent, can be exported again
byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import ColumnElement, Connection, and_, func, literal_column, select

from store.log.ndjson import past_state, write_line
from store.log.reading import VECTOR, Position, byte_length, contents_of, with_contents, with_names
from store.log.rows import CONTENT, load_vectors, memory
from store.log.schema import contents, history, memories, not_expired

PAGE = 200  # lines at most
PAGE_BYTES = 4 << 20  # of a page's lines: it ends with the first line that takes it there
_NUMBER_BYTES = 12  # of one number of a vector in a line
_STATE_BYTES = 128  # of a superseded state, without its text and metadata


class ExportCursor(NamedTuple):
    """How far an export has come, and the state of the user when it began."""

    after: int  # version of the last line
    version: int  # of the user when the export began: a memory above it has changed since, and may be repeated
    newest: int  # label of the newest memory when the export began
    epoch: int


@dataclass(frozen=True, slots=True)
class ExportPage:
    """Lines of an export, and the labels (n,) int64 of their memories.

    `next_cursor` is None on the last page. `may_repeat`: the page may hold memories that an earlier page held.
    """

    lines: list[bytes]
    labels: npt.NDArray[np.int64]
    next_cursor: ExportCursor | None
    may_repeat: bool


EMPTY_PAGE = ExportPage([], np.empty(0, np.int64), None, False)


class Deduplicator:
    """Drops the lines of memories that an earlier page of the same export held. It keeps eight bytes a memory."""

    def __init__(self) -> None:
        self._labels: list[npt.NDArray[np.int64]] = []

    def new_lines(self, page: ExportPage) -> list[bytes]:
        """The page's lines, without memories of earlier pages."""
        lines = page.lines
        if page.may_repeat and self._labels:
            repeated = np.isin(page.labels, np.concatenate(self._labels))
            lines = [line for line, again in zip(lines, repeated, strict=True) if not again]
        self._labels.append(page.labels)
        return lines


def begin_export(connection: Connection, position: Position) -> ExportCursor:
    """The cursor of the first page."""
    newest = connection.execute(select(func.max(memories.c.label))).scalar()
    return ExportCursor(0, position.version, newest or 0, position.epoch)


def export_page(
    connection: Connection, uid: int, cursor: ExportCursor, *, model: str, model_id: int, dim: int, now: int
) -> ExportPage:
    """The lines of the next memories, in the order of versions.

    Raises:
        LogDamaged: a row is not what was written.
    """
    exported = and_(
        memories.c.uid == uid,
        memories.c.version > cursor.after,
        memories.c.label <= cursor.newest,
        memories.c.deleted == 0,
        not_expired(memories.c.expires_at, now),
    )
    last, has_more = _end_of_page(connection, exported, model_id, dim)
    statement = (
        select(*CONTENT, *VECTOR, memories.c.event)
        .select_from(with_names(model_id))
        .where(exported, memories.c.version <= last)
        .order_by(memories.c.version)
    )
    rows = connection.execute(statement).all()
    if not rows:
        return EMPTY_PAGE
    for row in rows:
        memory(row, "")  # raises if the row is damaged
    past = _past_states(connection, uid, [row.label for row in rows])
    vectors = load_vectors([row.embedding for row in rows], [row.vector_crc for row in rows], dim)
    lines = [write_line(row, past.get(row.label, []), model, vector) for row, vector in zip(rows, vectors, strict=True)]
    labels = np.fromiter((row.label for row in rows), np.int64, len(rows))
    newest = rows[-1].version
    next_cursor = cursor._replace(after=newest) if has_more else None
    return ExportPage(lines, labels, next_cursor, may_repeat=newest > cursor.version)


def _end_of_page(connection: Connection, exported: ColumnElement[bool], model_id: int, dim: int) -> tuple[int, bool]:
    """The version of the page's last memory, and whether more may follow. Reads no further than the page goes."""
    past = (
        select(
            func.coalesce(
                func.sum(
                    func.coalesce(byte_length(contents.c.text) + byte_length(contents.c.metadata), 0) + _STATE_BYTES
                ),
                0,
            )
        )
        .select_from(
            history.outerjoin(
                contents,
                and_(
                    contents.c.uid == history.c.uid,
                    contents.c.version == history.c.version,
                    contents.c.blank == literal_column("0"),
                ),
            )
        )
        .where(history.c.label == memories.c.label)
        .scalar_subquery()
    )
    own = func.coalesce(byte_length(contents.c.text) + byte_length(contents.c.metadata), 0)
    statement = (
        select(memories.c.version, own + past)
        .select_from(with_contents(model_id))
        .where(exported)
        .order_by(memories.c.version)
        .limit(PAGE)
    )
    last = size = count = 0
    with connection.execute(statement) as rows:
        for version, weight in rows:
            last = version
            count += 1
            size += weight + _NUMBER_BYTES * dim
            if size >= PAGE_BYTES:
                return last, True
    return last, count == PAGE


def _past_states(connection: Connection, uid: int, labels: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """The superseded states of the memories, oldest first, by label."""
    statement = (
        select(history.c.label, history.c.event, history.c.at, history.c.version)
        .where(history.c.label.in_(labels))
        .order_by(history.c.label, history.c.version)
    )
    rows = connection.execute(statement).all()
    contents = contents_of(connection, uid, [row.version for row in rows])
    states: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        text, metadata = contents.get((uid, row.version), (None, None))
        states.setdefault(row.label, []).append(past_state(row, text, metadata))
    return states
