"""Bodies of requests and answers in OpenAI's shape, read and written with as little work as possible."""

import base64
from collections.abc import Iterable

import numpy as np
import orjson


def inputs(body: bytes) -> list[str]:
    """The texts of a request."""
    given = orjson.loads(body)["input"]
    return [given] if isinstance(given, str) else given


def answer(vectors: Iterable[np.ndarray]) -> bytes:
    """The body with `vectors`, in base64 of little-endian float32."""
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
