"""Searches: the user's index is caught up with the log and searched, then the rows that it found are fetched.

The way of a search: the index names the memories that match best (store/index/matching.py), their measures become
scores (store/ranking.py), the best are taken, and their contents are fetched.

Guarantees: all requests of one call are answered from one state of the log, that of their read transaction, in which
the indexes are caught up and the rows are fetched. If data of one user is damaged, only the requests that read it fail.

A search of indexes in memory takes one statement for the users' versions and one for the rows that were found, however
many requests the call has, and one more for each request that asks for vectors.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
from sqlalchemy import Connection

from store import adjusting, ranking
from store.errors import InvalidInput, LogDamaged, StoreError
from store.index.matching import Matcher, Query
from store.index.matrix import normalised
from store.index.resident import Resident
from store.index.snapshots import Snapshots
from store.index.timeline import Period
from store.index.tokens import query_keys
from store.index.user_index import Labels, UserIndex
from store.log import filters, reading, rows
from store.log.database import Log, check_model
from store.log.vouching import vouches
from store.ranking import Candidates, Fusion
from store.records import Filter, IndexOptions, Near, Search, SearchResult, Vector

POOL = 100
"""So many memories are candidates by their vectors, and so many by their words, if both are ranked together."""


NEAR = 50
"""So many near duplicates of one memory are looked at."""

LOOKED_AT = 200
"""So many memories are compared with all others in one call that lists near duplicates."""

MAX_CONTEXT = 20
"""So many memories before and after each result may be asked for."""


class _Searched(NamedTuple):
    """A request, the index that was searched for it (None if the user does not exist), and its best candidates.

    `context` has the labels of the memories around each candidate, with their places counted from it, if asked for.
    """

    request: Search
    user_index: UserIndex | None
    found: Candidates
    version: int
    context: list[list[tuple[int, int]]] | None = None

    @property
    def labels(self) -> list[int]:
        """The labels of all memories that are returned, the candidates first."""
        around = [label for context in self.context or () for _, label in context]
        return list(dict.fromkeys([*self.found.labels.tolist(), *around]))


class Searcher:
    """Searches with the indexes of one store. `changed` has the uids of the indexes that need background work."""

    def __init__(
        self,
        log: Log,
        resident: Resident,
        snapshots: Snapshots | None,
        *,
        dim: int,
        options: IndexOptions,
    ) -> None:
        self._log = log
        self._resident = resident
        self._snapshots = snapshots
        self._dim = dim
        self._options = options
        self.changed: OrderedDict[int, None] = OrderedDict()

    def search(
        self, connection: Connection, requests: Sequence[Search], uids: dict[tuple[str, str], int], now: int
    ) -> list[SearchResult | StoreError]:
        """Answer inside a read transaction. `uids` are those of the users that exist, by tenant and user id."""
        positions = reading.positions(connection, uids.values())
        searched: list[_Searched | StoreError] = []
        for request in requests:
            uid = uids.get((request.tenant, request.user_id))
            try:
                searched.append(self._search_one(connection, request, None if uid is None else positions[uid], now))
            except (InvalidInput, LogDamaged) as error:
                searched.append(error)
        labels = list({label for one in searched if isinstance(one, _Searched) for label in one.labels})
        try:
            found = reading.by_label(connection, labels, self._log.model_id) if labels else {}
        except InvalidInput:  # together they are too large for one answer; each may be one
            return [self._result_alone(connection, one) if isinstance(one, _Searched) else one for one in searched]
        return [self._result(connection, one, found) if isinstance(one, _Searched) else one for one in searched]

    def catch_up(self, connection: Connection, index: UserIndex, position: reading.Position) -> None:
        """Apply the changes that the log has and the index lacks.

        Raises:
            LogDamaged: a row is missing or is not what was written.
        """
        if index.version == position.version:
            return
        fresh, with_texts = index.version == 0, index.words is not None
        for changes in reading.changes(
            connection, index.uid, index.version, self._log.model_id, self._dim, with_texts=with_texts
        ):
            index.apply(changes)
        index.version = position.version
        if fresh and index.live != position.live:
            raise rows.damaged(f"a user has {index.live} memories, but {position.live} were counted")
        self.changed[index.uid] = None

    def _search_one(
        self, connection: Connection, request: Search, position: reading.Position | None, now: int
    ) -> _Searched:
        if not isinstance(request.top_k, int) or request.top_k < 1:
            raise InvalidInput("must be a whole number, at least 1", "top_k")
        least = request.min_score
        if not isinstance(least, float | np.floating | None) and not (isinstance(least, int) and abs(least) < 2**63):
            raise InvalidInput("must be a number", "min_score")
        query = self._query(request)
        period = _period(request)
        _check_ranking(request)
        if request.filter is not None:
            filters.check(request.filter)
        if position is None:
            return _Searched(request, None, ranking.NOBODY, 0)
        index = self._caught_up(connection, position, with_words=query.words is not None)
        index.expire(now)
        allowed = None if request.filter is None else self._matching(connection, index, request.filter)

        def fetch(labels: Labels) -> Vector:
            return reading.vectors(connection, labels.tolist(), self._log.model_id, self._dim)

        matcher = Matcher(index, query, fetch, allowed, period)
        best = _ranked(request, matcher, index, now)
        context = _context(request.context, best, matcher, index) if request.context else None
        return _Searched(request, index, best, position.version, context)

    def _query(self, request: Search) -> Query:
        """What memories are compared with.

        Raises:
            InvalidInput: the mode needs a vector or a text that is missing or cannot be used.
        """
        if request.mode not in ("hybrid", "vector", "words"):
            raise InvalidInput("must be hybrid, vector or words", "mode")
        vector = words = None
        if request.mode != "words":
            if request.vector is None:
                raise InvalidInput("is required, unless the mode is words", "vector")
            vector = normalised(rows.check_vector(request.vector, self._dim, "vector")[None, :])[0]
        if request.mode != "vector":
            if not isinstance(request.query, str):
                raise InvalidInput("must be a string, unless the mode is vector", "query")
            words = query_keys(request.query)
        return Query(vector, words)

    def warm_up(self, connection: Connection, uids: Iterable[int]) -> None:
        """Bring the indexes of users up to date inside a read transaction, so that `near_duplicates` need not wait."""
        for position in reading.positions(connection, uids).values():
            self._caught_up(connection, position, with_words=False)

    def near_duplicates(
        self, connection: Connection, uid: int, vectors: Vector, least: float, *, now: int
    ) -> list[list[bytes]]:
        """The keys of a user's memories whose cosine similarity is at least that, the nearest first.

        A list for each of the vectors (n, dim) float32 of length 1, of at most NEAR. The transaction must not have
        written to the user yet.
        """
        index = self._caught_up(connection, reading.positions(connection, [uid])[uid], with_words=False)
        index.expire(now)
        labels = [self._near(connection, index, vector, least)[0].tolist() for vector in vectors]
        keys = reading.keys_of(connection, uid, list({label for near in labels for label in near}))
        return [[keys[label] for label in near if label in keys] for near in labels]

    def duplicates(
        self, connection: Connection, position: reading.Position, after: int, *, least: float, limit: int, now: int
    ) -> tuple[list[list[tuple[int, float | None]]], int | None]:
        """Groups of near duplicates: the labels of their memories, and their similarity to the first.

        Looks at no more than LOOKED_AT memories above the label `after`, in the order of labels, and ends with the
        last of `limit` groups. Returns the groups and the label of the last memory that was looked at; None if no
        memory is left.
        """
        index = self._caught_up(connection, position, with_words=False)
        index.expire(now)
        labels = index.live_labels()
        labels = labels[labels.searchsorted(after, "right") :]
        block = labels[:LOOKED_AT]
        groups: list[list[tuple[int, float | None]]] = []
        if not len(block):
            return groups, None
        vectors = normalised(reading.vectors(connection, block.tolist(), self._log.model_id, self._dim))
        for place, (label, vector) in enumerate(zip(block.tolist(), vectors, strict=True), 1):
            near, scores = self._near(connection, index, vector, least)
            newer = near > label
            if newer.any() and not (near < label).any():
                others = zip(near[newer].tolist(), scores[newer].tolist(), strict=True)
                groups.append([(label, None), *others])
                if len(groups) == limit:
                    return groups, label if place < len(labels) else None
        return groups, int(block[-1]) if len(block) < len(labels) else None

    def _near(
        self, connection: Connection, index: UserIndex, vector: Vector, least: float
    ) -> tuple[Labels, npt.NDArray[np.float64]]:
        """The labels and the scores of at most NEAR memories that score at least that, the best first."""

        def fetch(labels: Labels) -> Vector:
            return reading.vectors(connection, labels.tolist(), self._log.model_id, self._dim)

        hits = index.search(vector, NEAR, fetch)
        near = hits.scores >= least
        return hits.labels[near], hits.scores[near]

    def drop_foreign_index(self, uid: int) -> LogDamaged:
        """Drop an index whose labels belong to another user: a backup of the log was restored while this store ran.

        Its snapshots go too, and the next search builds the index from the log. Returns the error for this search.
        """
        self._resident.drop(uid)
        if self._snapshots is not None:
            with suppress(OSError):
                self._snapshots.remove(uid)
        return LogDamaged("The log is older than the index of this user. The index is built again: try again.")

    def _caught_up(self, connection: Connection, position: reading.Position, *, with_words: bool) -> UserIndex:
        """The user's index at the version of the log."""
        check_model(position.model, self._log.model)
        index = self._resident.get(position.uid)
        if index is None or not position.reaches(index.epoch, index.version):
            index = None
            if self._snapshots is not None and position.live > self._options.switch // 2:
                index = self._snapshots.load(
                    position.uid,
                    position.epoch,
                    position.version,
                    position.removed_version,
                    partial(vouches, connection, position.uid),
                )
            if index is None:
                index = UserIndex(position.uid, position.epoch, self._dim, self._options)
                if with_words:
                    index.add_words([])
        if not index.is_placed:
            index.place(*reading.places(connection, index.uid))
        try:
            self.catch_up(connection, index, position)
            if with_words and index.words is None:
                index.add_words(reading.texts(connection, index.uid, self._log.model_id))
                self.changed[index.uid] = None
        except BaseException:
            self._resident.drop(position.uid)  # the changes may have been applied in part
            raise
        self._resident.put(index)
        return index

    def _matching(self, connection: Connection, index: UserIndex, filter: Filter) -> Labels:
        """Labels that match. They are kept with the index, so that later only the rows changed since are checked."""
        key = blake2b(orjson.dumps(filter, option=orjson.OPT_SORT_KEYS), digest_size=16).digest()
        after, labels = index.filters.pop(key, (0, np.zeros(0, np.int64)))
        if after < index.version:
            changed, fit = reading.matching_since(connection, index.uid, after, filter=filter, model=self._log.model_id)
            kept = labels[~np.isin(labels, changed)] if after else labels
            labels = np.concatenate([kept, np.array(fit, np.int64)])
        index.remember(key, labels)
        return labels

    def _result_alone(self, connection: Connection, searched: _Searched) -> SearchResult | StoreError:
        try:
            found = reading.by_label(connection, searched.labels, self._log.model_id)
        except InvalidInput as error:
            return error
        return self._result(connection, searched, found)

    def _result(self, connection: Connection, searched: _Searched, found: dict[int, Any]) -> SearchResult | LogDamaged:
        request, index, best = searched.request, searched.user_index, searched.found
        labels = searched.labels
        if index is not None and any(label in found and found[label].uid != index.uid for label in labels):
            return self.drop_foreign_index(index.uid)
        try:
            if any(label not in found for label in labels):
                raise rows.damaged("an indexed memory is missing")
            vectors: Sequence[Vector | None] = [None] * len(labels)
            if request.include_vectors:
                vectors = list(reading.vectors(connection, labels, self._log.model_id, self._dim))
            scores: Iterable[dict[str, float] | None] = repeat(None, len(best.labels))
            if request.explain:
                parts = [part.tolist() for part in best.parts.values()]
                scores = [dict(zip(best.parts, values, strict=True)) for values in zip(*parts, strict=True)]
            results = [
                rows.memory(found[label], request.user_id, *of_memory)
                for label, *of_memory in zip(best.labels.tolist(), best.scores.tolist(), vectors, scores, strict=False)
            ]
            context = None
            if searched.context is not None:
                near = {
                    label: rows.memory(found[label], request.user_id, None, vector)
                    for label, vector in zip(labels, vectors, strict=True)
                }
                context = tuple(tuple(Near(at, near[label]) for at, label in around) for around in searched.context)
        except LogDamaged as error:
            return error
        return SearchResult(results, index.kind if index is not None else "exact", searched.version, context)


def _ranked(request: Search, matcher: Matcher, index: UserIndex, now: int) -> Candidates:
    """The best candidates."""
    pool = request.top_k if request.mode == "vector" else max(request.top_k, POOL)
    if request.context is not None or request.recency_half_life_s is not None:
        pool = request.top_k + POOL  # some that were not among the best become so
    matches = matcher.best(pool)
    fusion = Fusion.of(matches.cosines, matches.bm25)
    candidates = fusion.candidates(*matches)
    if request.context is not None:
        near = index.neighbours(candidates.rows, 1)
        others = np.setdiff1d(near[near >= 0], candidates.rows)
        if len(others):
            candidates = adjusting.joined(candidates, fusion.candidates(*matcher.of(index.labels_of(others))))
        candidates = adjusting.with_neighbours(candidates, index.neighbours(candidates.rows, 1))
    if request.recency_half_life_s is not None:
        happened = index.timeline.happened[candidates.rows]
        candidates = adjusting.with_recency(candidates, happened, now, request.recency_half_life_s)
    return ranking.best(candidates, request.top_k, request.min_score)


def _context(n: int, best: Candidates, matcher: Matcher, index: UserIndex) -> list[list[tuple[int, int]]]:
    """The offsets and the labels of the memories around each of the best that may be found."""
    near = index.neighbours(best.rows, n)  # (k, 2n)
    offsets = np.broadcast_to(np.concatenate([np.arange(-n, 0), np.arange(1, n + 1)]), near.shape)
    context = []
    for rows_near, offset, usable in zip(near, offsets, matcher.may_find(near), strict=True):
        labels = index.labels_of(rows_near[usable])
        context.append(list(zip(offset[usable].tolist(), labels.tolist(), strict=True)))
    return context


def _period(request: Search) -> Period:
    """The time in which the memories were made that may be found.

    Raises:
        InvalidInput: an end of it is not a time, or it ends before it begins.
    """
    since = None if request.since is None else rows.micros(request.since, "since")
    until = None if request.until is None else rows.micros(request.until, "until")
    if since is not None and until is not None and until <= since:
        raise InvalidInput("must be later than since", "until")
    return Period(since, until)


def _check_ranking(request: Search) -> None:
    half_life_s, context = request.recency_half_life_s, request.context
    if half_life_s is not None and not (isinstance(half_life_s, int | float) and 0 < half_life_s < math.inf):
        raise InvalidInput("must be a number of seconds above 0", "recency_half_life_s")
    if context is not None and not (isinstance(context, int) and 0 <= context <= MAX_CONTEXT):
        raise InvalidInput(f"must be a whole number in 0 to {MAX_CONTEXT}", "context")
