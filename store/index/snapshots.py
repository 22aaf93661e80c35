"""Snapshots of large indexes on local disk, so that a restart does not build graphs again. Any may be lost at any time.

Guarantees: a snapshot exists whole or not at all (written under another name, fsynced, renamed). hnswlib, which a
damaged file can make read out of bounds, is given no byte whose checksum was not verified. A snapshot is loaded only if
the log has its token: any other snapshot was made from another state of the log. If any check fails, the snapshot is
removed, and the index is built from the log.

A snapshot is two files. `UID-EPOCH-VERSION.hnsw` is hnswlib's own. `UID-EPOCH-VERSION.rows` holds the checksum of the
other, and the snapshot exists if this file does:

    magic | blake2b-128 of all that follows | length of the header, 4 bytes | header, JSON | arrays

The arrays are the labels, expiries and alive flags of the rows, the `Arrays` of store.index.body, the places of the
rows, and the `Arrays` of store.index.words if the index has words. The header has their names and lengths, in order.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import uuid
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from store.index import body, tokens, words
from store.index.body import Body
from store.index.graph import Graph, overwrite_deleted
from store.index.user_index import UserIndex
from store.index.words import Words
from store.log.reading import Places
from store.records import IndexOptions

MAGIC = b"memserve snapshot 2\n"
_DIGEST_BYTES = 16
_LOCK = "lock"
_BODY = {
    "labels": "<i8",
    "expires": "<i8",
    "alive": "?",
    "nodes": "<i4",
    "keys": "<i8",
    "key_nodes": "<i4",
    "crowd": "<f4",
}
_WORDS = {
    "word_lengths": "<i4",
    "words": "<i8",
    "word_starts": "<i4",
    "word_rows": "<i4",
    "word_counts": "|u1",
}
_PLACES = {"created": "<i8", "happened": "<i8", "threads": "<i8"}
_TYPES = _BODY | _WORDS | _PLACES  # of the arrays after the header, by their names


class Name(NamedTuple):
    """The parts of a snapshot's file name. They serve to find it; only the header is trusted."""

    uid: int
    epoch: int
    version: int


class Pending(NamedTuple):
    """A snapshot that is being written. `arrays` follow its header."""

    name: Name
    header: dict[str, Any]
    arrays: bytes

    @property
    def token(self) -> str:
        """The token that the log must have before the snapshot may be loaded."""
        return str(self.header["token"])


class Snapshots:
    """The snapshots of one store, in a folder that stores of the same log may share.

    Each store claims a numbered folder in it, with a lock that ends with its process. A store that starts again finds
    the snapshots that an earlier process left in the folder.
    """

    def __init__(self, shared: Path, *, log_id: str, model: str, dim: int, options: IndexOptions) -> None:
        self._shared = shared
        shared.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock, folder = next(claim for claim in (_claim(shared / str(n)) for n in count()) if claim is not None)
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
        self._names: dict[int, set[Name]] = {}
        self._wordless: set[int] = set()  # uids whose snapshot is known to have no words that can be used
        for name in _names_in(folder):
            self._names.setdefault(name.uid, set()).add(name)
        _remove_parts(folder, self.names())

    def names(self) -> list[Name]:
        """Every snapshot in this store's folder."""
        return [name for names in self._names.values() for name in names]

    def lacks_words(self, index: UserIndex) -> bool:
        """Whether the index has words that the user's snapshot does not have."""
        return index.words is not None and index.uid in self._wordless

    def begin(self, index: UserIndex) -> Pending | None:
        """Write the graph of an index. None if the index cannot have a snapshot now, or has it already."""
        state = index.snapshot()
        name = Name(index.uid, index.epoch, index.version)
        if state is None or (name in self._names.get(index.uid, ()) and not self.lacks_words(index)):
            return None
        saved, *of_rows = state
        arrays = dict(zip(_BODY, [*of_rows, *saved.arrays()], strict=True))
        arrays |= dict(zip(_PLACES, index.timeline.places_of(index.usable(None)), strict=True))
        if index.words is not None:
            arrays |= dict(zip(_WORDS, index.words.arrays(index.usable(None)), strict=True))
        saved.graph.save(self._path(name, "hnsw.part"))
        header = {**self._identity, **name._asdict(), "count": saved.graph.count, "dead": saved.graph.dead}
        header |= {"lengths": _names_and_lengths(arrays), "tokens": tokens.VERSION, "token": uuid.uuid4().hex}
        return Pending(name, header, b"".join(array.tobytes() for array in arrays.values()))

    def finish(self, pending: Pending) -> None:
        """Write the rest and wait for the disk. This part does not use the index, and may run in another thread."""
        part = self._path(pending.name, "hnsw.part")
        os.chmod(part, 0o600)
        if pending.header["dead"]:
            overwrite_deleted(part, count=pending.header["count"], dim=self._dim, m=self._options.m)
        _sync(part)
        size, digest = _digest(part)
        header = orjson.dumps({**pending.header, "graph_bytes": size, "graph_digest": digest.hex()})
        content = struct.pack("<I", len(header)) + header + pending.arrays
        rows = self._path(pending.name, "rows.part")
        rows.write_bytes(MAGIC + hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest() + content)
        os.chmod(rows, 0o600)
        _sync(rows)

    def commit(self, pending: Pending) -> None:
        """Give a finished snapshot, whose token the log has, its final name, and remove the user's older ones."""
        name = pending.name
        for suffix in ("hnsw", "rows"):  # the snapshot exists once its .rows does
            os.replace(self._path(name, f"{suffix}.part"), self._path(name, suffix))
        _sync(self.folder)
        for older in self._names.get(name.uid, set()) - {name}:
            self._remove(older)
        self._names.setdefault(name.uid, set()).add(name)
        self._note_words(name.uid, "words" in pending.header["lengths"])

    def discard(self, pending: Pending) -> None:
        """Remove the files of `begin` and `finish` that were not committed."""
        for suffix in ("hnsw", "rows"):
            self._path(pending.name, f"{suffix}.part").unlink(missing_ok=True)

    def load(
        self, uid: int, epoch: int, version: int, removed_version: int, vouches: Callable[[str], bool]
    ) -> UserIndex | None:
        """The user's index at some version up to `version`. None if there is no snapshot that can be trusted.

        Args:
            removed_version: the version of the user's newest deletion. An older snapshot holds deleted vectors, and is
                removed.
            vouches: whether the log has a snapshot's token for this user.
        """
        for name in sorted(self._names.get(uid, ()), reverse=True):
            if name.epoch == epoch and removed_version <= name.version <= version:
                try:
                    return self._read(name, vouches)
                except (OSError, ValueError, RuntimeError, KeyError, TypeError, struct.error):
                    self.refused += 1  # nothing is lost: the index is built from the log
            self._remove(name)
        return None

    def remove(self, uid: int) -> None:
        """Remove every snapshot of a user."""
        for name in list(self._names.get(uid, ())):
            self._remove(name)

    def abandoned(self) -> list[tuple[Path, Name]]:
        """The snapshots in folders that no store claims any more, with their folders.

        Files that such a store was writing or removing when it ended are removed.
        """
        found = []
        for folder in self._shared.iterdir() if self._shared.exists() else ():
            if folder != self.folder and folder.name.isdigit() and (claim := _claim(folder)) is not None:
                try:
                    names = _names_in(folder)
                    _remove_parts(folder, names)
                finally:
                    os.close(claim[0])
                found += [(folder, name) for name in names]
        return found

    @staticmethod
    def remove_abandoned(folder: Path, name: Name) -> None:
        """Remove one of `abandoned`, unless a store has claimed its folder again. Then it is that store's to remove."""
        claim = _claim(folder)
        if claim is not None:
            for suffix in ("rows", "hnsw"):
                (folder / f"{name.uid}-{name.epoch}-{name.version}.{suffix}").unlink(missing_ok=True)
            os.close(claim[0])

    def close(self) -> None:
        """Release the folder."""
        os.close(self._lock)

    def verify(self, name: Name) -> tuple[dict[str, Any], dict[str, Any]]:
        """Check every byte of a snapshot. Returns its header and its arrays by their names.

        Raises:
            ValueError: the snapshot is not as it was written.
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
        at = start + 4 + length
        arrays: dict[str, Any] = {}
        for array, length in _lengths(header).items():
            arrays[array] = np.frombuffer(data, _TYPES[array], length, at).copy()
            at += arrays[array].nbytes
        if len(data) != at:
            raise ValueError("the rows have another length")
        size, digest = _digest(self._path(name, "hnsw"))
        if (size, digest.hex()) != (header["graph_bytes"], header["graph_digest"]):
            raise ValueError("the graph is damaged")
        return header, arrays

    def _read(self, name: Name, vouches: Callable[[str], bool]) -> UserIndex:
        header, arrays = self.verify(name)
        if not vouches(header["token"]):
            raise ValueError("a snapshot of another state of the log")
        graph = Graph.load(
            self._path(name, "hnsw"), self._dim, self._options, count=header["count"], dead=header["dead"]
        )
        labels, expires, alive, *of_body = (arrays[key] for key in _BODY)
        index = UserIndex(name.uid, name.epoch, self._dim, self._options)
        index.restore(Body.restore(graph, body.Arrays(*of_body), alive), labels, expires, alive, name.version)
        if "created" in arrays:
            index.place(None, Places(*(arrays[key] for key in _PLACES)))
        has_words = "words" in arrays and header["tokens"] == tokens.VERSION
        if has_words:
            of_words = words.Arrays(*(arrays[key] for key in _WORDS))
            index.words = Words.restore(of_words, alive, self._options.k1, self._options.b)
        self._note_words(name.uid, has_words)
        return index

    def _note_words(self, uid: int, has_words: bool) -> None:
        if has_words:
            self._wordless.discard(uid)
        else:
            self._wordless.add(uid)

    def _path(self, name: Name, suffix: str) -> Path:
        return self.folder / f"{name.uid}-{name.epoch}-{name.version}.{suffix}"

    def _remove(self, name: Name) -> None:
        for suffix in ("rows", "hnsw"):  # without its .rows the snapshot no longer exists
            self._path(name, suffix).unlink(missing_ok=True)
        self._names[name.uid].discard(name)
        if not self._names[name.uid]:
            del self._names[name.uid]
            self._wordless.discard(name.uid)


def _names_and_lengths(arrays: dict[str, Any]) -> dict[str, int]:
    return {name: len(array) for name, array in arrays.items()}


def _lengths(header: dict[str, Any]) -> dict[str, int]:
    """The lengths of a snapshot's arrays by their names, in order. Before there were words, a list had no names."""
    lengths = header["lengths"]
    return lengths if isinstance(lengths, dict) else dict(zip(_BODY, lengths, strict=True))


def _claim(folder: Path) -> tuple[int, Path] | None:
    """The folder's lock as an open file, and the folder; None if another store has the lock."""
    folder.mkdir(exist_ok=True, mode=0o700)
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor, folder


def _names_in(folder: Path) -> list[Name]:
    parts = [path.stem.split("-") for path in folder.glob("*.rows")]
    return [Name(*map(int, part)) for part in parts if len(part) == 3 and all(number.isdigit() for number in part)]


def _remove_parts(folder: Path, names: Iterable[Name]) -> None:
    """Remove the files of a claimed folder that belong to none of its snapshots. A store died while it wrote them."""
    known = {f"{name.uid}-{name.epoch}-{name.version}" for name in names}
    for path in folder.iterdir():
        if path.name != _LOCK and (path.suffix not in (".rows", ".hnsw") or path.stem not in known):
            path.unlink(missing_ok=True)


def _digest(path: Path) -> tuple[int, bytes]:
    """Size and blake2b-128 of a file."""
    with path.open("rb") as file:  # not mapped, since reading a mapped file that is being truncated kills the process
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)).digest()
        return file.tell(), digest


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
