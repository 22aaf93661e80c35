"""The corpus that is searched: texts with their vectors, and query vectors. Written once in a run, read by every peer.

Ten users have 1,000 memories each (`user-0` to `user-9`), one has 20,000 (`large-0`).
"""

import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

USERS = 10
MEMORIES_A_USER = 1_000
LARGE = 20_000
QUERIES = 1_000


@dataclass(frozen=True)
class Corpus:
    """`texts` n, `vectors` (n, dim) float32, `queries` (m, dim) float32; L2-normalised."""

    texts: list[str]
    vectors: np.ndarray
    queries: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> "Corpus":
        texts = orjson.loads((folder / "texts.json").read_bytes())
        return cls(texts, np.load(folder / "vectors.npy"), np.load(folder / "queries.npy"))

    def write(self, folder: Path) -> None:
        (folder / "texts.json").write_bytes(orjson.dumps(self.texts))
        np.save(folder / "vectors.npy", self.vectors)
        np.save(folder / "queries.npy", self.queries)

    def part(self, begin: int, end: int) -> "Corpus":
        return Corpus(self.texts[begin:end], self.vectors[begin:end], self.queries)

    def ids(self, owner: str) -> list[str]:
        """A UUID for each text, the same one in every run."""
        return [str(uuid.uuid5(uuid.NAMESPACE_OID, f"{owner} {n}")) for n in range(len(self.texts))]


def collections(corpus: Corpus, large: bool = True) -> dict[str, Corpus]:
    """The memories of each user, by user."""
    parts = {f"user-{n}": corpus.part(n * MEMORIES_A_USER, (n + 1) * MEMORIES_A_USER) for n in range(USERS)}
    return {**parts, "large-0": corpus.part(0, LARGE)} if large else parts
