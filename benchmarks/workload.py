"""Seeded texts, and the requests that carry them.

The same seed makes the same requests. No two texts are equal unless `distinct` is given, so that the cache does not
answer a request by accident.
"""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import orjson

WORDS = (Path(__file__).resolve().parent.parent / "tests" / "embedding" / "words.txt").read_text().split()
JOBS = ("embed", "add", "search", "mixed")
# An agent searches more often than it adds, and embeds now and then.
MIXED = {"search": 0.5, "add": 0.3, "embed": 0.2}
USERS = 1000


def seed_of(*parts: object) -> int:
    """A separate seed for each measurement: texts that come twice would be answered from the cache."""
    return random.Random(repr(parts)).getrandbits(48)


class Request(NamedTuple):
    """One POST request, and the number of texts in it."""

    path: str
    body: bytes
    texts: int


def words_in_a_text(length: str, rng: random.Random) -> int:
    """`short`: 4 to 12 words; `medium`: 24 to 40; `mixed`: log-normal, 4 to 200, median 30; or a number of words."""
    match length:
        case "short":
            return rng.randint(4, 12)
        case "medium":
            return rng.randint(24, 40)
        case "mixed":
            return round(min(200, max(4, rng.lognormvariate(3.4, 0.9))))
    return int(length)


def texts(length: str, rng: random.Random, distinct: int | None = None) -> Iterator[str]:
    """Endless texts, no two of them equal; or, if `distinct` is given, drawn repeatedly from so many texts."""

    def unlike() -> Iterator[str]:
        while True:
            words = rng.choices(WORDS, k=words_in_a_text(length, rng) - 1)
            yield " ".join([*words, str(rng.randrange(10**6))])

    if distinct is None:
        yield from unlike()
    pool = list(islice(unlike(), distinct))
    while True:
        yield rng.choice(pool)


def request_maker(
    job: str, size: int, length: str, rng: random.Random, *, users: int = USERS, distinct: int | None = None
) -> Callable[[], Request]:
    """Returns a function that makes the next request. A search always has one query, whatever the size."""
    source = texts(length, rng, distinct)

    def embed() -> Request:
        given = list(islice(source, size)) if size > 1 else next(source)
        return Request("/v1/embeddings", orjson.dumps({"input": given, "encoding_format": "base64"}), size)

    def add() -> Request:
        path = f"/v1/users/user-{rng.randrange(users)}/memories"
        memories = [{"text": text} for text in islice(source, size)]
        return Request(path, orjson.dumps(memories[0] if size == 1 else {"memories": memories}), size)

    def search() -> Request:
        path = f"/v1/users/user-{rng.randrange(users)}/memories/search"
        return Request(path, orjson.dumps({"query": next(source)}), 1)

    jobs = {"embed": embed, "add": add, "search": search}

    def mixed() -> Request:
        (chosen,) = rng.choices(list(MIXED), weights=list(MIXED.values()))
        return jobs[chosen]()

    return mixed if job == "mixed" else jobs[job]


def filling(memories_a_user: int, rng: random.Random, *, users: int = USERS, batch: int = 100) -> Iterator[Request]:
    """Requests that give each user some memories to search before a measurement begins."""
    source = texts("short", rng)
    memories = [{"user_id": f"user-{n}", "text": next(source)} for n in range(users) for _ in range(memories_a_user)]
    for first in range(0, len(memories), batch):
        part = memories[first : first + batch]
        yield Request("/v1/memories", orjson.dumps({"memories": part}), len(part))
