"""Cursors as callers get them: sealed, so that they tell nothing and belong to one list.

A cursor names the last row of a page by its number in the log. These numbers count the rows of all tenants, so a caller
who could read them would learn how much others write.

Guarantees: a sealed cursor can be opened for the list that it was made for, and for no other; what it holds cannot be
read or changed without the id of the log, which callers do not see. Equal cursors of one list are sealed alike. All
stores of a log seal alike, also after a restart. AES-SIV (RFC 5297) gives this without a nonce.
"""

from __future__ import annotations

import base64
import binascii
from hashlib import blake2b

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from store.errors import InvalidInput

_PADDED_TO = 32  # characters, so that the length does not tell how many digits a number has


class Cursors:
    """Seals and opens the cursors of one log."""

    def __init__(self, log_id: str) -> None:
        self._siv = AESSIV(blake2b(log_id.encode(), person=b"memserve cursors", digest_size=64).digest())

    def seal(self, cursor: str | None, *of: str) -> str | None:
        """The cursor as a caller gets it; None if there is no further page.

        Args:
            of: the kind of the list, and all that tells it from other lists of this kind.
        """
        if cursor is None:
            return None
        padded = cursor.ljust(-(-len(cursor) // _PADDED_TO) * _PADDED_TO, "=")
        return base64.urlsafe_b64encode(self._siv.encrypt(padded.encode(), _encoded(of))).decode().rstrip("=")

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
        try:
            return self._siv.decrypt(found, _encoded(of)).decode().rstrip("=")
        except InvalidTag as error:
            raise InvalidInput("was made for another list", field) from error


def _encoded(of: tuple[str, ...]) -> list[bytes]:
    return [part.encode("utf-8", "surrogatepass") for part in of]
