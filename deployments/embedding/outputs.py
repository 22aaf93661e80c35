"""The answer to an embedding request, and its output formats: fewer dimensions, smaller types, base64.

The functions are pure: they never write to the given vectors, which may be in the cache.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

OutputDtype = Literal["float", "int8", "uint8", "binary", "ubinary"]


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a request went, in seconds. Each value is the largest of its texts.

    Attributes:
        queue_s: from the end of tokenizing to the start of the forward.
        tokenize_s: from arrival to the end of tokenizing.
        forward_s: the duration of the forward that computed the text.
    """

    queue_s: float
    tokenize_s: float
    forward_s: float


@dataclass(frozen=True, slots=True, eq=False)
class EmbedResult:
    """The answer to one request.

    Attributes:
        vectors: (n, dim) float32, C-contiguous, in the order of the inputs.
        tokens: (n,) int32, the tokens that the model read: with special tokens, without padding.
        truncated: (n,) bool, whether the input was cut.
        timings: where the time went.
    """

    vectors: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    timings: Timings


class Answers(list[EmbedResult | Exception]):
    """The answers to the requests of one call, in order. All of them are pickled as one matrix and come back as a list.

    The vectors of an answer are then a part of that matrix, which stays in memory as long as any of them.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        done = [answer for answer in self if isinstance(answer, EmbedResult)]
        sizes = [len(answer.tokens) if isinstance(answer, EmbedResult) else answer for answer in self]
        names = ("vectors", "tokens", "truncated") if done else ()
        arrays = [np.concatenate([getattr(answer, name) for answer in done]) for name in names]
        times = [(answer.timings.queue_s, answer.timings.tokenize_s, answer.timings.forward_s) for answer in done]
        return _answers, (sizes, arrays, times)


def _answers(
    sizes: Sequence[int | Exception], arrays: Sequence[np.ndarray], times: Sequence[tuple[float, float, float]]
) -> list[EmbedResult | Exception]:
    """The answers that `Answers` pickled: for each request the number of its inputs, or its error."""
    answers: list[EmbedResult | Exception] = []
    timings = iter(times)
    start = 0
    for size in sizes:
        if isinstance(size, Exception):
            answers.append(size)
            continue
        end = start + size
        vectors, tokens, truncated = (array[start:end] for array in arrays)
        answers.append(EmbedResult(vectors, tokens, truncated, Timings(*next(timings))))
        start = end
    return answers


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """The scores of texts for a query.

    Attributes:
        scores: (n,) float32, in the order of the texts; higher is better.
        logits: (n,) float32, what the scores were before the model's activation.
        tokens: (n,) int32, the tokens of each pair of query and text that the model read.
        truncated: (n,) bool, whether the pair was cut.
        timings: where the time went.
    """

    scores: np.ndarray
    logits: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    timings: Timings

    def order(self) -> list[int]:
        """The positions of the texts, best first. Equal scores are sorted by their logits, then by position."""
        order: list[int] = np.lexsort((-self.logits, -self.scores)).tolist()
        return order


def cut(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """Keep the first dimensions and scale to length one again (Matryoshka representation learning, arXiv:2205.13147).

    Args:
        vectors: (n, dim) float32.
        dimensions: at most dim; None or dim returns the vectors unchanged.

    Returns:
        (n, dimensions) float32. A row whose kept part is zero stays zero.
    """
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    return np.ascontiguousarray(at_length_one(vectors[:, :dimensions]), dtype=np.float32)


def at_length_one(vectors: np.ndarray) -> np.ndarray:
    """Scale the rows of (n, dim) to length one. A row that is zero stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def quantise(vectors: np.ndarray, output_dtype: OutputDtype) -> np.ndarray:
    """Quantise vectors.

    Args:
        vectors: (n, dim) float32.
        output_dtype:
            `float` returns the vectors unchanged.
            `int8` and `uint8` scale them to length one and store one byte per value, over the range [-1, 1]. The range
            is not calibrated, so that a vector does not depend on its neighbours.
            `binary` and `ubinary` store one bit per value, 1 if it is positive, eight to a byte, most significant bit
            first, as sentence-transformers packs them.

    Returns:
        (n, dim) float32, int8 or uint8; (n, ceil(dim / 8)) int8 or uint8 for the binary types.
    """
    if output_dtype == "float":
        return vectors
    if output_dtype in ("int8", "uint8"):
        steps = np.rint(at_length_one(vectors) * 127)  # (n, dim) -127 to 127
        return steps.astype(np.int8) if output_dtype == "int8" else (steps + 128).astype(np.uint8)
    packed = np.packbits(vectors > 0, axis=1)
    return packed if output_dtype == "ubinary" else (packed ^ 0x80).view(np.int8)


def to_base64(vectors: np.ndarray) -> list[str]:
    """Encode the little-endian bytes of each row in base64, as OpenAI does for `encoding_format: base64`."""
    little = vectors.astype(vectors.dtype.newbyteorder("<"), copy=False)
    return [base64.b64encode(row.tobytes()).decode("ascii") for row in little]
