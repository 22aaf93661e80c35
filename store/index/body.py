"""The rows of an index that are searched with a graph, which has one node for each distinct vector.

hnswlib never prunes the links between equal vectors: some 150 nodes with one vector link only to each other, and a
search that reaches them does not leave them. So rows with equal vectors share a node.

Guarantees: a row can be found if and only if it was added and not deleted. A search that does not return every row with
some score returns the newest of them, which have the greatest numbers. Vectors are equal if all their bytes are.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from store.index.graph import Graph, Nearest, Nodes
from store.index.matrix import Rows
from store.records import Vector

TIE = 2e-6  # scores that differ by less may be equal after rounding
_SPARE = 16  # nodes beyond the k-th that a search asks for, since they may have its score
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

    nodes: (rows,) int32, the node of each row, or -1.
    keys: (live nodes,) int64, ascending, the hashes of their vectors.
    key_nodes: (live nodes,) int32, the nodes that have these keys.
    """

    nodes: npt.NDArray[np.int32]
    keys: npt.NDArray[np.int64]
    key_nodes: npt.NDArray[np.int32]


class Body:
    """Rows with L2-normalised vectors. Rows are added in ascending order; any numbers may be left out."""

    __slots__ = ("_dead", "_end", "_equal", "_keys", "_nodes", "_row", "graph", "live")

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.live = 0  # number of rows that can be found
        self._dead = 0  # number of rows that were deleted
        self._end = 0  # the number after the last row
        self._nodes = np.zeros(0, np.int32)  # the node of each row; -1 for a row that was left out
        self._row = np.zeros(0, np.int64)  # of each node: a live row of it; -1 if there is none
        self._equal: dict[int, array[int]] = {}  # the live rows, ascending, of each node that has several
        self._keys = Keys(np.zeros(0, np.int64), np.zeros(0, np.int32))

    @classmethod
    def restore(cls, graph: Graph, arrays: Arrays, alive: npt.NDArray[np.bool_]) -> Body:
        """The body that had this graph and these arrays. `alive: (rows,)`, whether a row was deleted."""
        body = cls(graph)
        body._keys = Keys(arrays.keys, arrays.key_nodes)
        body._nodes, body._end = arrays.nodes, len(arrays.nodes)
        body._row = np.full(graph.count, -1, np.int64)
        rows = np.flatnonzero(alive & (arrays.nodes >= 0))
        body.live = len(rows)
        body._dead = int(np.count_nonzero(arrays.nodes >= 0)) - body.live
        rows = rows[np.argsort(arrays.nodes[rows], kind="stable")]
        nodes, starts = np.unique(arrays.nodes[rows], return_index=True)
        body._row[nodes] = rows[starts]
        sizes = np.diff(starts, append=len(rows))
        for n in np.flatnonzero(sizes > 1).tolist():
            body._equal[int(nodes[n])] = array("q", rows[starts[n] : starts[n] + sizes[n]].tobytes())
        return body

    def arrays(self) -> Arrays:
        """What `restore` needs. The keys of dead nodes are left out, since a saved graph lacks their vectors."""
        keys, nodes = self._keys.arrays()
        live = self._row[nodes] >= 0
        return Arrays(self._nodes[: self._end], keys[live], nodes[live])

    @property
    def bytes(self) -> int:
        """Memory that this body holds."""
        equal = 300 * len(self._equal) + 9 * (self.live - self.graph.live)
        return self.graph.bytes + self._nodes.nbytes + self._row.nbytes + self._keys.bytes + equal

    @property
    def dead_share(self) -> float:
        """The share of rows, or of nodes if that is larger, that only a rebuild removes."""
        return max(self._dead / max(self._dead + self.live, 1), self.graph.dead / max(self.graph.count, 1))

    def add(self, rows: Rows, vectors: Vector) -> None:
        """Add rows, whose numbers are greater than all before, with L2-normalised vectors (n, dim), n at least 1."""
        first = self.graph.count
        new: list[int] = []  # positions of the vectors that get nodes, numbered from `first` on
        nodes = np.empty(len(rows), np.int32)
        for position, vector in enumerate(vectors):
            key = int.from_bytes(blake2b(vector, digest_size=8).digest(), "little", signed=True)
            node = self._keys.find(key)
            same = node is not None and (
                np.array_equal(vectors[new[node - first]], vector) if node >= first else self._has(node, vector)
            )
            if node is None or not same:
                node = first + len(new)
                new.append(position)
                self._keys.put(key, node)
            nodes[position] = node
        if new:
            self.graph.add(vectors[new])
            self._row = _reserved(self._row, first, self.graph.count)
        end = int(rows[-1]) + 1
        self._nodes = _reserved(self._nodes, self._end, end)
        self._nodes[rows] = nodes
        self._end = end
        for row, node in zip(rows.tolist(), nodes.tolist(), strict=True):
            self._hang(row, node)
        self.live += len(rows)

    def delete(self, rows: Rows) -> None:
        """Remove rows that can be found. A node is deleted with its last row."""
        self.live -= len(rows)
        self._dead += len(rows)
        for row, node in zip(rows.tolist(), self._nodes[rows].tolist(), strict=True):
            equal = self._equal.get(node)
            if equal is None:
                self._row[node] = -1
                self.graph.delete(node)
                continue
            del equal[bisect_left(equal, row)]
            self._row[node] = equal[0]
            if len(equal) == 1:
                del self._equal[node]

    def nearest(self, query: Vector, k: int) -> Found | None:
        """At least the min(k, live) nearest rows. None if the graph does not lead to them."""
        wanted = min(k, self.graph.live)
        found = self.graph.nearest(query, min(wanted + _SPARE, self.graph.live))
        if found is None:
            found = self.graph.nearest(query, wanted)
        return None if found is None else self._rows_of(found, k, None)

    def nearest_among(self, query: Vector, k: int, usable: npt.NDArray[np.bool_]) -> Found | None:
        """At least the k nearest of the usable rows. None if a scan of them is the better way.

        Args:
            usable: (rows,), whether a row may be found. At least one may.
        """
        nodes = np.zeros(self.graph.count, np.bool_)
        nodes[self._nodes[: len(usable)][usable]] = True
        matches = int(np.count_nonzero(nodes))
        found = self.graph.nearest_among(query, min(k, matches), nodes, matches)
        return None if found is None else self._rows_of(found, k, usable)

    def nodes(self, rows: Rows) -> Nodes:
        """(n,) the nodes of rows that were not left out."""
        return self._nodes[rows].astype(np.int64)

    def vectors(self, rows: Rows) -> Vector:
        """(n, dim) float32, L2-normalised, of rows that can be found. Slow: about 20 us per node."""
        nodes, at = np.unique(self._nodes[rows], return_inverse=True)
        return self.graph.vectors(nodes.astype(np.int64))[at]

    def _has(self, node: int, vector: Vector) -> bool:
        """Whether the vector of a node is this one. A deleted node that has it is revived."""
        dead = self._row[node] < 0
        if dead:
            self.graph.revive(node)
        same = np.array_equal(self.graph.vectors(np.array([node]))[0], vector)
        if dead and not same:
            self.graph.delete(node)
        return same

    def _hang(self, row: int, node: int) -> None:
        """Give a row to a node."""
        other = int(self._row[node])
        if other < 0:
            self._row[node] = row
        elif node in self._equal:
            self._equal[node].append(row)
        else:
            self._equal[node] = array("q", [other, row])

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
