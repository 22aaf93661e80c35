"""Cursors as callers get them: sealed, so that they tell nothing and belong to one list.

A cursor names the last row of a page by its number in the log. These numbers count the rows of all tenants, so a caller
who could read them would learn how much others write.

Guarantees: a sealed cursor can be opened for the list that it was made for, and for no other; what it holds cannot be
read or changed without the id of the log, which callers do not see. Equal cursors of one list are sealed alike. All
stores of a log seal alike, also after a restart.

The construction is SIV (Rogaway and Shrimpton, 2006) on keyed BLAKE2: a tag of the list and the cursor is the nonce of
the stream that hides the cursor.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from hashlib import blake2b

from store.errors import InvalidInput

_TAG_BYTES = 16
_BLOCK_BYTES = 64
_PADDED_TO = 32  # characters, so that the length does not tell how many digits a number has


class Cursors:
    """Seals and opens the cursors of one log."""

    def __init__(self, log_id: str) -> None:
        self._key = blake2b(log_id.encode(), person=b"memserve cursors").digest()

    def seal(self, cursor: str | None, *of: str) -> str | None:
        """The cursor as a caller gets it; None if there is no further page.

        Args:
            of: the kind of the list, and all that tells it from other lists of this kind.
        """
        if cursor is None:
            return None
        plain = cursor.ljust(-(-len(cursor) // _PADDED_TO) * _PADDED_TO, "=").encode()
        tag = self._tag(plain, of)
        return base64.urlsafe_b64encode(tag + self._hidden(plain, tag)).decode().rstrip("=")

    def open(self, sealed: str | None, *of: str, field: str = "cursor") -> str | None:
        """The cursor that was sealed for this list.

        Raises:
            InvalidInput: it was made for another list, or by nobody.
        """
        if sealed is None:
            return None
        try:
            found = base64.b64decode(sealed + "=" * (-len(sealed) % 4), altchars=b"-_", validate=True)
        except (ValueError, TypeError, binascii.Error) as error:
            raise InvalidInput("is not a cursor of this server", field) from error
        tag, hidden = found[:_TAG_BYTES], found[_TAG_BYTES:]
        plain = self._hidden(hidden, tag)
        if not hmac.compare_digest(tag, self._tag(plain, of)):
            raise InvalidInput("was made for another list", field)
        return plain.decode().rstrip("=")

    def _tag(self, plain: bytes, of: tuple[str, ...]) -> bytes:
        digest = blake2b(key=self._key, person=b"tag", digest_size=_TAG_BYTES)
        for part in (*(name.encode("utf-8", "surrogatepass") for name in of), plain):
            digest.update(len(part).to_bytes(8))
            digest.update(part)
        return digest.digest()

    def _hidden(self, data: bytes, tag: bytes) -> bytes:
        """The data, hidden or made plain again."""
        blocks = range(-(-len(data) // _BLOCK_BYTES))
        stream = b"".join(
            blake2b(tag + block.to_bytes(8), key=self._key, person=b"stream", digest_size=_BLOCK_BYTES).digest()
            for block in blocks
        )
        return bytes(one ^ other for one, other in zip(data, stream, strict=False))
