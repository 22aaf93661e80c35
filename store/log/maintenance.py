"""Work on a whole log: verify, count and move to another model beside the stores that serve it, compact without them.

Guarantees: all of it can be interrupted and begun again; none of it brings back or overwrites a newer state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import Select, and_, delete, func, insert, literal_column, select, text, update

from store.errors import InvalidInput, LogDamaged
from store.log.database import Log, model_id
from store.log.reading import VECTOR, with_contents
from store.log.rows import CONTENT, dump_vector, load_vectors, memory, user_key
from store.log.schema import contents, history, memories, meta, users
from store.log.users import lock_users
from store.log.writing import blank, write_contents

PAGE = 500
NOTHING_SAID = "."  # embedded in the place of a blank text, which older logs may hold and no server embeds
TOMBSTONES_US = 3_600_000_000  # how long a deletion is remembered by memory; then by user


class Served(NamedTuple):
    """The model whose vectors a log serves; a log that was never served has none."""

    model: str
    dim: int


class Counts(NamedTuple):
    """What there is in a log."""

    users: int
    memories: int
    tombstones: int
    superseded: int
    blank: int
    model: str | None
    dim: int | None


def served(log: Log) -> Served | None:
    """The log's model, as it was declared when it was first served."""
    with log.read() as connection:
        found = {name: value for name, value in connection.execute(select(meta.c.name, meta.c.value))}
    return Served(found["model"], int(found["dim"])) if "model" in found else None


def count(log: Log) -> Counts:
    """Count rows: a scan of every table."""
    served_by = served(log)
    with log.read() as connection:

        def number(statement: Select[Any]) -> int:
            return int(connection.execute(statement).scalar_one())

        rows = select(func.count())
        return Counts(
            number(rows.select_from(users).where(users.c.live > 0)),
            number(rows.select_from(memories).where(memories.c.deleted == 0)),
            number(rows.select_from(memories).where(memories.c.deleted == 1)),
            number(rows.select_from(history)),
            number(rows.select_from(contents).where(contents.c.blank == 1)),
            served_by.model if served_by else None,
            served_by.dim if served_by else None,
        )


def verify(log: Log, progress: Callable[[int], object] = lambda rows: None) -> Iterator[str]:
    """Check every memory as it is now, with its vector, and how many each user has; one line a problem.

    On SQLite the structure of the file, too. What superseded states said is not read, nor the history.

    Raises:
        LogDamaged: the database cannot be read on.
    """
    if log.path is not None:
        with log.read() as connection:
            for (line,) in connection.execute(text("PRAGMA integrity_check")):
                if line != "ok":
                    yield f"database: {line}"
    serving = served(log)
    if serving is None:
        return
    log.serve_model(*serving)
    with log.read() as connection:
        known = {row.uid: row for row in connection.execute(select(users))}
    owners = dict(known)
    counted: dict[int, int] = {}
    after = 0
    while True:
        statement = (
            select(*CONTENT, *VECTOR, memories.c.deleted)
            .select_from(with_contents(log.model_id))
            .where(memories.c.label > after)
            .order_by(memories.c.label)
            .limit(PAGE)
        )
        with log.read() as connection:
            found = list(connection.execute(statement))
            late = {row.uid for row in found} - owners.keys()  # users who came while this was running
            owners |= {row.uid: row for row in connection.execute(select(users).where(users.c.uid.in_(late)))}
        for row in found:
            owner = owners.get(row.uid)
            name = f"memory {row.id!r} of user {owner.user_id!r}" if owner is not None else f"label {row.label}"
            yield from (f"{name}: {problem}" for problem in _problems(row, owner, serving.dim))
            counted[row.uid] = counted.get(row.uid, 0) + (not row.deleted)
        progress(len(found))
        if len(found) < PAGE:
            break
        after = found[-1].label
    with log.read() as connection:
        for row in connection.execute(select(users)):
            before = known.get(row.uid)
            if before is not None and before.version == row.version and counted.get(row.uid, 0) != row.live:
                yield f"user {row.user_id!r}: {counted.get(row.uid, 0)} memories where {row.live} were written"
        if connection.execute(select(meta.c.value).where(meta.c.name == "compacting")).first():
            yield "a compaction was interrupted: run it again"


def _problems(row: Any, user: Any, dim: int) -> Iterator[str]:
    if user is None:
        yield "its user is missing"
        return
    if user_key(row.uid, row.id) != row.key:
        yield "its key is not the hash of its id"
        return
    if row.deleted:
        return
    try:
        memory(row, user.user_id)
    except LogDamaged:
        yield "its text or metadata are not what was written"
    if row.embedding is None:
        yield "it has no vector"
        return
    try:
        vector = load_vectors([row.embedding], [row.vector_crc], dim)
    except LogDamaged:
        yield "its vector is not what was written"
        return
    if not np.isfinite(vector).all():
        yield "its vector is not finite"


def compact(log: Log, now: int) -> int:
    """Forget old tombstones and erased rows, and give their space back. Returns how many tombstones went.

    On SQLite this writes the whole file anew and needs that much space beside it; no other process may write meanwhile.
    A deletion stays known by its user: a write that was issued before it is refused still.

    Raises:
        LogUnavailable: another process is in the way.
    """
    old = and_(memories.c.deleted == 1, memories.c.updated_at < now - TOMBSTONES_US)
    with log.write() as connection:
        due = {
            uid: newest
            for uid, newest in connection.execute(
                select(memories.c.uid, func.max(memories.c.updated_at)).where(old).group_by(memories.c.uid)
            )
        }
        locked = lock_users(connection, due)
        for uid, user in locked.items():
            changed = {"epoch": user.epoch + 1, "erased_at": max(user.erased_at, due[uid])}
            connection.execute(update(users).where(users.c.uid == uid).values(**changed))
        labels = select(memories.c.label).where(old)
        connection.execute(delete(history).where(history.c.label.in_(labels)))
        gone = connection.execute(delete(memories).where(old)).rowcount
        connection.execute(delete(contents).where(contents.c.blank == 1))
        if log.path is not None:  # rows have moved: until the file is written anew, pages hold copies of them
            connection.execute(delete(meta).where(meta.c.name == "compacting"))
            connection.execute(insert(meta), [{"name": "compacting", "value": "1"}])
    log.vacuum()
    with log.write() as connection:
        connection.execute(delete(meta).where(meta.c.name == "compacting"))
    log.truncate_wal()
    return gone


def reembed(
    log: Log,
    model: str,
    embed: Callable[[Sequence[str]], npt.ArrayLike],
    *,
    batch: int = 64,
    progress: Callable[[int], object] = lambda rows: None,
) -> int:
    """Give every memory a vector of `model`, then switch the log to it. Returns how many were embedded now.

    Stores that run the old model serve on until the switch, and say ModelMismatch from then on. Interrupted, it goes
    on where it was. A vector is kept for the very state whose text was embedded: what is written meanwhile is embedded
    in its turn, what is deleted stays deleted. A blank text stays, with the vector of a lone full stop.

    Args:
        embed: from n texts, none of them blank, to (n, dim) numbers, the same dim always.

    Raises:
        InvalidInput: the log serves that model already, was never served, or `embed` gave vectors that cannot be kept.
    """
    serving = served(log)
    if serving is not None and serving.model == model and _forget_vectors(log, model):
        return 0  # it was interrupted after the switch
    if serving is None or serving.model == model:
        raise InvalidInput(f"There is nothing to do: the log serves {serving.model if serving else 'no model yet'}.")
    with log.write() as connection:
        old_id, new_id = model_id(connection, serving.model), model_id(connection, model)
    done, dim = 0, 0
    while True:
        after, found_any = 0, False
        while True:
            with log.read() as connection:
                found = list(connection.execute(_lacking(old_id, new_id).where(memories.c.label > after).limit(batch)))
            if not found:
                break
            found_any, after = True, found[-1].label
            if any(row.text is None for row in found):
                raise LogDamaged("The log is damaged: a memory has no text. See: python -m store verify")
            vectors = np.asarray(embed([row.text if row.text.strip() else NOTHING_SAID for row in found]), np.float32)
            if vectors.ndim != 2 or len(vectors) != len(found) or (dim and vectors.shape[1] != dim):
                raise InvalidInput(f"{len(found)} texts gave vectors of shape {vectors.shape}.")
            dim = vectors.shape[1]
            done += _stage(log, found, vectors, new_id)
            progress(len(found))
        if not found_any and _switch(log, model, old_id, new_id, dim or _dim_of(log, new_id) or serving.dim):
            break
    _forget_vectors(log, model)
    return done


def _lacking(old_id: int, new_id: int) -> Select[Any]:
    """Live memories without a vector of the new model."""
    new = contents.alias("new")
    has_new = and_(
        new.c.uid == memories.c.uid,
        new.c.version == memories.c.version,
        new.c.model == new_id,
        new.c.blank == literal_column("0"),
    )
    return (
        select(memories.c.label, memories.c.uid, memories.c.version, contents.c.text, contents.c.metadata)
        .select_from(with_contents(old_id).outerjoin(new, has_new))
        .where(memories.c.deleted == 0, new.c.cid.is_(None))
        .order_by(memories.c.label)
    )


def _stage(log: Log, found: Sequence[Any], vectors: npt.NDArray[np.float32], new_id: int) -> int:
    """Keep the vectors of those memories that are still as they were."""
    with log.write() as connection:
        lock_users(connection, [row.uid for row in found])
        statement = select(memories.c.uid, memories.c.version).where(
            memories.c.label.in_([row.label for row in found]), memories.c.deleted == 0
        )
        still = {(uid, version) for uid, version in connection.execute(statement)}
        present = select(contents.c.uid, contents.c.version).where(
            contents.c.uid.in_({row.uid for row in found}),
            contents.c.version.in_([row.version for row in found]),
            contents.c.model == new_id,
            contents.c.blank == literal_column("0"),
        )
        still -= {(uid, version) for uid, version in connection.execute(present)}
        rows = []
        for row, vector in zip(found, vectors, strict=True):
            if (row.uid, row.version) in still:
                embedding, crc = dump_vector(vector, len(vector), "vector")
                rows.append(
                    {
                        "blank": 0,
                        "uid": row.uid,
                        "version": row.version,
                        "model": new_id,
                        "vector_crc": crc,
                        "text": row.text,
                        "metadata": row.metadata,
                        "embedding": embedding,
                    }
                )
        write_contents(connection, rows)
    return len(rows)


def _switch(log: Log, model: str, old_id: int, new_id: int, dim: int) -> bool:
    """Serve the new model from here on, unless a memory came in meanwhile."""
    with log.write() as connection:
        # waits for writers of the old model, and keeps them out until the end
        connection.execute(select(meta.c.value).where(meta.c.name == "model").with_for_update())
        if connection.execute(_lacking(old_id, new_id).limit(1)).first() is not None:
            return False
        connection.execute(update(meta).where(meta.c.name == "model").values(value=model))
        connection.execute(update(meta).where(meta.c.name == "dim").values(value=str(dim)))
    return True


def _dim_of(log: Log, new_id: int) -> int:
    with log.read() as connection:
        statement = select(func.length(contents.c.embedding)).where(contents.c.model == new_id, contents.c.blank == 0)
        return int(connection.execute(statement.limit(1)).scalar() or 0) // 4


def _forget_vectors(log: Log, model: str) -> int:
    """Blank the rows of other models that the new model's have replaced, some at a time. Returns how many."""
    with log.write() as connection:
        new_id = model_id(connection, model)
    new = contents.alias("new")
    replaced = (
        select(contents.c.cid, contents.c.uid)
        .join(new, and_(new.c.uid == contents.c.uid, new.c.version == contents.c.version, new.c.model == new_id))
        .where(contents.c.model != new_id, contents.c.blank == 0, new.c.blank == literal_column("0"))
        .order_by(contents.c.cid)
        .limit(PAGE)
    )
    after = forgotten = 0
    while True:
        with log.write() as connection:
            found = list(connection.execute(replaced.where(contents.c.cid > after)))
            if not found:
                return forgotten
            lock_users(connection, [row.uid for row in found])  # deletions blank the same rows in another order
            connection.execute(blank(contents.c.cid.in_([row.cid for row in found])))
        after = found[-1].cid
        forgotten += len(found)
