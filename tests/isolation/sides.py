"""The two servers on which a participant plays: one that it shares with the others, and a private one.

A play is made twice, so it must not name what only one of the servers knows: a generated id, a cursor, a key. It names
them by their number, or by the route that gave them, and each side puts its own in. What the sides answer is compared
after such values were replaced by their numbers.
"""

import re
from typing import Any, NamedTuple

import httpx
import orjson

from tests.api.test_authentication import bearer
from tests.local_app import LocalApp

_GENERATED = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\b|\b[0-9a-f]{16}\b")
_TIMES = {"at", "created_at", "updated_at", "revoked_at", "expires_at", "happened_at", "created"}
_CURSORS = {"next_cursor"}
# Of a cache: the background work of one server may have dropped an index that the other still has. `used_at` is written
# by background work, too. `key` is a secret.
_LEFT_OUT = {"resident", "index", "used_at", "key"}


class Generated(NamedTuple):
    """The generated id with a number: the n-th that the side has seen, of those that it has seen."""

    number: int


class Cursor(NamedTuple):
    """The newest cursor of a route, if it gave one."""

    route: str


class Side:
    """A participant on one server.

    Args:
        secret: of its key.
    """

    def __init__(self, app: LocalApp, secret: str) -> None:
        self.app = app
        self._secret = secret
        self._numbers: dict[str, int] = {secret.split("_")[1]: 0}  # by generated id
        self._cursors: dict[str, str] = {}  # by route

    async def request(self, route: str, method: str, path: list[Any], options: dict[str, Any]) -> Any:
        """Make a request. Returns its answer as it can be compared with that of the other side."""
        url = "/".join(self._own(part) for part in path)
        headers = {**bearer(self._secret), **options.get("headers", {})}
        rest = {name: self._own(value) for name, value in options.items() if name != "headers"}
        answer = await self.app.http.request(method, url, headers=headers, **rest)
        return answer.status_code, self.seen(route, _content(answer))

    async def call(self, method: str, arguments: list[Any], options: dict[str, Any]) -> Any:
        """Call a method of the handle API. Returns its answer, or its error, likewise."""
        try:
            called = getattr(self.app.gateway, method)(*self._own(arguments), **self._own(options))
            answer = [piece async for piece in called] if hasattr(called, "__aiter__") else await called
        except Exception as error:  # noqa: BLE001 - compared
            return type(error).__name__, self.seen(method, str(error))
        return self.seen(method, _plain(answer))

    def seen(self, route: str, value: Any) -> Any:
        """A value without what differs between servers that behave alike. Remembers generated ids and cursors."""
        if isinstance(value, str):
            return _GENERATED.sub(self._number, value)
        if isinstance(value, list):
            return [self.seen(route, item) for item in value]
        if not isinstance(value, dict):
            return value
        found = {}
        for name, item in value.items():
            if name in _TIMES:
                found[name] = item is not None
            elif name in _CURSORS:
                found[name] = item is not None
                if item is not None:
                    self._cursors[route] = item
            elif name not in _LEFT_OUT:
                found[self.seen(route, name)] = self.seen(route, item)
        return found

    def _number(self, match: re.Match[str]) -> str:
        return f"<{self._numbers.setdefault(match[0], len(self._numbers))}>"

    def _own(self, value: Any) -> Any:
        """A value of a play with this side's own ids and cursors in it."""
        if isinstance(value, Generated):
            return list(self._numbers)[value.number % len(self._numbers)]
        if isinstance(value, Cursor):
            return self._cursors.get(value.route)
        if isinstance(value, list):
            return [self._own(item) for item in value]
        if isinstance(value, dict):
            own = {name: self._own(item) for name, item in value.items()}
            return {name: item for name, item in own.items() if not (value[name] != item and item is None)}
        return value


def _content(answer: httpx.Response) -> Any:
    if answer.headers.get("content-type") == "application/x-ndjson":
        return [orjson.loads(line) for line in answer.content.splitlines()]
    if answer.headers.get("content-type") == "application/json":
        return answer.json()
    return answer.text


def _plain(value: Any) -> Any:
    """An answer of the handle API as JSON."""
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return [orjson.loads(line) for line in b"".join(value).splitlines()]
    return orjson.loads(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))
