"""The memory that bodies of requests take in one gateway, which is bounded.

Guarantees:
- Bodies of more than `SMALL_BYTES` have at most `max_bytes` together, from before they are read until their requests
  are answered. The texts and numbers that are parsed from them take a few times as much.
- A body is refused if it has more than half of the bytes that are left, so the largest are refused first. A body that
  is the only one is never refused. Small bodies are neither counted nor refused: the number of requests bounds them.

An import is not counted: it is read line by line.
"""

from starlette.types import Scope

from deployments.errors import Overloaded

SMALL_BYTES = 1 << 16
HELD = "memserve.held_bytes"
"""The key in the scope of a request whose body counts."""


class HeldBodies:
    """The bodies of the requests that are in progress. Belongs to one event loop.

    Attributes:
        bytes: of all bodies that count.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.bytes = 0

    def hold(self, scope: Scope, size: int) -> None:
        """Count a body, of which so many bytes have been read or announced.

        Raises:
            Overloaded: too many bytes are held for other requests.
        """
        own = scope.get(HELD, 0)
        if size <= max(own, SMALL_BYTES):
            return
        others = self.bytes - own
        if others and 2 * size > self._max_bytes - others:
            raise Overloaded("The bodies of other requests take too much memory; try again later.")
        self.bytes = others + size
        scope[HELD] = size

    def release(self, scope: Scope) -> None:
        """Forget the body of a request that was answered, if it was counted."""
        self.bytes -= scope.pop(HELD, 0)
