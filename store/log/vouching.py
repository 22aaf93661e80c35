"""Which snapshots of indexes a log vouches for: each is named by a random token that the log has to know.

Guarantees: a log that knows a snapshot's token holds every row that the snapshot was made from, just as it was. The
token is committed after the last of these rows, so that a log that was put back to an earlier state does not know it,
whatever versions, labels and times it has given since.
"""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select

from store.log.schema import index_snapshots

_KEPT = 64  # tokens of one user, the newest: each store that it is served by may have a snapshot
_TOKENS = index_snapshots.c


def vouch(connection: Connection, uid: int, token: str) -> None:
    """Inside a write: know a snapshot of what the log holds by now."""
    connection.execute(insert(index_snapshots), [{"uid": uid, "token": token}])
    of_user = select(_TOKENS.number).where(_TOKENS.uid == uid).order_by(_TOKENS.number.desc())
    oldest = of_user.offset(_KEPT).limit(1).scalar_subquery()
    connection.execute(delete(index_snapshots).where(_TOKENS.uid == uid, _TOKENS.number <= oldest))


def vouches(connection: Connection, uid: int, token: str) -> bool:
    """Whether the log knows a user's snapshot."""
    statement = select(_TOKENS.number).where(_TOKENS.uid == uid, _TOKENS.token == token)
    return connection.execute(statement).first() is not None
