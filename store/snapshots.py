"""Snapshots of large indexes on local disk, so that a restart need not build graphs again. Any may be lost at any time.

Guarantees: a snapshot is there whole or not at all (written aside, fsynced, renamed); hnswlib, which a damaged file can
make read out of bounds, sees no byte whose checksum was not verified; on any doubt the snapshot is removed and the
index is loaded from the log.

A snapshot is two files. `UID-EPOCH-VERSION.hnsw` is hnswlib's own; `UID-EPOCH-VERSION.rows` names it by checksum and is
the one that counts:

    magic | blake2b-128 of all that follows | length of the header, 4 bytes | header, JSON | labels | expires | alive
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from store.index import Graph, UserIndex
from store.records import IndexOptions

MAGIC = b"memserve snapshot 1\n"
_DIGEST_BYTES = 16


class Name(NamedTuple):
    """What a snapshot's file name says; trusted only to find it."""

    uid: int
    epoch: int
    version: int


class Snapshots:
    """The snapshots of one log in one folder, which belongs to one store."""

    def __init__(self, folder: Path, *, log_id: str, model: str, dim: int, options: IndexOptions) -> None:
        self.folder = folder
        self.refused = 0
        self._dim = dim
        self._options = options
        self._identity = {
            "log_id": log_id,
            "model": model,
            "dim": dim,
            "m": options.m,
            "ef_construction": options.ef_construction,
        }
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._names: dict[int, set[Name]] = {}
        for path in folder.glob("*.rows"):
            parts = path.stem.split("-")
            if len(parts) == 3 and all(part.isdigit() for part in parts):
                name = Name(*map(int, parts))
                self._names.setdefault(name.uid, set()).add(name)
        known = {f"{name.uid}-{name.epoch}-{name.version}" for name in self.names()}
        for path in folder.iterdir():  # what a write that died has left
            if path.suffix not in (".rows", ".hnsw") or path.stem not in known:
                path.unlink(missing_ok=True)

    def names(self) -> list[Name]:
        """Every snapshot there is."""
        return [name for names in self._names.values() for name in names]

    def save(self, index: UserIndex) -> bool:
        """Write a snapshot of `index` and remove the user's older ones. False while it cannot have one."""
        state = index.snapshot()
        if state is None:
            return False
        graph, labels, expires, alive = state
        if graph.dead:  # hnswlib would write their vectors, which may have been erased
            return False
        stem = f"{index.uid}-{index.epoch}-{index.version}"
        part = self.folder / f"{stem}.hnsw.part"
        graph.hnsw.save_index(str(part))
        os.chmod(part, 0o600)
        _sync(part)
        size, digest = _digest(part)
        header = orjson.dumps(
            {
                **self._identity,
                "uid": index.uid,
                "epoch": index.epoch,
                "version": index.version,
                "rows": len(labels),
                "count": graph.count,
                "dead": graph.dead,
                "graph_bytes": size,
                "graph_digest": digest.hex(),
            }
        )
        body = b"".join((struct.pack("<I", len(header)), header, labels.tobytes(), expires.tobytes(), alive.tobytes()))
        rows = self.folder / f"{stem}.rows.part"
        rows.write_bytes(MAGIC + hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() + body)
        os.chmod(rows, 0o600)
        _sync(rows)
        os.replace(part, self.folder / f"{stem}.hnsw")
        os.replace(rows, self.folder / f"{stem}.rows")
        _sync(self.folder)
        saved = Name(index.uid, index.epoch, index.version)
        for name in self._names.get(index.uid, set()) - {saved}:
            self._remove(name)
        self._names.setdefault(index.uid, set()).add(saved)
        return True

    def load(self, uid: int, epoch: int, version: int, removed_version: int) -> UserIndex | None:
        """The user's index as it was at some version up to `version`; None where there is no snapshot to be trusted.

        Args:
            removed_version: of the user's newest deletion: an older snapshot holds what was deleted, and is removed.
        """
        for name in sorted(self._names.get(uid, ()), reverse=True):
            if name.epoch == epoch and removed_version <= name.version <= version:
                try:
                    return self._read(name)
                except (OSError, ValueError, RuntimeError, KeyError, TypeError, struct.error):
                    self.refused += 1  # nothing is lost: the log has it
            self._remove(name)
        return None

    def remove(self, uid: int) -> None:
        """Remove every snapshot of a user."""
        for name in list(self._names.get(uid, ())):
            self._remove(name)

    def verify(self, name: Name) -> tuple[dict[str, Any], Any, Any, Any]:
        """Header, labels, expires and alive flags of a snapshot every byte of which is as it was written.

        Raises:
            ValueError: it is not.
            OSError: it cannot be read.
        """
        data = self._path(name, "rows").read_bytes()
        start = len(MAGIC) + _DIGEST_BYTES
        if len(data) < start + 4 or data[: len(MAGIC)] != MAGIC:
            raise ValueError("not a snapshot")
        if hashlib.blake2b(data[start:], digest_size=_DIGEST_BYTES).digest() != data[len(MAGIC) : start]:
            raise ValueError("the rows are damaged")
        (length,) = struct.unpack_from("<I", data, start)
        header = orjson.loads(data[start + 4 : start + 4 + length])
        expected = {**self._identity, **name._asdict()}
        if {key: header.get(key) for key in expected} != expected:
            raise ValueError("a snapshot of something else")
        at, n = start + 4 + length, header["rows"]
        if len(data) != at + 17 * n:
            raise ValueError("the rows are cut short")
        labels = np.frombuffer(data, "<i8", n, at).astype(np.int64)
        expires = np.frombuffer(data, "<i8", n, at + 8 * n).astype(np.int64)
        alive = np.frombuffer(data, np.bool_, n, at + 16 * n).copy()
        size, digest = _digest(self._path(name, "hnsw"))
        if (size, digest.hex()) != (header["graph_bytes"], header["graph_digest"]):
            raise ValueError("the graph is damaged")
        return header, labels, expires, alive

    def _read(self, name: Name) -> UserIndex:
        header, labels, expires, alive = self.verify(name)
        graph = Graph.load(
            str(self._path(name, "hnsw")), self._dim, self._options, count=header["count"], dead=header["dead"]
        )
        index = UserIndex(name.uid, name.epoch, self._dim, self._options)
        index.restore(graph, labels, expires, alive, name.version)
        return index

    def _path(self, name: Name, suffix: str) -> Path:
        return self.folder / f"{name.uid}-{name.epoch}-{name.version}.{suffix}"

    def _remove(self, name: Name) -> None:
        for suffix in ("rows", "hnsw"):  # the one that counts goes first
            self._path(name, suffix).unlink(missing_ok=True)
        self._names[name.uid].discard(name)
        if not self._names[name.uid]:
            del self._names[name.uid]


def _digest(path: Path) -> tuple[int, bytes]:
    with path.open("rb") as file:  # not mapped: reading a file that is being cut short would kill the process
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)).digest()
        return file.tell(), digest


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
