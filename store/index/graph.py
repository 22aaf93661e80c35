"""An HNSW graph (hnswlib 0.8.0, https://arxiv.org/abs/1603.09320) of numbered nodes. No other module uses hnswlib.

Its hazards are handled here:
- `knn_query` raises if it finds fewer than k nodes. A search returns None instead, and the caller scans exactly.
- `ef` is not saved, and must be at least k. It is set before each query.
- `replace_deleted` on a label that is not deleted leaves a node that can be found but not deleted. It is never used,
  and a node is added once.
- The capacity is fixed until `resize_index` is called, which copies the whole graph. It grows by an eighth.
- `save_index` does not notice a full disk, and writes the vectors of deleted nodes. See `save` and `overwrite_deleted`.
- `load_index` reads out of bounds if the file is damaged. A file must be verified before it is loaded.
- Adding and searching at the same time is not allowed. One thread owns a graph.

One hazard is left to the caller (`store.index.body`): the links of a node lead to the nearest of the `ef_construction`
nodes that are found when it is added. So hundreds of equal or nearly equal vectors link only to each other.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import NamedTuple

import hnswlib
import numpy as np
import numpy.typing as npt

from store.records import IndexOptions, Vector

_HEADER = "=6QiIQQQdQ"


Nodes = npt.NDArray[np.int64]
"""Numbers of nodes, from 0 on in the order in which they were added."""


class Nearest(NamedTuple):
    """Nodes (n,) int64 and their scores (n,) float32, in no order."""

    nodes: Nodes
    scores: npt.NDArray[np.float32]


class Graph:
    """Nodes with L2-normalised vectors; a score is a dot product. Deleted nodes stay in the graph and are not found."""

    __slots__ = ("_hnsw", "count", "dead", "dim", "options")

    def __init__(self, dim: int, options: IndexOptions, capacity: int) -> None:
        self.dim = dim
        self.options = options
        self.count = 0
        self.dead = 0
        self._hnsw = hnswlib.Index("ip", dim)
        self._hnsw.init_index(
            max(capacity, 16), M=options.m, ef_construction=options.ef_construction, allow_replace_deleted=False
        )
        self._hnsw.set_num_threads(1)

    @classmethod
    def load(cls, path: Path, dim: int, options: IndexOptions, *, count: int, dead: int) -> Graph:
        """Read a file that `save` wrote and that was verified.

        Raises:
            RuntimeError: hnswlib refuses the file, or it holds another number of nodes.
        """
        graph = cls.__new__(cls)
        graph.dim, graph.options, graph.count, graph.dead = dim, options, count, dead
        graph._hnsw = hnswlib.Index("ip", dim)
        graph._hnsw.load_index(str(path), max_elements=count + count // 16)
        graph._hnsw.set_num_threads(1)
        if graph._hnsw.get_current_count() != count:
            raise RuntimeError("The graph holds another number of nodes than its snapshot says.")
        return graph

    def save(self, path: Path) -> None:
        """Write the graph to a file. hnswlib holds the interpreter's lock meanwhile.

        Raises:
            OSError: the file could not be written whole.
        """
        self._hnsw.save_index(str(path))
        if path.stat().st_size != self._hnsw.index_file_size():
            path.unlink()
            raise OSError(f"{path} was not written whole")

    @property
    def live(self) -> int:
        """Number of nodes that a search can find."""
        return self.count - self.dead

    @property
    def bytes(self) -> int:
        """Memory that hnswlib 0.8.0 allocates: level 0, upper levels, locks, levels, look-up table."""
        m, capacity = self.options.m, self._hnsw.get_max_elements()
        level0 = 4 * self.dim + 8 + 4 * 2 * m + 4
        upper = (4 * m + 4) / (m - 1) + 16
        return int(capacity * (level0 + 8 + 40 + 4 + 2) + self.count * (upper + 48)) + 65_536 * 40

    def add(self, vectors: Vector) -> None:
        """Add nodes with the next numbers. `vectors: (n, dim) float32, L2-normalised`, n at least 1."""
        end = self.count + len(vectors)
        if end > self._hnsw.get_max_elements():
            self._hnsw.resize_index(max(end, self.count + self.count // 8))
        self._hnsw.add_items(vectors, np.arange(self.count, end), num_threads=1)
        self.count = end

    def delete(self, node: int) -> None:
        """Hide a node from searches. Its vector stays until the graph is rebuilt."""
        self._hnsw.mark_deleted(node)
        self.dead += 1

    def revive(self, node: int) -> None:
        """Undo `delete`."""
        self._hnsw.unmark_deleted(node)
        self.dead -= 1

    def nearest(self, query: Vector, k: int) -> Nearest | None:
        """The k nearest nodes, k at most `live`. None if the graph does not lead to k nodes."""
        self._hnsw.set_ef(max(self.options.ef, k))
        try:
            nodes, distances = self._hnsw.knn_query(query, k=k, num_threads=1)
        except RuntimeError:  # "Cannot return the results in a contiguous 2D array": fewer than k were reached
            return None
        return Nearest(nodes[0].astype(np.int64), 1.0 - distances[0])

    def kth_scores(self, queries: Vector, k: int) -> npt.NDArray[np.float32] | None:
        """(n,) the score of the k-th nearest node to each of the queries (n, dim), k at most `live`. None as above."""
        self._hnsw.set_ef(k)
        try:
            _, distances = self._hnsw.knn_query(queries, k=k, num_threads=1)
        except RuntimeError:
            return None
        return 1.0 - distances.max(axis=1)

    def nearest_among(self, query: Vector, k: int, usable: npt.NDArray[np.bool_], matches: int) -> Nearest | None:
        """At least the k nearest of the usable nodes. None if a scan of the usable nodes is the better way.

        The graph is searched for more and more nodes until k of them are usable. hnswlib's own filter, a Python
        callback for each node, is 30 to 100 times slower.

        Args:
            usable: whether a node may be found, by its number.
            matches: number of usable nodes, at least k.
        """
        depth = math.ceil(1.5 * k * self.live / matches) + 16
        while depth < self.live // 8:
            found = self.nearest(query, depth)
            if found is None:
                return None
            good = usable[found.nodes]
            if np.count_nonzero(good) >= k:
                return Nearest(found.nodes[good], found.scores[good])
            depth *= 4
        return None

    def vectors(self, nodes: Nodes) -> Vector:
        """(n, dim) float32, L2-normalised, of nodes that are not deleted. Slow: about 20 us per node."""
        found: Vector = np.asarray(self._hnsw.get_items(nodes, return_type="numpy"), np.float32)
        return found


def overwrite_deleted(path: Path, *, count: int, dim: int, m: int) -> None:
    """Overwrite the vectors of deleted nodes, which may have been erased, in a file that `Graph.save` wrote.

    A search still passes through a deleted node, so the node gets the vector of its first neighbour that is not
    deleted. The layout is that of hnswlib 0.8.0 (HierarchicalNSW::saveIndex): a header, then for each node a record of
    links, vector and label. The third byte of a record tells whether the node is deleted.

    Raises:
        OSError: the file has another layout.
    """
    links = 4 * 2 * m + 4
    record = links + 4 * dim + 8
    with path.open("rb") as file:
        header = struct.unpack(_HEADER, file.read(struct.calcsize(_HEADER)))
    if header[2:6] != (count, record, record - 8, links):
        raise OSError(f"{path} does not have the layout of hnswlib 0.8.0")
    nodes = np.memmap(path, np.uint8, "r+", struct.calcsize(_HEADER), (count, record))
    dead = (nodes[:, 2] & 1).astype(np.bool_)
    left = np.flatnonzero(dead)
    nodes[left, links : record - 8] = 0
    neighbours = nodes[left, 4:links].copy().view(np.uint32)  # (n, 2 m), of which the first `degree` are links
    degree = nodes[left, :2].copy().view(np.uint16)[:, 0]
    for slot in range(2 * m):
        usable = slot < degree
        usable[usable] = ~dead[neighbours[usable, slot]]
        nodes[left[usable], links : record - 8] = nodes[neighbours[usable, slot], links : record - 8]
        left, neighbours, degree = left[~usable], neighbours[~usable], degree[~usable]
    nodes.flush()
