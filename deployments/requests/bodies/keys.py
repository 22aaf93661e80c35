"""The bodies and queries of the routes of keys and of the audit."""

from typing import Annotated

from pydantic import Field, StringConstraints

from deployments.requests.bodies.wire import RequestBody, Wire
from deployments.requests.fields import Cursor, Limit, NewId, OrNull, Time
from deployments.requests.principal import KeyScope

PerMinute = Annotated[int, Field(strict=True, ge=1, le=1_000_000_000)]


class CreateKeyBody(RequestBody):
    """`POST /v1/keys`: make a key of your own tenant."""

    user_id: NewId | None = None
    """The only user that the key reaches. Default: all users of the tenant."""
    scopes: OrNull[Annotated[list[KeyScope], Field(min_length=1)]] = Field(default=["read", "write"])
    """What the key may do. `admin` makes, lists and revokes keys; not with `user_id`. Default: read and write."""
    label: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    """Shown in lists. Printable characters."""
    expires_at: Time | None = None
    """A time in the future, with its time zone, from which the key is refused. Default: never."""
    requests_per_minute: PerMinute | None = None
    """The requests that the key may make in a minute, at most the limit of the key that asks. Default: the own limit of
    that key, or else `limits.requests_per_minute`."""
    tokens_per_minute: PerMinute | None = None
    """The tokens that the key may have embedded in a minute, likewise. Default: the own limit of the key that asks, or
    else `limits.tokens_per_minute`."""


class KeysQuery(Wire):
    """`GET /v1/keys`"""

    limit: Limit = 100
    """How many keys a page has at most."""
    cursor: Cursor | None = None
    """The `next_cursor` of the page before. Default: the first page."""


class EventsQuery(Wire):
    """`GET /v1/events`"""

    limit: Limit = 100
    """How many events a page has at most."""
    after: Cursor | None = None
    """The `next_cursor` of the page before, or of an earlier request. Default: the oldest events."""
