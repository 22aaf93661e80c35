"""One memory as a line of NDJSON: how it is written, and how it is parsed and checked.

Guarantees: a line that was written and parsed yields the same memory, and written again the same bytes. What needs
neither the log nor the model is checked here, so that a line that cannot be used is refused before its text is embedded
and before any of its batch is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson
from pydantic_core import from_json

from store.errors import InvalidInput
from store.log.rows import check_id, check_new_id, check_past, check_text, dump_metadata, micros, moment
from store.records import Vector

_EVENTS = ("added", "updated", "deleted")


class PastState(NamedTuple):
    """A superseded state of an imported memory. Its vector is not kept.

    `at` is in microseconds, `text` is None if it was erased, `metadata` is JSON.
    """

    event: str
    at: int
    version: int
    text: str | None
    metadata: str

    @property
    def embedding(self) -> bytes:
        """No vector."""
        return b""

    @property
    def vector_crc(self) -> int:
        """The checksum of no vector."""
        return 0


class ImportLine(NamedTuple):
    """A checked line of an import. Times are in microseconds.

    `canonical` is the metadata as JSON with sorted keys. `version` is 0 if the line has none. `model` is the name of
    the model that made the vector, if the line names one. `vector: (n,) float32` may be of any length and is None if it
    has yet to be made from the text. `given_vector` tells whether the line holds it.
    """

    position: int
    id: str
    text: str
    metadata: str
    canonical: bytes
    created_at: int
    updated_at: int
    expires_at: int | None
    version: int
    event: Literal["added", "updated"]
    history: tuple[PastState, ...]
    model: str | None
    vector: Vector | None
    given_vector: bool
    happened_at: int | None = None
    thread: str | None = None


def write_line(row: Any, history: Sequence[dict[str, Any]], model: str, vector: Vector) -> bytes:
    """The line of a row of CONTENT and its `event`, with its history from `past_state`, ending in a newline.

    `happened_at` and `thread` are in it only if the memory has them.
    """
    line = {
        "id": row.id,
        "text": row.text,
        "metadata": orjson.Fragment(row.metadata),
        "created_at": _time(row.created_at),
        "updated_at": _time(row.updated_at),
        "expires_at": None if row.expires_at is None else _time(row.expires_at),
        "version": row.version,
        "event": row.event,
        "history": history,
        "model": model,
        "vector": vector,
    }
    if row.happened_at is not None:
        line["happened_at"] = _time(row.happened_at)
    if row.thread is not None:
        line["thread"] = row.thread_name
    return orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def past_state(row: Any, text: str | None, metadata: str | None) -> dict[str, Any]:
    """The superseded state of a row of the history, as a line holds it."""
    return {
        "event": row.event,
        "at": _time(row.at),
        "version": row.version,
        "text": text,
        "metadata": None if metadata is None else orjson.Fragment(metadata),
    }


def parse_lines(lines: Iterable[bytes], clock: Callable[[], datetime], first: int = 0) -> Iterator[ImportLine]:
    """Parse and check lines as they come. Positions count from `first`; empty lines count too, and are skipped.

    A field that is null counts as left out.

    Args:
        clock: gives the time of memories whose lines have no times, and the time after which a line's own are refused.

    Raises:
        InvalidInput: a line is invalid; the error has its position and the invalid field.
    """
    for position, data in enumerate(lines, first):
        if data.strip():
            try:
                line = _import_line(_json_object(data), position, micros(clock(), "now"))
            except InvalidInput as error:
                raise error.at(error.field, position) from error
            yield line


def _json_object(data: bytes) -> dict[str, Any]:
    """The fields of a line that are not null."""
    try:
        # Not orjson, which turns integers beyond 64 bits into floats. They must be refused.
        line = from_json(data, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise InvalidInput(f"is not valid JSON: {error}", None, "invalid_json") from error
    if not isinstance(line, dict):
        raise InvalidInput("must be a JSON object")
    return {name: value for name, value in line.items() if value is not None}


def _import_line(line: dict[str, Any], position: int, now: int) -> ImportLine:
    id, text = line.get("id", ""), line.get("text", 0)
    check_new_id(id, "id")
    check_text(text, "text")
    vector = _vector(line.get("vector"))
    if not text.strip() and (vector is None or "model" not in line):  # exports of older logs may hold blank texts
        raise InvalidInput("must not be empty", "text")
    metadata, canonical = dump_metadata(line.get("metadata", {}), "metadata")
    expires_at, happened_at, thread = line.get("expires_at"), line.get("happened_at"), line.get("thread")
    if thread is not None:
        check_id(thread, "thread")
    version = _version(line.get("version", 0), "version", -1, 2**62)
    event = line.get("event", "added")
    if event not in ("added", "updated"):
        raise InvalidInput("must be added or updated", "event")
    model = line.get("model")
    if vector is None:
        model = None  # it made the vector that the line once had
    elif "model" in line and not isinstance(model, str):
        raise InvalidInput("must be a string", "model")
    return ImportLine(
        position=position,
        id=id,
        text=text,
        metadata=metadata,
        canonical=canonical,
        created_at=_past_time(line["created_at"], "created_at", now) if "created_at" in line else now,
        updated_at=_past_time(line["updated_at"], "updated_at", now) if "updated_at" in line else now,
        expires_at=None if expires_at is None else _parsed_time(expires_at, "expires_at"),
        version=version,
        event=event,
        history=_history(line.get("history", []), version, now),
        model=model,
        vector=vector,
        given_vector=vector is not None,
        happened_at=None if happened_at is None else _parsed_time(happened_at, "happened_at"),
        thread=thread,
    )


def _vector(value: Any) -> Vector | None:
    """(n,) float32. The log checks length and values against its own vectors."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise InvalidInput("must be a list of numbers", "vector")
    try:
        return np.array(value, "<f4")
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput("must be a list of numbers", "vector") from error


def _history(states: Any, version: int, now: int) -> tuple[PastState, ...]:
    if not isinstance(states, list):
        raise InvalidInput("must be a list", "history")
    history: list[PastState] = []
    for n, state in enumerate(states):
        newest = history[-1].version if history else 0
        history.append(_past_state(state, f"history.{n}", newest, version, now))
    return tuple(history)


def _past_state(state: Any, field: str, newest: int, version: int, now: int) -> PastState:
    if not isinstance(state, dict) or state.get("event") not in _EVENTS:
        raise InvalidInput(f"must be one of {', '.join(_EVENTS)}", f"{field}.event")
    text, metadata = state.get("text"), state.get("metadata")
    if text is not None:
        check_text(text, f"{field}.text")
    return PastState(
        state["event"],
        _past_time(state.get("at"), f"{field}.at", now),
        _version(state.get("version"), f"{field}.version", newest, version),
        text,
        "{}" if metadata is None else dump_metadata(metadata, f"{field}.metadata")[0],
    )


def _version(value: Any, field: str, above: int, below: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not above < value < below:
        raise InvalidInput("must be a whole number that is greater than every earlier version of the memory", field)
    return value


def _time(value: int) -> str:
    return moment(value).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _past_time(value: Any, field: str, now: int) -> int:
    return check_past(_parsed_time(value, field), field, now)


def _parsed_time(value: Any, field: str) -> int:
    try:
        return micros(datetime.fromisoformat(value), field)
    except (TypeError, ValueError) as error:
        raise InvalidInput("must be an RFC 3339 time with its zone", field) from error
