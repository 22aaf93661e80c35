"""What travels between the load generator and a peer: OpenAI's shape, as little work as it can be."""

import base64
from collections.abc import Iterable

import numpy as np
import orjson


def inputs(body: bytes) -> list[str]:
    """The texts of a request."""
    given = orjson.loads(body)["input"]
    return [given] if isinstance(given, str) else given


def answer(vectors: Iterable[np.ndarray]) -> bytes:
    """The body that carries `vectors`, base64 of little-endian float32."""
    return orjson.dumps(
        {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": n,
                    "embedding": base64.b64encode(np.ascontiguousarray(vector, "<f4").data).decode(),
                }
                for n, vector in enumerate(vectors)
            ],
        }
    )
