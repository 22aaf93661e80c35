"""Exports and imports of a user's memories as NDJSON, in pieces of bounded size, so that no stream is held in memory.

Guarantees:
- An export holds each memory once, in the order of versions, even if others write meanwhile or replicas die. If the
  user is erased meanwhile, the export fails; it never ends like a complete one.
- An import is written piece by piece, each in one transaction, in the order of its lines. If it fails, the pieces
  before the failure are written, and nothing of the piece that failed is. If it is sent again, the lines that were
  written are `unchanged`.
- Each line is parsed once, here. Lines are counted from 0, like every position in a path; empty lines count and are
  skipped. There may be about as many bytes of them as of other lines, so that a small compressed body cannot hold
  millions.
- Of the lines that are longer than a request's body may be, one at a time is held in memory: others wait for it.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import orjson

from deployments.errors import InvalidRequest, LocatedError, Overloaded, TooLarge, renumbered
from store import Deduplicator, ExportCursor, ExportPage, Imported, ImportLine, parse_lines

PIECE_LINES = 200
PIECE_BYTES = 1024 * 1024
MAX_EMPTY_BYTES = 64 * 1024  # of empty lines, beyond those of other lines; reading them takes 70 ms

PageAfter = Callable[[ExportCursor | None], Awaitable[ExportPage]]
Embed = Callable[[list[str]], Awaitable[np.ndarray]]
Check = Callable[[], Awaitable[None]]
Write = Callable[[Sequence[ImportLine]], Awaitable[Imported]]


class LongLines:
    """Lets one line at a time be longer than `above_bytes`. Belongs to one event loop.

    Args:
        wait_s: the longest time that another long line waits. A client that stops sending in the middle of one would
            hold up all others.
    """

    def __init__(self, above_bytes: int, wait_s: float = 30.0) -> None:
        self.above_bytes = above_bytes
        self._wait_s = wait_s
        self._lock = asyncio.Lock()

    async def begin(self) -> None:
        """Wait for the turn of a long line. Raises Overloaded if it does not come in time."""
        try:
            async with asyncio.timeout(self._wait_s):
                await self._lock.acquire()
        except TimeoutError as error:
            message = "Another import sends a very long line; try again later."
            raise Overloaded(message, retry_after_s=self._wait_s) from error

    @property
    def one_is_held(self) -> bool:
        """Whether a long line is being read or written."""
        return self._lock.locked()

    def end(self) -> None:
        """Let the next long line begin."""
        self._lock.release()


class _Piece(NamedTuple):
    """Consecutive lines, and the position of the first."""

    first: int
    lines: list[bytes]


async def export_pieces(page_after: PageAfter) -> AsyncIterator[bytes]:
    """All lines of an export, a few hundred at a time."""
    deduplicator = Deduplicator()
    cursor: ExportCursor | None = None
    while True:
        page = await page_after(cursor)
        lines = deduplicator.new_lines(page)
        if lines:
            yield b"".join(lines)
        cursor = page.next_cursor
        if cursor is None:
            return


async def import_pieces(
    chunks: AsyncIterable[bytes],
    *,
    max_line_bytes: int,
    long_lines: LongLines,
    check: Check,
    embed: Embed,
    write: Write,
) -> Imported:
    """Import lines as they arrive.

    Args:
        chunks: NDJSON, cut anywhere.
        long_lines: those of all imports of this process. A long line waits here until the one before is written.
        check: is called before each piece, and raises an error if no more may be written. The error gets the number of
            the first line that is not written.
        embed: (n, dim) float32 vectors of n texts. The position of an error is the index of its text.
        write: writes lines that all have a vector, at least one.

    Raises:
        store.InvalidInput: a line cannot be used. `position` is its number.
        TooLarge: a line is longer than `max_line_bytes`.
        InvalidRequest: there are too many empty lines.
        Overloaded: a long line of another import was not complete in time. The pieces before are written.
    """
    imported = unchanged = 0
    async with aclosing(split_lines(chunks, max_line_bytes, long_lines)) as lines_, aclosing(_pieces(lines_)) as pieces:
        async for piece in pieces:
            try:
                await check()
            except LocatedError as error:
                raise error.at(None, piece.first) from error
            lines = await asyncio.to_thread(_parsed, piece)  # a piece takes about 10 ms of CPU time
            done = await write(await _with_vectors(lines, embed))
            imported, unchanged = imported + done.imported, unchanged + done.unchanged
    return Imported(imported, unchanged)


async def split_lines(
    chunks: AsyncIterable[bytes], max_line_bytes: int, long_lines: LongLines
) -> AsyncGenerator[bytes, None]:
    """The lines of a stream, without their newlines. A long line holds the lock until the next one is asked for.

    Raises:
        TooLarge: as soon as a line is known to be too long.
        Overloaded: a long line of another import was not complete in time.
    """
    begun: list[bytes] = []
    size = number = 0
    holds = False
    try:
        async for chunk in chunks:
            *ended, rest = chunk.split(b"\n")
            for line in ended:
                begun.append(line)
                _check_length(size + len(line), max_line_bytes, number)
                yield b"".join(begun)
                begun.clear()
                if holds:
                    long_lines.end()
                    holds = False
                size = 0
                number += 1
            begun.append(rest)
            size += len(rest)
            _check_length(size, max_line_bytes, number)
            if size > long_lines.above_bytes and not holds:
                await long_lines.begin()
                holds = True
        if size:
            yield b"".join(begun)
    finally:
        if holds:
            long_lines.end()


def _check_length(size: int, max_line_bytes: int, number: int) -> None:
    if size > max_line_bytes:
        message = f"is longer than {max_line_bytes} bytes; `memserve log import` reads lines of any length"
        raise TooLarge(message, None, "line_too_large", number)


async def _pieces(lines: AsyncIterable[bytes]) -> AsyncGenerator[_Piece, None]:
    """Lines in pieces. Each piece holds at least one line that is not empty."""
    first, size = 0, 0
    spare = MAX_EMPTY_BYTES  # bytes that empty lines may still have
    held: list[bytes] = []
    async for line in lines:
        held.append(line.strip())
        size += len(held[-1])
        spare += len(held[-1]) or -len(line) - 1
        if spare < 0:
            message = f"there are more than {MAX_EMPTY_BYTES} bytes of empty lines, and less of others"
            raise InvalidRequest(message, None, "too_many_empty_lines", first + len(held) - 1)
        if len(held) == PIECE_LINES or size >= PIECE_BYTES:
            if size:
                yield _Piece(first, held)
            first, size, held = first + len(held), 0, []
    if size:
        yield _Piece(first, held)


def _parsed(piece: _Piece) -> list[ImportLine]:
    return list(parse_lines(piece.lines, lambda: datetime.now(UTC), piece.first))


async def _with_vectors(lines: Sequence[ImportLine], embed: Embed) -> Sequence[ImportLine]:
    """The lines, each with the vector of its text."""
    bare = [line for line in lines if line.vector is None]
    if not bare:
        return lines
    with renumbered([line.position for line in bare], "text"):
        vectors = await embed([line.text for line in bare])
    embedded = {line.position: vector for line, vector in zip(bare, vectors, strict=True)}
    return [line._replace(vector=embedded[line.position]) if line.position in embedded else line for line in lines]


def to_line(given: str | bytes | Mapping[str, Any], position: int) -> bytes:
    """One line of NDJSON from a line, or from a mapping in its place.

    Raises:
        InvalidRequest: it is not JSON, or more than one line.
    """
    try:
        data = given.encode() if isinstance(given, str) else given
        if not isinstance(data, bytes):
            data = orjson.dumps(dict(data), option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_UTC_Z)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"must hold JSON: {error}", None, None, position) from error
    if b"\n" in data.rstrip():
        raise InvalidRequest("must be one line", None, None, position)
    return data.rstrip() + b"\n"
