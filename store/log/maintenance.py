"""Work on a whole log: count, verify, compact, and move to another model (reembed).

Stores may keep serving the log meanwhile, except during a compaction.

Guarantees: each of these can be interrupted and run again. None of them restores or overwrites a newer state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Row, Select, and_, delete, func, insert, literal_column, select, text, update

from store.errors import InvalidInput, LogDamaged
from store.log.database import Log, model_id
from store.log.erasing import OF_ROWS, erase_contents
from store.log.quotas import Size
from store.log.quotas import sizes as sizes_of_tenants
from store.log.reading import VECTOR, with_contents, with_names
from store.log.rows import CONTENT, damaged, dump_vector, is_named, load_vectors, memory, text_bytes, user_key
from store.log.schema import CHUNK, contents, history, memories, meta, users
from store.log.space import remove_tombstones
from store.log.users import lock_users
from store.log.writing import write_contents

PAGE = 500
BLANK_TEXT_AS = "."  # embedded instead of a blank text: older logs may hold some, and servers refuse them


class Served(NamedTuple):
    """The model whose vectors a log serves, and their dimension."""

    model: str
    dim: int


class Counts(NamedTuple):
    """The numbers of rows in a log, and its model."""

    users: int
    memories: int
    tombstones: int
    superseded: int
    blank: int
    model: str | None
    dim: int | None


def served(log: Log) -> Served | None:
    """The log's model, or None if the log was never served."""
    with log.read() as connection:
        found = {name: value for name, value in connection.execute(select(meta.c.name, meta.c.value))}
    return Served(found["model"], int(found["dim"])) if "model" in found else None


def count(log: Log) -> Counts:
    """Count the rows of a log. This reads every table."""
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
    """Check the current state of every memory with its vector, and the counts of users and tenants.

    Yields one line for each problem.

    On SQLite the structure of the file is checked as well. Superseded states and the history are not read.

    Raises:
        LogDamaged: the database cannot be read any further.
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
        before = {row.uid: row for row in connection.execute(select(users))}
    owners = dict(before)
    counted: Counter[int] = Counter()
    sizes: Counter[int] = Counter()  # of texts and metadata
    damaged_users: set[int] = set()
    for rows in _pages(log, owners):
        for row in rows:
            owner = owners.get(row.uid)
            name = f"memory {row.id!r} of user {owner.user_id!r}" if owner is not None else f"label {row.label}"
            for problem in _problems(row, owner, serving.dim):
                damaged_users.add(row.uid)
                yield f"{name}: {problem}"
            counted[row.uid] += not row.deleted
            if not row.deleted and row.uid not in damaged_users:
                sizes[row.uid] += text_bytes(row.text, row.metadata)
        progress(len(rows))
    with log.read() as connection:
        after = connection.execute(select(users)).all()
        unchanged = [row for row in after if row.uid in before and before[row.uid].version == row.version]
        yield from _wrong_counts(unchanged, counted, sizes, damaged_users)
        yield from _wrong_sizes(connection, after)
        if connection.execute(select(meta.c.value).where(meta.c.name == "compacting")).first():
            yield "a compaction was interrupted: run it again"


def _pages(log: Log, owners: dict[int, Row[Any]]) -> Iterator[Sequence[Any]]:
    """All rows of memories with their contents and vectors, each page in a transaction of its own.

    Users that are created meanwhile are added to `owners` before the page with their memories.
    """
    after = 0
    while True:
        statement = (
            select(*CONTENT, *VECTOR, memories.c.deleted)
            .select_from(with_names(log.model_id))
            .where(memories.c.label > after)
            .order_by(memories.c.label)
            .limit(PAGE)
        )
        with log.read() as connection:
            found = list(connection.execute(statement))
            created = {row.uid for row in found} - owners.keys()
            owners |= {row.uid: row for row in connection.execute(select(users).where(users.c.uid.in_(created)))}
        yield found
        if len(found) < PAGE:
            return
        after = found[-1].label


def _wrong_counts(
    found: Sequence[Row[Any]], counted: Counter[int], sizes: Counter[int], damaged_users: Set[int]
) -> Iterator[str]:
    """The users whose rows state another number of memories, or another size of their texts, than was counted."""
    for row in found:
        if counted[row.uid] != row.live:
            yield f"user {row.user_id!r}: {counted[row.uid]} memories where {row.live} were written"
        elif row.uid not in damaged_users and sizes[row.uid] != row.text_bytes:
            yield f"user {row.user_id!r}: {sizes[row.uid]} bytes of texts where {row.text_bytes} were written"


def _wrong_sizes(connection: Connection, found: Sequence[Row[Any]]) -> Iterator[str]:
    """The tenants whose size is not the sum of the sizes of their users, all of which are given."""
    sums: dict[str, Size] = {}
    for row in found:
        sums[row.tenant] = sums.get(row.tenant, Size(0, 0)).plus(Size(row.live, row.text_bytes))
    names = sorted(sums)
    stated: dict[str, Size] = {}
    for start in range(0, len(names), CHUNK):
        stated |= sizes_of_tenants(connection, names[start : start + CHUNK])
    for tenant, size in sums.items():
        if (there := stated.get(tenant, Size(0, 0))) != size:
            yield (
                f"tenant {tenant!r}: its users have {size.memories} memories and {size.text_bytes} bytes of texts "
                f"where {there.memories} and {there.text_bytes} were written"
            )


def _problems(row: Any, user: Any, dim: int) -> Iterator[str]:
    if user is None:
        yield "its user is missing"
        return
    if user_key(row.uid, row.id) != row.key:
        yield "its key is not the hash of its id"
        return
    if row.deleted:
        return
    if not is_named(row.thread, row.thread_name):
        yield "the name of its thread is not what was written"
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
    """Remove old tombstones and erased rows, and give all their space back. Returns how many tombstones were removed.

    Stores give most of this space back while they serve: see store/log/space.py. On SQLite this rewrites the whole
    file, which takes as much space again. No other process may write meanwhile.

    Raises:
        LogUnavailable: another process holds a lock.
    """
    removed = 0
    while some := remove_tombstones(log, now):
        removed += some
    with log.write() as connection:
        if log.path is not None:  # until the file is rewritten, its pages hold copies of rows that were moved
            connection.execute(delete(contents).where(contents.c.blank == 1))
            connection.execute(update(meta).where(meta.c.name == "erased_bytes").values(value="0"))
            connection.execute(delete(meta).where(meta.c.name == "compacting"))
            connection.execute(insert(meta), [{"name": "compacting", "value": "1"}])
    log.vacuum()
    with log.write() as connection:
        connection.execute(delete(meta).where(meta.c.name == "compacting"))
    log.truncate_wal()
    return removed


def reembed(
    log: Log,
    model: str,
    embed: Callable[[Sequence[str]], npt.ArrayLike],
    *,
    batch: int = 64,
    progress: Callable[[int], object] = lambda rows: None,
) -> int:
    """Give every memory a vector of `model`, then switch the log to it. Returns how many were embedded by this call.

    Stores that run the old model keep serving until the switch, and raise ModelMismatch from then on. If interrupted,
    run it again: it continues. A vector is kept only if the memory still has the text that was embedded. Memories that
    are written meanwhile are embedded in a later round, and deleted memories stay deleted. A blank text is kept, with
    the vector of a full stop.

    Args:
        embed: turns n texts, none of them blank, into (n, dim) numbers, with the same dim in every call.

    Raises:
        InvalidInput: the log serves that model already or was never served, or `embed` returned unusable vectors.
    """
    serving = served(log)
    if serving is not None and serving.model == model and _blank_replaced(log, model):
        return 0  # an earlier call was interrupted after the switch
    if serving is None or serving.model == model:
        raise InvalidInput(f"There is nothing to do: the log serves {serving.model if serving else 'no model yet'}.")
    with log.write() as connection:
        old_id, new_id = model_id(connection, serving.model), model_id(connection, model)
    done, dim = 0, 0
    switched = False
    while not switched:
        complete = True
        for rows in _without_vector(log, old_id, new_id, batch):
            complete = False
            vectors = _embed(embed, [row.text for row in rows], dim)
            dim = vectors.shape[1]
            done += _add_vectors(log, rows, vectors, new_id)
            progress(len(rows))
        if complete:
            switched = _switch(log, model, old_id, new_id, dim or _dim_of(log, new_id) or serving.dim)
    _blank_replaced(log, model)
    return done


def _without_vector(log: Log, old_id: int, new_id: int, batch: int) -> Iterator[list[Row[Any]]]:
    """The live memories without a vector of the new model, each batch in a transaction of its own."""
    after = 0
    while True:
        with log.read() as connection:
            statement = _select_without_vector(old_id, new_id).where(memories.c.label > after).limit(batch)
            found = list(connection.execute(statement))
        if not found:
            return
        if any(row.text is None for row in found):
            raise damaged("a memory has no text")
        yield found
        after = found[-1].label


def _select_without_vector(old_id: int, new_id: int) -> Select[Any]:
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


def _embed(embed: Callable[[Sequence[str]], npt.ArrayLike], texts: Sequence[str], dim: int) -> npt.NDArray[np.float32]:
    """(n, dim) float32. `dim` is that of earlier calls, or 0."""
    vectors = np.asarray(embed([text if text.strip() else BLANK_TEXT_AS for text in texts]), np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts) or (dim and vectors.shape[1] != dim):
        raise InvalidInput(f"Embedding {len(texts)} texts returned vectors of shape {vectors.shape}.")
    return vectors


def _add_vectors(log: Log, found: Sequence[Row[Any]], vectors: npt.NDArray[np.float32], new_id: int) -> int:
    """Write the vectors of those memories that have not changed since they were read. Returns how many."""
    with log.write() as connection:
        lock_users(connection, [row.uid for row in found])
        current = select(memories.c.uid, memories.c.version).where(
            memories.c.label.in_([row.label for row in found]), memories.c.deleted == 0
        )
        embedded = select(contents.c.uid, contents.c.version).where(
            contents.c.uid.in_({row.uid for row in found}),
            contents.c.version.in_([row.version for row in found]),
            contents.c.model == new_id,
            contents.c.blank == literal_column("0"),
        )
        wanted = {(uid, version) for uid, version in connection.execute(current)}
        wanted -= {(uid, version) for uid, version in connection.execute(embedded)}
        rows = [
            _row_of_contents(row, vector, new_id)
            for row, vector in zip(found, vectors, strict=True)
            if (row.uid, row.version) in wanted
        ]
        write_contents(connection, rows)
    return len(rows)


def _row_of_contents(row: Row[Any], vector: npt.NDArray[np.float32], model: int) -> dict[str, Any]:
    embedding, crc = dump_vector(vector, len(vector), "vector")
    return {
        "blank": 0,
        "uid": row.uid,
        "version": row.version,
        "model": model,
        "vector_crc": crc,
        "text": row.text,
        "metadata": row.metadata,
        "embedding": embedding,
    }


def _switch(log: Log, model: str, old_id: int, new_id: int, dim: int) -> bool:
    """Switch the log to the new model, unless a memory was added meanwhile."""
    with log.write() as connection:
        # Waits for writers of the old model, and makes later ones wait until the transaction ends.
        connection.execute(select(meta.c.value).where(meta.c.name == "model").with_for_update())
        if connection.execute(_select_without_vector(old_id, new_id).limit(1)).first() is not None:
            return False
        connection.execute(update(meta).where(meta.c.name == "model").values(value=model))
        connection.execute(update(meta).where(meta.c.name == "dim").values(value=str(dim)))
    return True


def _dim_of(log: Log, new_id: int) -> int:
    with log.read() as connection:
        statement = select(func.length(contents.c.embedding)).where(
            contents.c.model == new_id, contents.c.blank == 0, contents.c.embedding != b""
        )
        return int(connection.execute(statement.limit(1)).scalar() or 0) // 4


def _blank_replaced(log: Log, model: str) -> int:
    """Blank the vectors of other models that the new model's have replaced. Returns how many."""
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
    after = blanked = 0
    while True:
        with log.write() as connection:
            found = list(connection.execute(replaced.where(contents.c.cid > after)))
            if not found:
                return blanked
            # Without these locks this and a deletion could deadlock: they update the rows in different orders.
            lock_users(connection, [row.uid for row in found])
            erase_contents(connection, OF_ROWS, {"cids": [row.cid for row in found]})
        after = found[-1].cid
        blanked += len(found)
