"""Who makes a request: the tenant and the user that it may reach, and what it may do there.

A principal is made once, at the door, and is never changed. A request that lasts, such as an import, asks with `check`
whether its key can still be used. The tenant of everything that a request reads or writes
comes from it: `user` and `whole_tenant` name what a call is about, and refuse what the principal may not reach. They
look nothing up, so a refusal is the same, and takes as long, whether the user exists or not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from deployments.errors import Forbidden, Unauthorized
from store import DEFAULT_TENANT, SCOPES, Credential, Key, NotFound, Scope, credential_of

KeyScope: TypeAlias = Scope
FindKey: TypeAlias = Callable[[Credential], Awaitable[Key | None]]
"""Looks up a key. Raises Unavailable if that is not possible at the moment."""
FindAgain: TypeAlias = Callable[[], Awaitable[Key | None]]
"""Looks up the key of one request, as `FindKey` does."""

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
        find_again: looks the key up, for `check`; None if no key was asked for.
    """

    tenant: str
    user_id: str | None
    scopes: frozenset[KeyScope]
    key_id: str | None
    find_again: FindAgain | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of_key(cls, key: Key, find_again: FindAgain | None = None) -> Principal:
        """The principal of a request that carries this key."""
        return cls(key.tenant, key.user_id, frozenset(key.scopes), key.id, find_again)

    @classmethod
    def of_tenant(cls, tenant: str) -> Principal:
        """The principal of a handle call: code in the cluster may do everything, and names the tenant itself."""
        return ANYONE if tenant == DEFAULT_TENANT else cls(tenant, None, ANYONE.scopes, None)

    async def check(self) -> None:
        """Check again, in the middle of a request, that its key can be used.

        Raises:
            Unauthorized: the key was revoked or has expired since the request began.
            Unavailable: the log cannot be asked, and this gateway no longer remembers the key.
        """
        if self.find_again is not None and await self.find_again() is None:
            raise unknown_key()

    def may(self, scope: KeyScope) -> bool:
        """Whether the request may do what needs this scope. No scope includes another one."""
        return scope in self.scopes

    def reaches(self, user_id: str) -> bool:
        """Whether the request may read and write the data of this user of its tenant."""
        return self.user_id is None or self.user_id == user_id

    @property
    def reaches_all(self) -> bool:
        """Whether the request may use routes that concern all users of its tenant."""
        return self.user_id is None

    def user(self, user_id: str) -> tuple[str, str]:
        """The tenant and the id of a user that the request is about.

        Raises:
            NotFound: the request may not reach this user. The words are those for a user that never was.
        """
        if not self.reaches(user_id):
            raise NotFound(f"there is no user {user_id!r}", "user_id")
        return self.tenant, user_id

    @property
    def whole_tenant(self) -> str:
        """The tenant of a request that is about all its users, or about its keys.

        Raises:
            Forbidden: the request may reach one user only.
        """
        if not self.reaches_all:
            message = "This key is bound to one user, and this request concerns the whole tenant."
            raise Forbidden(message, None, "insufficient_scope")
        return self.tenant

    @property
    def realm(self) -> str:
        """Names the data that the request reaches: a tenant, or one user of it.

        Vectors and write ids are remembered for each realm apart, so that a request learns neither from an answer, nor
        from the time that it takes, what others have sent who reach other data.
        """
        bound = "" if self.user_id is None else f"/{self.user_id}"
        return f"{len(self.tenant)}:{self.tenant}{bound}"


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


def credential_in(headers: Headers) -> Credential:
    """The public id and the digest of the key that a request carries.

    Raises:
        Unauthorized: it carries none, or something that cannot be a key.
    """
    given = key_in(headers)
    if given is None:
        message = "This server needs a key: send `Authorization: Bearer KEY` or `X-API-Key: KEY`."
        raise Unauthorized(message, None, "missing_key")
    credential = credential_of(given)
    if credential is None:
        raise unknown_key()
    return credential


def unknown_key() -> Unauthorized:
    """The error for a key that cannot be used. It does not tell whether the key was ever made, or why it ended."""
    return Unauthorized("This key is unknown here, was revoked or has expired.", None, "invalid_key")
