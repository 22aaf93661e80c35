"""Who makes a request: the tenant and the user that it may reach, and what it may do there.

A principal is made once, at the door, and is never changed. The tenant of everything that a request reads or writes
comes from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from store import DEFAULT_TENANT, SCOPES, Key, Scope

_SCHEMES = ("bearer", "token")
_NOBODYS_KEY = ""


class Headers(Protocol):
    """The headers of a request, as Starlette gives them."""

    def getlist(self, key: str) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a request.

    Attributes:
        user_id: the only user that the request may reach; None if it may reach all users of its tenant.
        key_id: the public id of the key that was sent, for logs and metrics; None if no key was asked for.
    """

    tenant: str
    user_id: str | None
    scopes: frozenset[Scope]
    key_id: str | None

    @classmethod
    def of_key(cls, key: Key) -> Principal:
        """The principal of a request that carries this key."""
        return cls(key.tenant, key.user_id, frozenset(key.scopes), key.id)

    def may(self, scope: Scope) -> bool:
        """Whether the request may do what needs this scope. No scope includes another one."""
        return scope in self.scopes

    def reaches(self, user_id: str) -> bool:
        """Whether the request may read and write the data of this user of its tenant."""
        return self.user_id is None or self.user_id == user_id

    @property
    def reaches_all(self) -> bool:
        """Whether the request may use routes that concern all users of its tenant."""
        return self.user_id is None


ANYONE = Principal(DEFAULT_TENANT, None, frozenset(SCOPES), None)
"""The principal of each request to a server that asks for no key."""


def key_in(headers: Headers) -> str | None:
    """The key that a request carries in `Authorization: Bearer`, `Authorization: Token` or `X-API-Key`, as it was sent.

    Returns:
        None if the request carries none of these headers; an empty string, which is nobody's key, if it has an
        Authorization of another scheme or carries several keys that differ.
    """
    found = {value.strip(" ") for value in headers.getlist("x-api-key")}
    for value in headers.getlist("authorization"):
        scheme, _, key = value.strip(" ").partition(" ")
        found.add(key.strip(" ") if scheme.lower() in _SCHEMES else _NOBODYS_KEY)
    if not found:
        return None
    return found.pop() if len(found) == 1 else _NOBODYS_KEY
