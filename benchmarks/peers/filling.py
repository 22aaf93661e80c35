"""Makes the corpus through memserve, and fills the servers that search it over HTTP."""

import base64
import random
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import httpx
import numpy as np
import orjson

from benchmarks.peers.corpus import LARGE, QUERIES, Corpus, collections
from benchmarks.peers.searches import CHROMA
from benchmarks.workload import texts

SEED = 7
LINES_A_BODY = 1_000
INDEXED_WITHIN_S = 120.0


def batched(items: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """Lists of `count` items. From Python 3.12 on, itertools has this function."""
    left = iter(items)
    while some := list(islice(left, count)):
        yield some


def make_corpus(url: str) -> Corpus:
    """A corpus of short texts, embedded by the memserve at `url`."""
    given = list(islice(texts("short", random.Random(SEED)), LARGE + QUERIES))

    def embed(part: list[str]) -> list[np.ndarray]:
        body = {"input": part, "encoding_format": "base64"}
        answer = httpx.post(f"{url}/v1/embeddings", json=body, timeout=120, trust_env=False).raise_for_status().json()
        return [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer["data"]]

    with ThreadPoolExecutor(4) as pool:
        vectors = np.stack([row for rows in pool.map(embed, batched(given, 256)) for row in rows])
    return Corpus(given[:LARGE], vectors[:LARGE], vectors[LARGE:])


def fill_memserve(url: str, corpus: Corpus) -> None:
    """Import every user, and wait until the graph of the large user is built."""
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as client:
        for user, part in collections(corpus).items():
            lines = zip(part.ids(user), part.texts, part.vectors.tolist(), strict=True)
            for some in batched(lines, LINES_A_BODY):
                body = b"\n".join(orjson.dumps({"id": i, "text": text, "vector": row}) for i, text, row in some)
                client.post(f"/v1/users/{user}/import", content=body).raise_for_status()
        search = {"vector": corpus.queries[0].tolist(), "top_k": 1}
        deadline = time.monotonic() + INDEXED_WITHIN_S
        while time.monotonic() < deadline:
            found = client.post("/v1/users/large-0/memories/search", json=search).raise_for_status().json()
            if found["index"] == "hnsw":
                return
            time.sleep(0.5)


def fill_chroma(url: str, corpus: Corpus) -> dict[str, str]:
    """Make a collection for each user, with the cosine distance of the others. Returns Chroma's ids, by user."""
    ids = {}
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as client:
        for user, part in collections(corpus).items():
            body = {"name": user, "configuration": {"hnsw": {"space": "cosine"}}}
            ids[user] = client.post(CHROMA, json=body).raise_for_status().json()["id"]
            rows = zip(part.ids(user), part.texts, part.vectors.tolist(), strict=True)
            for some in batched(rows, LINES_A_BODY):
                keys, documents, embeddings = zip(*some, strict=True)
                content = orjson.dumps({"ids": keys, "documents": documents, "embeddings": embeddings})
                client.post(f"{CHROMA}/{ids[user]}/upsert", content=content).raise_for_status()
    return ids
