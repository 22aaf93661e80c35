"""The index snapshots that a log vouches for. Each is named by a random token, which must be in the log.

Guarantees: a log that contains a snapshot's token contains every row that the snapshot was made from, unchanged. The
token is committed after the last of these rows. So a log that was restored to an earlier state does not contain it,
whichever versions, labels and times it has given since.
"""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select

from store.log.schema import index_snapshots

_MAX_TOKENS = 64  # of one user, the newest: each store that serves the user may have a snapshot
_TOKENS = index_snapshots.c


def vouch(connection: Connection, uid: int, token: str) -> None:
    """Inside a write: add the token of a snapshot of the log's current state."""
    connection.execute(insert(index_snapshots), [{"uid": uid, "token": token}])
    of_user = select(_TOKENS.number).where(_TOKENS.uid == uid).order_by(_TOKENS.number.desc())
    oldest = of_user.offset(_MAX_TOKENS).limit(1).scalar_subquery()
    connection.execute(delete(index_snapshots).where(_TOKENS.uid == uid, _TOKENS.number <= oldest))


def vouches(connection: Connection, uid: int, token: str) -> bool:
    """Whether the log contains the token of a user's snapshot."""
    statement = select(_TOKENS.number).where(_TOKENS.uid == uid, _TOKENS.token == token)
    return connection.execute(statement).first() is not None
