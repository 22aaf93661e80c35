"""The size of each tenant, and how much it may hold.

Guarantees: the size of a tenant changes in the transaction that changes its users, so it is always their sum. No
transaction makes a tenant larger than its quota, as far as that transaction sees: transactions that run at the same
time, which only PostgreSQL allows, may exceed it by what they add. What makes a tenant smaller is never refused.

The size is kept in parts, which are added up. Each process changes a part of its own, so on PostgreSQL the writers of
one tenant do not wait for each other. The rows are changed last in a transaction and in one order, so they do not
deadlock.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple, Protocol

from sqlalchemy import BigInteger, Connection, bindparam, cast, func, select
from sqlalchemy.dialects import postgresql, sqlite

from store.errors import QuotaExceeded
from store.log.schema import tenants
from store.records import Quotas

_PARTS = 16
_PART = secrets.randbelow(_PARTS)  # of this process


class Sized(Protocol):
    """A user's row in a transaction, with the counts that it had when the transaction began."""

    tenant: str
    live: int
    text_bytes: int
    live_before: int
    text_bytes_before: int
    past_bytes: int


class Size(NamedTuple):
    """A number of memories, and the bytes of their texts and metadata. A growth may be negative."""

    memories: int
    text_bytes: int

    def plus(self, other: Size) -> Size:
        """The sum of two sizes."""
        return Size(self.memories + other.memories, self.text_bytes + other.text_bytes)


_NOTHING = Size(0, 0)


def _change(dialect: Any) -> Any:
    insert = dialect.insert(tenants)
    return insert.on_conflict_do_update(
        index_elements=[tenants.c.tenant, tenants.c.part],
        set_={
            "memories": tenants.c.memories + insert.excluded.memories,
            "text_bytes": tenants.c.text_bytes + insert.excluded.text_bytes,
        },
    )


_CHANGE = {"sqlite": _change(sqlite), "postgresql": _change(postgresql)}
_SIZES = (
    select(
        tenants.c.tenant,
        cast(func.sum(tenants.c.memories), BigInteger),
        cast(func.sum(tenants.c.text_bytes), BigInteger),
    )
    .where(tenants.c.tenant.in_(bindparam("names", expanding=True)))
    .group_by(tenants.c.tenant)
)


def growth(users: Iterable[Sized], *, with_past: bool = False) -> dict[str, Size]:
    """By how much each tenant has grown in this transaction.

    Args:
        with_past: whether the past states that were imported count. There must be room for them when they are written,
            and they are not a part of the size.
    """
    found: dict[str, Size] = {}
    for user in users:
        past = user.past_bytes if with_past else 0
        more = Size(user.live - user.live_before, user.text_bytes - user.text_bytes_before + past)
        found[user.tenant] = found.get(user.tenant, _NOTHING).plus(more)
    return found


def save(connection: Connection, grown: dict[str, Size]) -> None:
    """Add the growth of this transaction to the tenants' sizes. It must be the last thing that it locks."""
    rows = [
        {"tenant": tenant, "part": _PART, "memories": size.memories, "text_bytes": size.text_bytes}
        for tenant, size in sorted(grown.items())
        if any(size)
    ]
    if rows:
        connection.execute(_CHANGE[connection.dialect.name], rows)


def sizes(connection: Connection, names: Collection[str]) -> dict[str, Size]:
    """The sizes of those tenants that have any."""
    found = connection.execute(_SIZES, {"names": sorted(names)})
    return {tenant: Size(memories, text_bytes) for tenant, memories, text_bytes in found}


class Room:
    """What tenants may still add in one transaction.

    Args:
        names: the tenants that the transaction may make larger.
        dim: of the vectors, which are a part of the bytes.
    """

    def __init__(self, connection: Connection, quotas: Quotas, names: Collection[str], dim: int) -> None:
        self._quotas = quotas
        self._dim = dim
        self._sizes = sizes(connection, names) if quotas.any() else {}

    def take(self, grown: dict[str, Size]) -> None:
        """Count a growth, all of it or nothing.

        Raises:
            QuotaExceeded: a tenant would be larger than its quota, and grow.
        """
        if not self._quotas.any():
            return
        larger = {tenant: self._sizes.get(tenant, _NOTHING).plus(size) for tenant, size in grown.items()}
        for tenant, size in larger.items():
            _check("memories", self._quotas.memories, size.memories, grown[tenant].memories)
            _check("bytes", self._quotas.bytes, self._bytes(size), self._bytes(grown[tenant]))
        self._sizes |= larger

    def _bytes(self, size: Size) -> int:
        return size.text_bytes + 4 * self._dim * size.memories


def _check(unit: str, quota: int | None, total: int, grown: int) -> None:
    if quota is not None and grown > 0 and total > quota:
        # Without the total, which would tell a key that is bound to one user how much the others hold.
        raise QuotaExceeded(
            f"This would exceed a tenant's quota of {unit}, which is {quota}: delete some memories first.",
            code="quota_exceeded",
        )
