"""The memory that bodies of requests take in one gateway, which is bounded.

Guarantees:
- Bodies of more than `SMALL_BYTES` have at most `max_bytes` together, from before they are read until their requests
  are answered. The texts and numbers that are parsed from them take a few times as much.
- The bodies of one caller have at most half of the bytes that those of other callers leave, so no caller takes them
  all, and the largest are refused first. The caller is the key of a request; without keys each request is a caller of
  its own. A body that is the only one is never refused. Small bodies are neither counted nor refused: the number of
  requests bounds them.
- A body that counts must arrive at a least speed (`read_body` in deployments/api/http.py).

An import is not counted: it is read line by line.
"""

from starlette.types import Scope

from deployments.errors import Overloaded
from deployments.fair_queue import Shares, caller_of_request

SMALL_BYTES = 1 << 16
HELD = "memserve.held_bytes"
"""The key in the scope of a request whose body counts: the caller and the bytes."""


class HeldBodies:
    """The bodies of the requests that are in progress. Belongs to one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._shares = Shares()

    @property
    def bytes(self) -> int:
        """The bytes of all bodies that count."""
        return self._shares.total

    def hold(self, scope: Scope, size: int) -> None:
        """Count a body, of which so many bytes have been read or announced.

        Raises:
            Overloaded: too many bytes are held for other requests.
        """
        caller, own = scope.get(HELD) or (caller_of_request.get() or f"request:{id(scope)}", 0)
        if size <= max(own, SMALL_BYTES):
            return
        of_caller = self._shares.of(caller)
        left = self._max_bytes - (self.bytes - of_caller)
        if self.bytes > own and 2 * (of_caller - own + size) > left:
            raise Overloaded("The bodies of other requests take too much memory; try again later.")
        self._shares.add(caller, size - own)
        scope[HELD] = caller, size

    def release(self, scope: Scope) -> None:
        """Forget the body of a request that was answered, if it was counted."""
        if HELD in scope:
            self._shares.remove(*scope.pop(HELD))
