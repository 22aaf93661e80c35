"""The rows of an index that are searched with a graph, except for those that would spoil the graph.

In an HNSW graph hundreds of equal or nearly equal vectors link only to each other, and a search that reaches them does
not leave them. Of 10,000 vectors in 20 such groups, a search found half of the ten nearest. Therefore:
- Rows with equal vectors share a node.
- If a vector has `CROWD` nodes as near as `NEAR`, it gets no node. Its row joins the crowd, which is searched exactly:
  with 384 dimensions this takes 0.03 to 0.1 ms for each 1,000 rows.

Guarantees: a row can be found if and only if it was added and not deleted. A search that does not return every row with
some score returns the newest of them, which have the greatest numbers. Vectors are equal if all their bytes are.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from store.index.graph import Graph, Nearest
from store.index.matrix import Matrix, Rows
from store.records import Vector

TIE = 2e-6  # scores that differ by less may be equal after rounding
CROWD = 32  # as many links as a node has with M 16, so that its like cannot fill them
NEAR = 0.9  # cosine
_SPARE = 16  # nodes beyond the k-th that a search asks for, since they may have its score
_IN_CROWD = -2  # in place of a row's node
_ROW_S = 0.0005  # time to add a row with a new vector, until it is measured
_RECENT = 1024  # keys that are kept in a dictionary before they are merged into arrays


class Found(NamedTuple):
    """Rows (n,) int64 and their scores (n,) float32, in no order."""

    rows: Rows
    scores: npt.NDArray[np.float32]


class Keys:
    """The nodes by the hash of their vector. Another vector may have the same hash."""

    __slots__ = ("_keys", "_nodes", "_recent")

    def __init__(self, keys: npt.NDArray[np.int64], nodes: npt.NDArray[np.int32]) -> None:
        """Start with keys (n,), ascending, and their nodes (n,)."""
        self._keys = keys
        self._nodes = nodes
        self._recent: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        """Memory that the keys take."""
        return self._keys.nbytes + self._nodes.nbytes + 150 * len(self._recent)

    def find(self, key: int) -> int | None:
        """The node that was put last under a key."""
        node = self._recent.get(key)
        if node is None:
            at = int(self._keys.searchsorted(key))
            if at < len(self._keys) and self._keys[at] == key:
                node = int(self._nodes[at])
        return node

    def put(self, key: int, node: int) -> None:
        """Set the node of a key."""
        self._recent[key] = node
        if len(self._recent) >= _RECENT:
            self._keys, self._nodes = self.arrays()
            self._recent = {}

    def arrays(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """The keys (n,), ascending, and their nodes (n,)."""
        recent = np.fromiter(self._recent.keys(), np.int64, len(self._recent))
        nodes = np.fromiter(self._recent.values(), np.int32, len(self._recent))
        order = np.argsort(recent)
        kept = ~np.isin(self._keys, recent)
        keys = self._keys[kept]
        at = keys.searchsorted(recent[order])
        return np.insert(keys, at, recent[order]), np.insert(self._nodes[kept], at, nodes[order])


class Arrays(NamedTuple):
    """What a body holds beside its graph.

    nodes: (rows,) int32, the node of each row; -2 if it is in the crowd, -1 if there is no such row.
    keys: (live nodes,) int64, ascending, the hashes of their vectors.
    key_nodes: (live nodes,) int32, the nodes that have these keys.
    crowd: (rows in the crowd * dim,) float32, their vectors, L2-normalised; zeros for a deleted row.
    """

    nodes: npt.NDArray[np.int32]
    keys: npt.NDArray[np.int64]
    key_nodes: npt.NDArray[np.int32]
    crowd: npt.NDArray[np.float32]


class Body:
    """Rows with L2-normalised vectors. Rows are added in ascending order; any numbers may be left out.

    `row_s` is the time that adding a row with a new vector takes, measured whenever rows are added.
    """

    __slots__ = (
        "_crowd",
        "_crowd_alive",
        "_crowd_rows",
        "_dead",
        "_end",
        "_equal",
        "_keys",
        "_nodes",
        "_row",
        "graph",
        "live",
        "row_s",
    )

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.live = 0  # number of rows that can be found
        self.row_s = _ROW_S
        self._dead = 0  # number of rows that were deleted
        self._end = 0  # the number after the last row
        self._nodes = np.zeros(0, np.int32)  # the node of each row, as in `Arrays`
        self._row = np.zeros(0, np.int64)  # of each node: a live row of it; -1 if there is none
        self._equal: dict[int, array[int]] = {}  # the live rows, ascending, of each node that has several
        self._keys = Keys(np.zeros(0, np.int64), np.zeros(0, np.int32))
        self._crowd = Matrix(graph.dim)  # the vectors of the rows in the crowd, by their position
        self._crowd_rows = np.zeros(0, np.int64)  # the row at each position, ascending
        self._crowd_alive = np.zeros(0, np.bool_)

    @classmethod
    def restore(cls, graph: Graph, arrays: Arrays, alive: npt.NDArray[np.bool_]) -> Body:
        """The body that had this graph and these arrays. `alive: (rows,)`, False for a row that was deleted."""
        body = cls(graph)
        body._keys = Keys(arrays.keys, arrays.key_nodes)
        body._nodes, body._end = arrays.nodes, len(arrays.nodes)
        alive = alive[: body._end]  # dead rows at the end may have been left out
        body._row = np.full(graph.count, -1, np.int64)
        body.live = int(np.count_nonzero(alive & (arrays.nodes != -1)))
        body._dead = int(np.count_nonzero(arrays.nodes != -1)) - body.live
        rows = np.flatnonzero(alive & (arrays.nodes >= 0))
        rows = rows[np.argsort(arrays.nodes[rows], kind="stable")]
        nodes, starts = np.unique(arrays.nodes[rows], return_index=True)
        body._row[nodes] = rows[starts]
        sizes = np.diff(starts, append=len(rows))
        for n in np.flatnonzero(sizes > 1).tolist():
            body._equal[int(nodes[n])] = array("q", rows[starts[n] : starts[n] + sizes[n]].tobytes())
        body._crowd_rows = np.flatnonzero(arrays.nodes == _IN_CROWD)
        body._crowd_alive = alive[body._crowd_rows]
        body._crowd.append(arrays.crowd.reshape(-1, graph.dim), normalise=False)
        return body

    def arrays(self) -> Arrays:
        """What `restore` needs. The keys of dead nodes are left out, since a saved graph lacks their vectors."""
        keys, nodes = self._keys.arrays()
        live = self._row[nodes] >= 0
        crowd = self._crowd.vectors(np.arange(self._crowd.end)).reshape(-1)
        return Arrays(self._nodes[: self._end], keys[live], nodes[live], crowd)

    @property
    def bytes(self) -> int:
        """Memory that this body holds."""
        equal = 300 * len(self._equal) + 9 * (self.live - self.graph.live)
        crowd = self._crowd.bytes + self._crowd_rows.nbytes + self._crowd_alive.nbytes
        return self.graph.bytes + self._nodes.nbytes + self._row.nbytes + self._keys.bytes + equal + crowd

    @property
    def dead_share(self) -> float:
        """The share of rows, or of nodes if that is larger, that only a rebuild removes."""
        return max(self._dead / max(self._dead + self.live, 1), self.graph.dead / max(self.graph.count, 1))

    def add(self, rows: Rows, vectors: Vector) -> None:
        """Add rows, whose numbers are greater than all before, with L2-normalised vectors (n, dim), n at least 1."""
        began = time.perf_counter()
        keys = [int.from_bytes(blake2b(vector, digest_size=8).digest(), "little", signed=True) for vector in vectors]
        revived: set[int] = set()
        found = [self._node_of(key, vector, revived) for key, vector in zip(keys, vectors, strict=True)]
        nodes = np.array(found, np.int32)
        unknown = np.flatnonzero(nodes < 0)
        if len(unknown):
            crowded = self._are_crowded(vectors[unknown])
            nodes[unknown[crowded]] = _IN_CROWD
            self._add_nodes(unknown[~crowded].tolist(), keys, vectors, nodes)
            self.row_s = 0.5 * self.row_s + 0.5 * (time.perf_counter() - began) / len(unknown)
        end = int(rows[-1]) + 1
        self._nodes = _reserved(self._nodes, self._end, end)
        self._nodes[rows] = nodes
        self._end = end
        for row, node in zip(rows.tolist(), nodes.tolist(), strict=True):
            if node >= 0:
                self._hang(row, node)
        joins = nodes == _IN_CROWD
        if joins.any():
            self._crowd.append(vectors[joins], normalise=False)
            self._crowd_rows = np.concatenate([self._crowd_rows, rows[joins]])
            self._crowd_alive = np.concatenate([self._crowd_alive, np.ones(np.count_nonzero(joins), np.bool_)])
        self.live += len(rows)

    def delete(self, rows: Rows) -> None:
        """Remove rows that can be found. A node is deleted with its last row."""
        self.live -= len(rows)
        self._dead += len(rows)
        nodes = self._nodes[rows]
        positions = self._crowd_rows.searchsorted(rows[nodes == _IN_CROWD])
        self._crowd.wipe(positions)
        self._crowd_alive[positions] = False
        for row, node in zip(rows.tolist(), nodes.tolist(), strict=True):
            if node >= 0:
                self._take_off(row, node)

    def nearest(self, query: Vector, k: int) -> Found | None:
        """At least the min(k, live) nearest rows. None if the graph does not lead to them."""
        wanted = min(k, self.graph.live)
        if wanted == 0:
            return self._with_crowd(None, query, self._crowd_alive)
        found = self.graph.nearest(query, min(wanted + _SPARE, self.graph.live))
        if found is None:
            found = self.graph.nearest(query, wanted)
        return None if found is None else self._with_crowd(self._rows_of(found, k, None), query, self._crowd_alive)

    def nearest_among(self, query: Vector, k: int, usable: npt.NDArray[np.bool_]) -> Found | None:
        """At least the k nearest of the usable rows. None if a scan of them is the better way.

        Args:
            usable: (rows,), whether a row may be found. No deleted row may.
        """
        usable = usable[: self._end]
        nodes = np.zeros(self.graph.count, np.bool_)
        of_usable = self._nodes[: self._end][usable]
        nodes[of_usable[of_usable >= 0]] = True
        matches = int(np.count_nonzero(nodes))
        in_crowd = usable[self._crowd_rows]
        if matches == 0:
            return self._with_crowd(None, query, in_crowd)
        found = self.graph.nearest_among(query, min(k, matches), nodes, matches)
        return None if found is None else self._with_crowd(self._rows_of(found, k, usable), query, in_crowd)

    def same(self, rows: Rows) -> npt.NDArray[np.int64]:
        """(n,) a number for each of the rows. Rows with the same number have equal vectors."""
        nodes = self._nodes[rows].astype(np.int64)
        return np.where(nodes == _IN_CROWD, -1 - rows, nodes)

    def vectors(self, rows: Rows) -> Vector:
        """(n, dim) float32, L2-normalised, of rows that can be found. Slow: about 20 us per node."""
        vectors = np.empty((len(rows), self.graph.dim), np.float32)
        in_crowd = self._nodes[rows] == _IN_CROWD
        vectors[in_crowd] = self._crowd.vectors(self._crowd_rows.searchsorted(rows[in_crowd]))
        if not in_crowd.all():
            nodes, at = np.unique(self._nodes[rows[~in_crowd]], return_inverse=True)
            vectors[~in_crowd] = self.graph.vectors(nodes.astype(np.int64))[at]
        return vectors

    def _node_of(self, key: int, vector: Vector, revived: set[int]) -> int:
        """The node that has a vector, -1 if there is none. A deleted node that has it is revived, once."""
        node = self._keys.find(key)
        if node is None:
            return -1
        dead = self._row[node] < 0 and node not in revived
        if dead:
            self.graph.revive(node)
        if np.array_equal(self.graph.vectors(np.array([node]))[0], vector):
            if dead:
                revived.add(node)
            return node
        if dead:
            self.graph.delete(node)
        return -1

    def _are_crowded(self, vectors: Vector) -> npt.NDArray[np.bool_]:
        """Whether each of the vectors (n, dim) has `CROWD` nodes that are as near as `NEAR`."""
        scores = self.graph.kth_scores(vectors, CROWD) if self.graph.live >= CROWD else None
        return np.zeros(len(vectors), np.bool_) if scores is None else scores >= NEAR

    def _add_nodes(self, positions: list[int], keys: list[int], vectors: Vector, nodes: npt.NDArray[np.int32]) -> None:
        """Add a node for each distinct vector at these positions, and write the numbers into `nodes`."""
        first = self.graph.count
        new: dict[int, int] = {}  # from the key of a vector that gets a node to its position
        added: list[int] = []
        for position in positions:
            same = new.get(keys[position])
            if same is not None and np.array_equal(vectors[same], vectors[position]):
                nodes[position] = nodes[same]
                continue
            nodes[position] = first + len(added)
            added.append(position)
            new[keys[position]] = position
        if added:
            self.graph.add(vectors[added])
            self._row = _reserved(self._row, first, self.graph.count)
            for position in added:
                self._keys.put(keys[position], int(nodes[position]))

    def _hang(self, row: int, node: int) -> None:
        """Give a row to a node."""
        other = int(self._row[node])
        if other < 0:
            self._row[node] = row
        elif node in self._equal:
            self._equal[node].append(row)
        else:
            self._equal[node] = array("q", [other, row])

    def _take_off(self, row: int, node: int) -> None:
        """Undo `_hang`."""
        equal = self._equal.get(node)
        if equal is None:
            self._row[node] = -1
            self.graph.delete(node)
            return
        del equal[bisect_left(equal, row)]
        self._row[node] = equal[0]
        if len(equal) == 1:
            del self._equal[node]

    def _with_crowd(self, found: Found | None, query: Vector, usable: npt.NDArray[np.bool_]) -> Found:
        """What was found, and all usable rows of the crowd. `usable` is by position."""
        if found is None:
            found = Found(np.zeros(0, np.int64), np.zeros(0, np.float32))
        if not len(usable):
            return found
        scores = self._crowd.scores(query, 0)[usable]
        rows = self._crowd_rows[usable]
        return Found(np.concatenate([found.rows, rows]), np.concatenate([found.scores, scores]))

    def _rows_of(self, found: Nearest, k: int, usable: npt.NDArray[np.bool_] | None) -> Found:
        """The k newest usable rows of each node that may be among the k best."""
        nodes, scores = found
        if k < len(scores):
            near = scores >= np.partition(scores, len(scores) - k)[len(scores) - k] - TIE
            nodes, scores = nodes[near], scores[near]
        rows = self._row[nodes]
        several = [position for position, node in enumerate(nodes.tolist()) if node in self._equal]
        if not several:
            return Found(rows, scores)
        parts, sizes = [np.delete(rows, several)], []
        for position in several:
            equal = np.array(self._equal[int(nodes[position])], np.int64)
            if usable is not None:
                equal = equal[usable[equal]]
            parts.append(equal[-k:])
            sizes.append(len(parts[-1]))
        repeated = np.repeat(scores[several], sizes)
        return Found(np.concatenate(parts), np.concatenate([np.delete(scores, several), repeated]))


def _reserved(old: npt.NDArray[Any], used: int, end: int) -> npt.NDArray[Any]:
    """An array with room for at least `end` items, of which the first `used` are kept and the others are -1."""
    if end <= len(old):
        return old
    new = np.full(end + end // 16, -1, old.dtype)
    new[:used] = old[:used]
    return new
