"""What a participant may do: random requests to each route, and random calls of each handle method.

All participants use the same few ids of users and memories, the same texts and the same idempotency keys, so that they
would meet if anything were shared.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

from tests.isolation.sides import Cursor, Generated

USERS = ("ann", "bob", "eve")
IDS = ("m0", "m1", "m2", "m3")
TEXTS = ("tea in the morning", "a walk in the rain", "Chopin on Sundays", "coffee after lunch", "tea and rain")
TAGS = ("red", "blue")
FAR = "2099-01-01T00:00:00Z"

Options = dict[str, Any]
Play = tuple[list[Any], Options]  # the parts of the path, and httpx's arguments
Call = tuple[list[Any], Options]  # the arguments


def user(rng: random.Random) -> str:
    return rng.choice(USERS)


def memory_id(rng: random.Random) -> Any:
    return rng.choice([*IDS, *IDS, Generated(rng.randrange(100))])


def new(rng: random.Random, *, with_user: bool = False) -> Options:
    found: Options = {"text": rng.choice(TEXTS), "metadata": {"tag": rng.choice(TAGS), "n": rng.randrange(3)}}
    if rng.random() < 0.6:
        found["id"] = rng.choice(IDS)
    if rng.random() < 0.1:
        found["expires_at"] = FAR
    if rng.random() < 0.2:
        found["thread"] = rng.choice(TAGS)
    return {"user_id": user(rng), **found} if with_user else found


def filter_of(rng: random.Random) -> Options:
    return rng.choice([{"tag": rng.choice(TAGS)}, {"n": {"gte": rng.randrange(3)}}, {"tag": "none"}])


def search_of(rng: random.Random) -> Options:
    found: Options = {"query": rng.choice(TEXTS), "top_k": rng.choice([1, 5, 20])}
    if rng.random() < 0.3:
        found["filter"] = filter_of(rng)
    if rng.random() < 0.3:
        found["mode"] = rng.choice(["hybrid", "vector", "words"])
    if rng.random() < 0.2:
        found["include_vectors"] = True
    if rng.random() < 0.3:
        found |= {"context": rng.randrange(3), "order": rng.choice(["score", "-created_at"])}
    if rng.random() < 0.2:
        found |= {"max_tokens": 9, "until": FAR}
    return found


def changes(rng: random.Random) -> Options:
    return rng.choice(
        [
            {"text": rng.choice(TEXTS)},
            {"metadata": {"tag": rng.choice(TAGS)}},
            {"metadata_merge": {"n": rng.randrange(3)}},
            {"text": rng.choice(TEXTS), "if_version": rng.randrange(1, 9)},
            {"expires_at": FAR},
            {"thread": rng.choice(TAGS), "happened_at": FAR},
        ]
    )


def lines_of(rng: random.Random) -> list[Options]:
    return [{"id": rng.choice(IDS), "text": rng.choice(TEXTS)} for _ in range(rng.randrange(1, 4))]


def retried(rng: random.Random) -> Options:
    """Headers of a write: sometimes with an idempotency key that others use, too."""
    return {"headers": {"idempotency-key": f"key-{rng.randrange(4)}"}} if rng.random() < 0.2 else {}


def page(rng: random.Random, route: str, name: str = "cursor") -> Options:
    params: Options = {"limit": rng.choice([1, 2, 100])}
    if rng.random() < 0.4:
        params[name] = Cursor(route)
    return params


def of_user(*rest: str) -> Callable[[random.Random], list[Any]]:
    return lambda rng: ["/v1/users", user(rng), *rest]


def _body(path: list[Any], make: Callable[[random.Random], Any]) -> Callable[[random.Random], Play]:
    return lambda rng: (path, {"json": make(rng)})


def _plain(*path: str) -> Callable[[random.Random], Play]:
    return lambda rng: (list(path), {})


def _of_memory(rng: random.Random, *rest: str) -> list[Any]:
    return ["/v1/users", user(rng), "memories", memory_id(rng), *rest]


def _import(rng: random.Random) -> Play:
    lines = "\n".join(f'{{"id": "{line["id"]}", "text": "{line["text"]}"}}' for line in lines_of(rng))
    return ["/v1/users", user(rng), "import"], {"content": lines}


def _add(rng: random.Random) -> Play:
    body: Options = {"memories": [new(rng) for _ in range(rng.randrange(1, 4))]}
    body |= rng.choice([{}, {"upsert": True}, {"on_duplicate": "skip"}])
    return ["/v1/users", user(rng), "memories"], {"json": body, **retried(rng)}


def _add_many(rng: random.Random) -> Play:
    body = {"memories": [new(rng, with_user=True) for _ in range(rng.randrange(1, 4))]}
    return ["/v1/memories"], {"json": body, **retried(rng)}


def _delete_some(rng: random.Random) -> Play:
    body = rng.choice([{"filter": filter_of(rng)}, {"ids": [memory_id(rng), memory_id(rng)]}])
    return ["/v1/users", user(rng), "memories"], {"json": body, **retried(rng)}


_KEY: Callable[[random.Random], Options] = lambda rng: {  # noqa: E731 - one of several like it
    "scopes": rng.choice([["read"], ["read", "write"]]),
    "user_id": rng.choice([None, user(rng)]),
    "label": rng.choice(TAGS),
}

ROUTES: Mapping[tuple[str, str], Callable[[random.Random], Play]] = {
    ("POST", "/v1/embeddings"): _body(["/v1/embeddings"], lambda rng: {"input": [rng.choice(TEXTS)]}),
    ("GET", "/v1/models"): _plain("/v1/models"),
    ("GET", "/v1/models/{model_id:path}"): _plain("/v1/models", "fake"),
    ("POST", "/v1/rerank"): _body(["/v1/rerank"], lambda rng: {"query": rng.choice(TEXTS), "documents": [*TEXTS]}),
    ("POST", "/v2/rerank"): _body(["/v2/rerank"], lambda rng: {"query": rng.choice(TEXTS), "documents": [*TEXTS]}),
    ("POST", "/rerank"): _body(["/rerank"], lambda rng: {"query": rng.choice(TEXTS), "texts": [*TEXTS]}),
    ("POST", "/embed"): _body(["/embed"], lambda rng: {"inputs": rng.choice(TEXTS)}),
    ("POST", "/"): _body(["/"], lambda rng: {"inputs": rng.choice(TEXTS)}),
    ("POST", "/similarity"): _body(
        ["/similarity"], lambda rng: {"inputs": {"source_sentence": rng.choice(TEXTS), "sentences": [*TEXTS]}}
    ),
    ("POST", "/tokenize"): _body(["/tokenize"], lambda rng: {"inputs": rng.choice(TEXTS)}),
    ("POST", "/decode"): _body(["/decode"], lambda rng: {"ids": [rng.randrange(1, 9)]}),
    ("GET", "/info"): _plain("/info"),
    ("GET", "/ping"): _plain("/ping"),
    ("GET", "/health"): _plain("/health"),
    ("GET", "/health/live"): _plain("/health/live"),
    ("GET", "/health/ready"): _plain("/health/ready"),
    ("GET", "/metrics"): _plain("/metrics"),
    ("POST", "/v1/memories"): _add_many,
    ("POST", "/v1/users/{user_id}/memories"): _add,
    ("POST", "/v1/users/{user_id}/memories/search"): lambda rng: (
        ["/v1/users", user(rng), "memories/search"],
        {"json": search_of(rng)},
    ),
    ("POST", "/v1/users/{user_id}/memories/get"): lambda rng: (
        ["/v1/users", user(rng), "memories/get"],
        {"json": {"ids": [memory_id(rng), memory_id(rng)]}},
    ),
    ("POST", "/v1/users/{user_id}/memories/duplicates"): lambda rng: (
        ["/v1/users", user(rng), "memories/duplicates"],
        {"json": {"score": rng.choice([0.5, 0.99])}},
    ),
    ("GET", "/v1/users/{user_id}/memories"): lambda rng: (
        ["/v1/users", user(rng), "memories"],
        {"params": page(rng, "GET /v1/users/{user_id}/memories")},
    ),
    ("DELETE", "/v1/users/{user_id}/memories"): _delete_some,
    ("GET", "/v1/users/{user_id}/memories/{memory_id}"): lambda rng: (_of_memory(rng), {}),
    ("PATCH", "/v1/users/{user_id}/memories/{memory_id}"): lambda rng: (
        _of_memory(rng),
        {"json": changes(rng), **retried(rng)},
    ),
    ("DELETE", "/v1/users/{user_id}/memories/{memory_id}"): lambda rng: (_of_memory(rng), retried(rng)),
    ("GET", "/v1/users/{user_id}/memories/{memory_id}/history"): lambda rng: (_of_memory(rng, "history"), {}),
    ("GET", "/v1/users"): lambda rng: (["/v1/users"], {"params": page(rng, "GET /v1/users")}),
    ("GET", "/v1/users/{user_id}"): lambda rng: (["/v1/users", user(rng)], {}),
    ("DELETE", "/v1/users/{user_id}"): lambda rng: (["/v1/users", user(rng)], retried(rng)),
    ("GET", "/v1/users/{user_id}/export"): lambda rng: (["/v1/users", user(rng), "export"], {}),
    ("POST", "/v1/users/{user_id}/import"): _import,
    ("POST", "/v1/keys"): lambda rng: (["/v1/keys"], {"json": _KEY(rng)}),
    ("GET", "/v1/keys"): lambda rng: (["/v1/keys"], {"params": page(rng, "GET /v1/keys")}),
    ("GET", "/v1/keys/self"): _plain("/v1/keys/self"),
    ("DELETE", "/v1/keys/{key_id}"): lambda rng: (["/v1/keys", Generated(rng.randrange(1, 100))], {}),
    ("GET", "/v1/events"): lambda rng: (["/v1/events"], {"params": page(rng, "GET /v1/events", "after")}),
}
"""By method and path, as the application declares them."""

SELDOM = frozenset({("DELETE", "/v1/users/{user_id}"), ("POST", "/v1/keys"), ("DELETE", "/v1/keys/{key_id}")})
"""Routes that would leave little for the others to see if they were used as often."""

METHODS: Mapping[str, Callable[[random.Random], Call]] = {
    "embed": lambda rng: ([[rng.choice(TEXTS)]], {}),
    "rerank": lambda rng: ([rng.choice(TEXTS), [*TEXTS]], {}),
    "add": lambda rng: ([user(rng), [new(rng)]], {}),
    "add_many": lambda rng: ([[new(rng, with_user=True)]], {}),
    "search": lambda rng: ([user(rng)], search_of(rng)),
    "get": lambda rng: ([user(rng), memory_id(rng)], {}),
    "get_many": lambda rng: ([user(rng), [memory_id(rng), memory_id(rng)]], {}),
    "duplicates": lambda rng: ([user(rng)], {"score": rng.choice([0.5, 0.99])}),
    "list": lambda rng: ([user(rng)], page(rng, "list")),
    "update": lambda rng: ([user(rng), memory_id(rng)], changes(rng)),
    "delete": lambda rng: ([user(rng), memory_id(rng)], {}),
    "delete_where": lambda rng: ([user(rng), filter_of(rng)], {}),
    "delete_many": lambda rng: ([user(rng), [memory_id(rng)]], {}),
    "history": lambda rng: ([user(rng), memory_id(rng)], {}),
    "user": lambda rng: ([user(rng)], {}),
    "users": lambda rng: ([], page(rng, "users")),
    "delete_user": lambda rng: ([user(rng)], {}),
    "export": lambda rng: ([user(rng)], {}),
    "import_lines": lambda rng: ([user(rng), lines_of(rng)], {}),
    "events": lambda rng: ([], page(rng, "events", "after")),
    "create_key": lambda rng: ([], _KEY(rng)),
    "keys": lambda rng: ([], page(rng, "keys")),
    "revoke_key": lambda rng: ([Generated(rng.randrange(1, 100))], {}),
}
"""The methods of the handle API that take a tenant."""
