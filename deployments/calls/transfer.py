"""A user's memories out and in as NDJSON, one memory a line, in pieces of bounded size: nothing is held whole.

Guarantees:
- An export holds each memory once, in the order of versions, whoever writes or dies meanwhile. Where the user is erased
  meanwhile it breaks off with an error, and does not end like one that is complete.
- An import is written piece by piece, each in one transaction, in the order of its lines. Where it fails the pieces
  before are there, of the piece that failed nothing is; sent again, the lines that are there are `unchanged`.
- Lines are counted from 0, like every position in a path; empty ones count and are skipped.
"""

import json
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import orjson
from pydantic_core import from_json

from deployments.errors import InvalidRequest, TooLarge, renumbered
from store import ExportCursor, ExportPage, Imported, Sent

PIECE_LINES = 200
PIECE_BYTES = 1024 * 1024

PageAfter = Callable[[ExportCursor | None], Awaitable[ExportPage]]
Embed = Callable[[list[str]], Awaitable[np.ndarray]]


class Piece(NamedTuple):
    """Lines that follow one another, and the number of the first."""

    first: int
    lines: list[bytes]


Write = Callable[[Piece], Awaitable[Imported]]


async def export_pieces(page_after: PageAfter) -> AsyncIterator[bytes]:
    """All lines of an export, some hundred at a time."""
    sent = Sent()
    cursor: ExportCursor | None = None
    while True:
        page = await page_after(cursor)
        lines = sent.fresh(page)
        if lines:
            yield b"".join(lines)
        cursor = page.following
        if cursor is None:
            return


async def import_pieces(chunks: AsyncIterable[bytes], *, max_line_bytes: int, embed: Embed, write: Write) -> Imported:
    """Import lines as they arrive.

    Args:
        chunks: NDJSON, cut anywhere.
        embed: (n, dim) vectors of n texts.
        write: imports a piece whose lines all bring a vector.

    Raises:
        InvalidRequest: a line cannot be used; `param` is its path (`lines.7.text`).
        TooLarge: a line is longer than `max_line_bytes`.
    """
    imported = unchanged = 0
    async for piece in _pieces(split_lines(chunks, max_line_bytes)):
        done = await write(Piece(piece.first, await _with_vectors(piece, embed)))
        imported, unchanged = imported + done.imported, unchanged + done.unchanged
    return Imported(imported, unchanged)


async def split_lines(chunks: AsyncIterable[bytes], max_line_bytes: int) -> AsyncIterator[bytes]:
    """The lines of a stream, without their newlines. Raises TooLarge as soon as one is known to be longer."""
    begun: list[bytes] = []
    size = number = 0
    async for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            begun.append(line)
            _check_length(size + len(line), max_line_bytes, number)
            yield b"".join(begun)
            begun.clear()
            size = 0
            number += 1
        begun.append(rest)
        size += len(rest)
        _check_length(size, max_line_bytes, number)
    if size:
        yield b"".join(begun)


def _check_length(size: int, max_line_bytes: int, number: int) -> None:
    if size > max_line_bytes:
        raise TooLarge(f"lines.{number} is longer than {max_line_bytes} bytes.", f"lines.{number}", "line_too_large")


async def _pieces(lines: AsyncIterable[bytes]) -> AsyncIterator[Piece]:
    """Lines in pieces; each piece holds one that is not empty."""
    first, size = 0, 0
    held: list[bytes] = []
    async for line in lines:
        held.append(line.strip())
        size += len(held[-1])
        if len(held) == PIECE_LINES or size >= PIECE_BYTES:
            if size:
                yield Piece(first, held)
            first, size, held = first + len(held), 0, []
    if size:
        yield Piece(first, held)


async def _with_vectors(piece: Piece, embed: Embed) -> list[bytes]:
    """The piece's lines, those that brought no vector with one; the log checks all the rest."""
    lines = list(piece.lines)
    bare = {n: line for n, data in enumerate(lines) if data and (line := _bare(data, f"lines.{piece.first + n}"))}
    if bare:
        places = list(bare)
        texts = [line["text"] for line in bare.values()]
        with renumbered([piece.first + place for place in places], "text"):
            vectors = await embed(texts)
        for (n, line), vector in zip(bare.items(), vectors, strict=True):
            try:  # not by orjson, which writes no integers beyond 64 bits: the log names them
                said = json.dumps(line, ensure_ascii=False, allow_nan=False)
            except ValueError as error:  # 1e999
                path = f"lines.{piece.first + n}"
                raise InvalidRequest(f"{path} holds a number that is not finite.", path) from error
            added = orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)
            lines[n] = said.removesuffix("}").encode() + b', "vector": ' + added + b"}"
    return lines


def _bare(data: bytes, path: str) -> dict[str, Any] | None:
    """The line, if it has no vector; without that, and without the name of the model that made the one it once had."""
    try:
        line = from_json(data, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise InvalidRequest(f"{path} is not valid JSON: {error}.", path, "invalid_json") from error
    if not isinstance(line, dict):
        raise InvalidRequest(f"{path} must be a JSON object.", path)
    if line.pop("vector", None) is not None:
        return None
    text = line.get("text")
    if not isinstance(text, str) or not text.strip():
        raise InvalidRequest(f"{path}.text must be a text that is not empty.", f"{path}.text")
    line.pop("model", None)
    return line


def one_line(given: str | bytes | Mapping[str, Any], path: str) -> bytes:
    """A line, or a mapping in its place, as a line of NDJSON. Raises InvalidRequest naming `path`."""
    try:
        data = given.encode() if isinstance(given, str) else given
        if not isinstance(data, bytes):
            data = orjson.dumps(dict(data), option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_UTC_Z)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{path} must hold JSON: {error}.", path) from error
    if b"\n" in data.rstrip():
        raise InvalidRequest(f"{path} must be one line.", path)
    return data.rstrip() + b"\n"
