"""A user's memories as NDJSON, out and in: one memory with its vector and history a line.

Guarantees: what is exported, imported into a user without memories (none that was deleted since the import was sent,
either) and exported again is the same byte for byte; also where others wrote while it was exported. An import is
written in transactions of some hundred lines and can be repeated: lines that are there already are `unchanged`, and so
are those that were there until their time was over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
from pydantic_core import from_json
from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from store.errors import Conflict, InvalidInput
from store.log.reading import VECTOR, Position, what_was_said, with_contents
from store.log.rows import (
    CONTENT,
    Checked,
    check_new_id,
    check_text,
    content_hash,
    dump_metadata,
    dump_vector,
    load_vectors,
    memory,
    micros,
    moment,
    user_key,
)
from store.log.schema import CHUNK, history, memories
from store.log.users import User
from store.log.writing import content_of, forget, or_never, write_contents

PAGE = 200
_EVENTS = ("added", "updated", "deleted")
_CLOCKS_APART_US = 60_000_000  # an export may come from a machine whose clock is ahead


class ExportCursor(NamedTuple):
    """Where an export stands: what it has reached, and what it began with."""

    after: int  # version of the last line
    version: int  # of the user at the beginning; a memory above it has changed since, and may come again
    newest: int  # label of the newest memory at the beginning
    epoch: int


@dataclass(frozen=True, slots=True)
class ExportPage:
    """Some lines of an export, the labels (n,) int64 of their memories, and where to go on, or None at the end."""

    lines: list[bytes]
    labels: npt.NDArray[np.int64]
    following: ExportCursor | None
    repeats: bool  # some may have come before


NOTHING = ExportPage([], np.empty(0, np.int64), None, False)


class Sent:
    """The memories of one export that were given, eight bytes each."""

    def __init__(self) -> None:
        self._labels: list[npt.NDArray[np.int64]] = []

    def fresh(self, page: ExportPage) -> list[bytes]:
        """The page's lines without the memories that came before, which count as given from now on."""
        lines = page.lines
        if page.repeats and self._labels:
            repeated = np.isin(page.labels, np.concatenate(self._labels))
            lines = [line for line, again in zip(lines, repeated, strict=True) if not again]
        self._labels.append(page.labels)
        return lines


def begin_export(connection: Connection, position: Position) -> ExportCursor:
    """Before the first line."""
    newest = connection.execute(select(func.max(memories.c.label))).scalar()
    return ExportCursor(0, position.version, newest or 0, position.epoch)


def export_page(
    connection: Connection, uid: int, cursor: ExportCursor, *, model: str, model_id: int, dim: int, now: int
) -> ExportPage:
    """The lines of the next memories, in the order of versions.

    Raises:
        LogDamaged: a row is not what was written.
    """
    statement = (
        select(*CONTENT, *VECTOR, memories.c.event)
        .select_from(with_contents(model_id))
        .where(
            memories.c.uid == uid,
            memories.c.version > cursor.after,
            memories.c.label <= cursor.newest,
            memories.c.deleted == 0,
            or_never(memories.c.expires_at, now),
        )
        .order_by(memories.c.version)
        .limit(PAGE)
    )
    found = list(connection.execute(statement))
    events = (
        select(history.c.label, history.c.event, history.c.at, history.c.version)
        .where(history.c.label.in_([row.label for row in found]))
        .order_by(history.c.label, history.c.version)
    )
    superseded = list(connection.execute(events))
    said = what_was_said(connection, uid, [row.version for row in superseded])
    past: dict[int, list[Any]] = {}
    for event in superseded:
        text, written = said.get((uid, event.version), (None, None))
        past.setdefault(event.label, []).append(_event_out(event, text, written))
    checked = [memory(row, "") for row in found]  # raises where a row is damaged
    vectors = load_vectors([row.embedding for row in found], [row.vector_crc for row in found], dim)
    lines = []
    for row, _, vector in zip(found, checked, vectors, strict=True):
        line = {
            "id": row.id,
            "text": row.text,
            "metadata": orjson.Fragment(row.metadata),
            "created_at": _time_out(row.created_at),
            "updated_at": _time_out(row.updated_at),
            "expires_at": None if row.expires_at is None else _time_out(row.expires_at),
            "version": row.version,
            "event": row.event,
            "history": past.get(row.label, []),
            "model": model,
            "vector": vector,
        }
        lines.append(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
    if not found:
        return NOTHING
    labels = np.fromiter((row.label for row in found), np.int64, len(found))
    newest = found[-1].version
    following = cursor._replace(after=newest) if len(found) == PAGE else None
    return ExportPage(lines, labels, following, repeats=newest > cursor.version)


@dataclass(slots=True)
class Past:
    """A superseded state of an imported memory. Its vector is not kept."""

    event: str
    at: int
    version: int
    text: str | None
    metadata: str
    embedding: bytes = b""
    vector_crc: int = 0


class Line:
    """One checked line of an import."""

    __slots__ = ("checked", "created_at", "event", "history", "number", "updated_at", "version")

    def __init__(self, data: bytes, number: int, model: str, dim: int) -> None:
        """Raises InvalidInput with `param` lines.NUMBER.FIELD."""
        self.number = number
        param = f"lines.{number}"
        try:
            # Not orjson: it makes floats of integers beyond 64 bits, which are to be refused.
            line = from_json(data, allow_inf_nan=False, cache_strings="keys")
        except ValueError as error:
            raise InvalidInput(f"The line is not JSON: {error}", param) from error
        if not isinstance(line, dict):
            raise InvalidInput("The line is not a JSON object.", param)
        if line.get("model", model) != model:
            raise InvalidInput(f"The vector was made by {line['model']}, this log serves {model}.", f"{param}.model")
        check_new_id(line.get("id", ""), f"{param}.id")
        check_text(line.get("text", 0), f"{param}.text")
        if not line["text"].strip() and "model" not in line:  # one of an export may be: older logs hold some
            raise InvalidInput("A text is not empty.", f"{param}.text")
        stored, canonical = dump_metadata(line.get("metadata", {}), f"{param}.metadata")
        vector = line.get("vector")
        if not isinstance(vector, list):
            raise InvalidInput("A line holds the vector.", f"{param}.vector")
        embedding, crc = dump_vector(vector, dim, f"{param}.vector")
        now = micros(datetime.now(UTC), param)
        expires_at = None if line.get("expires_at") is None else _time_in(line["expires_at"], f"{param}.expires_at")
        self.checked = Checked(line["id"], line["text"], stored, canonical, expires_at, embedding, crc)
        self.created_at = _past_in(line["created_at"], f"{param}.created_at", now) if "created_at" in line else now
        self.updated_at = _past_in(line["updated_at"], f"{param}.updated_at", now) if "updated_at" in line else now
        self.version = _version_in(line.get("version", 0), f"{param}.version", -1, 2**62)
        self.event = line.get("event", "added")
        if self.event not in ("added", "updated"):
            raise InvalidInput("The event of a memory is added or updated.", f"{param}.event")
        events = line.get("history", [])
        if not isinstance(events, list):
            raise InvalidInput("The history is a list.", f"{param}.history")
        self.history: list[Past] = []
        newest = 0
        for n, event in enumerate(events):
            self.history.append(_event_in(event, f"{param}.history.{n}", newest, self.version, now))
            newest = self.history[-1].version


def begin_import(connection: Connection, user: User, issued_at: int | None) -> None:
    """A user without memories begins anew, so that the imported versions can be kept.

    Its tombstones go; what they kept out stays out, by the time of its erasure. So it goes on as it is where that time
    would keep out this import: its tombstones know which of the lines they are of.
    """
    if user.live:
        return
    last = select(func.max(memories.c.updated_at)).where(memories.c.uid == user.uid)
    newest = connection.execute(last).scalar() or 0
    if issued_at is not None and issued_at <= newest:
        return
    forget(connection, user)
    user.erased_at = max(user.erased_at, newest)
    user.version = user.removed_version = 0
    user.epoch += 1


def import_part(
    connection: Connection, user: User, lines: Sequence[Line], model: int, issued_at: int | None
) -> tuple[int, int]:
    """Write some lines. Returns how many were imported, and how many were there already.

    Raises:
        Conflict: the user has a memory of a line's id with other content, or erased it after `issued_at`.
    """
    if issued_at is not None and issued_at <= user.erased_at:
        raise Conflict("The user was erased after this import was sent.", f"lines.{lines[0].number}", "erased")
    keys = [user_key(user.uid, line.checked.id) for line in lines]
    statement = select(
        memories.c.key,
        memories.c.label,
        memories.c.deleted,
        memories.c.content_hash,
        memories.c.expires_at,
        memories.c.updated_at,
    ).where(memories.c.key.in_(keys))
    known = {row.key: row for row in connection.execute(statement)}
    fresh = [(key, line) for key, line in zip(keys, lines, strict=True) if not _has_expired(line, known.get(key))]
    unchanged = len(lines) - len(fresh)
    buried = {key: known[key].label for key, _ in fresh if key in known and known[key].deleted}
    for key, line in fresh if issued_at is not None else ():
        if key in buried and issued_at <= known[key].updated_at:
            message = f"The memory {line.checked.id!r} was deleted after this import was sent."
            raise Conflict(message, f"lines.{line.number}.id", "deleted")
    if buried:
        connection.execute(delete(history).where(history.c.label.in_(buried.values())))
    taken = _taken(connection, user.uid, [event.version for _, line in fresh for event in line.history])
    added: dict[bytes, tuple[Line, dict[str, Any]]] = {}
    for key, line in fresh:
        checked = line.checked
        digest = content_hash(user.uid, checked.text, checked.canonical)
        row = known.get(key)
        there: tuple[bytes, int | None] | None = None
        if key in added:
            there = added[key][1]["content_hash"], added[key][1]["expires_at"]
        elif row is not None and not row.deleted:
            there = row.content_hash, row.expires_at
        if there is not None:
            if there != (digest, checked.expires_at):
                raise Conflict(f"The id {checked.id!r} has other content.", f"lines.{line.number}.id", "id_conflict")
            unchanged += 1
            continue
        versions = {event.version for event in line.history}
        if line.version <= user.version or versions & taken:
            for event in line.history:
                event.version = user.stamp()
            user.stamp()
        else:
            user.version = line.version
        taken.update([user.version, *(event.version for event in line.history)])
        user.live += 1
        added[key] = (
            line,
            {
                "uid": user.uid,
                "key": key,
                "version": user.version,
                "event": line.event,
                "created_at": line.created_at,
                "updated_at": line.updated_at,
                "expires_at": checked.expires_at,
                "deleted": 0,
                "content_hash": digest,
                "id": checked.id,
            },
        )
    if added:
        rows = [row for key, (_, row) in added.items() if key not in buried]
        if rows:
            connection.execute(insert(memories), rows)
        # A tombstone becomes its memory again: an index that lacked its row would not learn that the label had died.
        rows = [{"of_label": buried[key], **row} for key, (_, row) in added.items() if key in buried]
        if rows:
            connection.execute(update(memories).where(memories.c.label == bindparam("of_label")), rows)
        said = [content_of(line.checked, user.uid, row["version"], model) for line, row in added.values()]
        past = [event for line, _ in added.values() for event in line.history if event.text is not None]
        said += [content_of(event, user.uid, event.version, model) for event in past]
        write_contents(connection, said)
    with_past = [key for key, (line, _) in added.items() if line.history]
    if with_past:
        labels = select(memories.c.key, memories.c.label).where(memories.c.key.in_(with_past))
        events = [
            {"label": label, "uid": user.uid, "version": event.version, "event": event.event, "at": event.at}
            for key, label in connection.execute(labels)
            for event in added[key][0].history
        ]
        connection.execute(insert(history), events)
    return len(added), unchanged


def _has_expired(line: Line, row: Any) -> bool:
    """Whether `row` is the tombstone of a memory whose time was over when it was deleted, by what the line says."""
    ends = line.checked.expires_at
    return row is not None and row.deleted and ends is not None and ends <= row.updated_at


def _taken(connection: Connection, uid: int, named: Sequence[int]) -> set[int]:
    """Those of the versions that a state of the user has, whether or not a text of it is left."""
    taken: set[int] = set()
    for table in (history, memories):
        for start in range(0, len(named), CHUNK):
            of_these = table.c.version.in_(named[start : start + CHUNK])
            statement = select(table.c.version).where(table.c.uid == uid, of_these)
            taken.update(connection.execute(statement).scalars())
    return taken


def numbered(lines: Iterator[bytes], first: int, model: str, dim: int) -> Iterator[Line]:
    """Check lines as they come, counted from `first`; empty ones are skipped."""
    for number, data in enumerate(lines, first):
        if data.strip():
            yield Line(data, number, model, dim)


def _event_out(row: Any, text: str | None, metadata: str | None) -> dict[str, Any]:
    return {
        "event": row.event,
        "at": _time_out(row.at),
        "version": row.version,
        "text": text,
        "metadata": None if metadata is None else orjson.Fragment(metadata),
    }


def _event_in(event: Any, param: str, newest: int, version: int, now: int) -> Past:
    if not isinstance(event, dict) or event.get("event") not in _EVENTS:
        raise InvalidInput(f"An event is one of {', '.join(_EVENTS)}.", f"{param}.event")
    text, metadata = event.get("text"), event.get("metadata")
    if text is not None:
        check_text(text, f"{param}.text")
    return Past(
        event["event"],
        _past_in(event.get("at"), f"{param}.at", now),
        _version_in(event.get("version"), f"{param}.version", newest, version),
        text,
        "{}" if metadata is None else dump_metadata(metadata, f"{param}.metadata")[0],
    )


def _version_in(value: Any, param: str, above: int, below: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not above < value < below:
        raise InvalidInput("Versions are whole numbers that grow along the history.", param)
    return value


def _time_out(value: int) -> str:
    return moment(value).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _past_in(value: Any, param: str, now: int) -> int:
    """A time at which something has happened: what is younger than every write would win over each of them."""
    at = _time_in(value, param)
    if at > now + _CLOCKS_APART_US:
        raise InvalidInput("A time at which something has happened is not in the future.", param)
    return at


def _time_in(value: Any, param: str) -> int:
    try:
        return micros(datetime.fromisoformat(value), param)
    except (TypeError, ValueError) as error:
        raise InvalidInput("A time is an RFC 3339 string with its zone.", param) from error
