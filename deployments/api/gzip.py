"""Unpacks bodies that are compressed by gzip, a bounded piece at a time.

A body may unpack to a thousand times its size. The caller of `unzipped` bounds what it takes, and nothing behind the
last piece that it took is unpacked. Other requests are served between the pieces.
"""

import asyncio
import zlib
from collections.abc import AsyncIterable, AsyncIterator

from deployments.errors import InvalidRequest

PIECE_BYTES = 256 * 1024  # unpacked in about a millisecond
# Of the compressed body, given to zlib at once. zlib copies what follows the end of a member, which may have 20 bytes:
# the time for a body of such members grows with the square of this.
_STEP_BYTES = 4 * 1024
_GZIP = zlib.MAX_WBITS | 16


async def unzipped(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """What was compressed, in pieces of at most PIECE_BYTES.

    Args:
        chunks: the members of a gzip stream (RFC 1952), cut anywhere.

    Raises:
        InvalidRequest: it is not what gzip writes, or ends too early.
    """
    member = zlib.decompressobj(_GZIP)
    is_empty = True
    async for chunk in chunks:
        for start in range(0, len(chunk), _STEP_BYTES):
            rest, has_more = chunk[start : start + _STEP_BYTES], True
            while has_more:
                is_empty = False
                if member.eof:
                    member = zlib.decompressobj(_GZIP)
                try:
                    piece = member.decompress(rest, PIECE_BYTES)
                except zlib.error as error:
                    raise _invalid() from error
                if piece:
                    yield piece
                rest = member.unused_data if member.eof else member.unconsumed_tail
                is_full = len(piece) == PIECE_BYTES
                # Of a full piece, more may be left even though all of the step was read.
                has_more = bool(rest) or (is_full and not member.eof)
                if is_full or not has_more:
                    await asyncio.sleep(0)
    if not (is_empty or member.eof):
        raise _invalid()


def _invalid() -> InvalidRequest:
    return InvalidRequest("The body is not valid gzip.", None, "invalid_gzip")
