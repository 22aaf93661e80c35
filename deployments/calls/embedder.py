"""The gateway's calls to the embedder: coalesced, with the vectors of texts seen before in front of them.

Hundreds of small HTTP requests become a few handle calls: while a call is on its way, everything that arrives waits,
and rides the next one.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypedDict, TypeVar, cast

import numpy as np
from ray.serve.handle import DeploymentHandle

from deployments.batcher import Batcher
from deployments.calls.resilient import LoneCalls, quick, resilient
from deployments.embedding.cache import CachedVector, VectorCache, cache_key
from deployments.embedding.engine import EmbedRequest
from deployments.embedding.model import InputType, ModelInfo, TextToken, Truncate
from deployments.embedding.outputs import EmbedResult, Timings
from deployments.embedding.packing import runs
from deployments.errors import EmbeddingFailed, InvalidRequest, MemserveError, ShuttingDown

Answer = TypeVar("Answer")
Inputs = list[str] | list[list[int]]

CHARACTERS_PER_TOKEN = 4  # English text; what waits is admitted by this estimate, the embedder counts exactly


def estimated_tokens(given: object) -> int:
    """Tokens of one input before anything is tokenized: token ids exactly, a text by its length."""
    if isinstance(given, str):
        return len(given) // CHARACTERS_PER_TOKEN + 2
    return len(cast(list[int], given))


def _request_tokens(request: EmbedRequest) -> int:
    return sum(map(estimated_tokens, request.inputs))


class EmbedderCalls:
    """Coalesced calls to the embedder, with the vectors of texts seen before in front of them.

    Args:
        handle: the Embedder deployment.
        in_flight: calls at once; as many more while a good part of a call waits.
        call_tokens: estimated tokens in one call.
        max_queued_tokens: estimated tokens that may wait; past it `Overloaded`.
        cache_bytes: bytes of vectors to keep; 0 asks for every text anew.
    """

    def __init__(
        self, handle: DeploymentHandle, *, in_flight: int, call_tokens: int, max_queued_tokens: int, cache_bytes: int
    ) -> None:
        self._handle = quick(handle)
        self._call_tokens = call_tokens
        self._lone_calls = LoneCalls("embedder")
        self._info: ModelInfo | None = None
        self.cache = VectorCache(cache_bytes)
        self.batcher: Batcher[EmbedRequest, EmbedResult] = Batcher(
            self._call, cost=_request_tokens, **_limits(in_flight, call_tokens, max_queued_tokens)
        )

    def reconfigure(self, *, in_flight: int, call_tokens: int, max_queued_tokens: int, cache_bytes: int) -> None:
        """Change what the constructor was given, while calls wait and travel."""
        self._call_tokens = call_tokens
        self.batcher.reconfigure(**_limits(in_flight, call_tokens, max_queued_tokens))
        self.cache.resize(cache_bytes)

    async def _call(self, requests: list[EmbedRequest]) -> Sequence[EmbedResult | Exception]:
        reply = await self._send(requests)
        handed_back = [n for n, answer in enumerate(reply) if isinstance(answer, ShuttingDown)]
        if handed_back:  # by a replica that ends before their turn came
            for n, answer in zip(handed_back, await self._send([requests[n] for n in handed_back]), strict=True):
                reply[n] = answer
        return reply

    async def _send(self, requests: list[EmbedRequest]) -> list[EmbedResult | Exception]:
        reply: list[EmbedResult | Exception] = await resilient(lambda: self._handle.embed.remote(requests), "embedder")
        return reply

    @property
    def known(self) -> ModelInfo | None:
        """What the model is, if an embedder has said so already."""
        return self._info

    async def info(self) -> ModelInfo:
        """What the model is; asked once."""
        if self._info is None:
            await self.ping()
        assert self._info is not None
        return self._info

    async def ping(self) -> None:
        """Ask an embedder whether it is there, and what the model is, past its queue. Raises what is wrong."""
        self._info = await resilient(self._handle.info.remote, "embedder")

    async def embed(
        self,
        inputs: Inputs,
        prompt: str,
        truncate: Truncate,
        path_of: Callable[[int], str],
        *,
        input_type: InputType | None = None,
        cached: bool = True,
    ) -> EmbedResult:
        """Embed any number of inputs, in order.

        Args:
            inputs: texts, or lists of token ids.
            prompt: put in front of each text.
            truncate: which end of a too long input is cut.
            path_of: the path of the n-th input in the caller's request, for errors.
            input_type: what the inputs are, where the model reads more of one than of the other.
            cached: False leaves the cache alone: nothing of these inputs stays behind.

        Raises:
            MemserveError: the error of the first input that failed.
        """
        if self.cache.max_bytes == 0 or not cached:
            return await self._embed(inputs, prompt, truncate, input_type, path_of)
        info = await self.info()
        revision = f"{info.revision}-{info.limit(input_type)}"
        timings = Timings(0.0, 0.0, 0.0)

        async def compute(missing: list[int]) -> list[CachedVector]:
            nonlocal timings
            picked = cast(Inputs, [inputs[position] for position in missing])
            result = await self._embed(picked, prompt, truncate, input_type, lambda n: path_of(missing[n]))
            timings = result.timings
            rows = zip(result.vectors, result.tokens.tolist(), result.truncated.tolist(), strict=True)
            # A copy of its own: a row of the reply would keep the whole reply in memory.
            return [CachedVector(row.copy(), tokens, truncated) for row, tokens, truncated in rows]

        keys = [cache_key(revision, prompt, truncate, item) for item in inputs]
        entries = await self.cache.get_or_compute(keys, compute)
        return EmbedResult(
            vectors=np.stack([entry.vector for entry in entries]),
            tokens=np.fromiter((entry.tokens for entry in entries), np.int32, len(entries)),
            truncated=np.fromiter((entry.truncated for entry in entries), np.bool_, len(entries)),
            timings=timings,
        )

    async def split(
        self, texts: Sequence[str], add_special_tokens: bool, path_of: Callable[[int], str]
    ) -> list[list[TextToken]]:
        """The tokens of each text with their places in it. Raises InvalidRequest, Overloaded."""
        return await self._lone(lambda: self._handle.split.remote(texts, add_special_tokens), path_of)

    async def decode(self, ids: Sequence[Sequence[int]], path_of: Callable[[int], str]) -> list[str]:
        """The text of each list of token ids. Raises InvalidRequest, Overloaded."""
        return await self._lone(lambda: self._handle.decode.remote(ids), path_of)

    async def _lone(
        self, call: Callable[[], Awaitable[Answer | MemserveError]], path_of: Callable[[int], str]
    ) -> Answer:
        with self._lone_calls.one():
            answer = await resilient(call, "embedder")
        if isinstance(answer, MemserveError):
            raise _renamed(answer, 0, path_of)
        return answer

    async def _embed(
        self,
        inputs: Inputs,
        prompt: str,
        truncate: Truncate,
        input_type: InputType | None,
        path_of: Callable[[int], str],
    ) -> EmbedResult:
        """Cut inputs into requests that replicas can share, and put the answers together again in order."""
        pieces = list(runs(map(estimated_tokens, inputs), self._call_tokens))
        requests = [EmbedRequest(inputs[start:end], prompt, truncate, input_type) for start, end in pieces]
        results: list[EmbedResult] = []
        for (start, _), answer in zip(pieces, await self.batcher.submit_all(requests), strict=True):
            if isinstance(answer, MemserveError):
                raise _renamed(answer, start, path_of) from answer
            if isinstance(answer, Exception):
                raise answer
            results.append(answer)
        return results[0] if len(results) == 1 else _joined(results)


class _Limits(TypedDict):
    in_flight: int
    budget: int
    max_queued: int
    prefetch: int
    prefetch_at: int


def _limits(in_flight: int, call_tokens: int, max_queued_tokens: int) -> _Limits:
    """Of the batcher: what fills a good part of a call need not wait for one to come back."""
    return {
        "in_flight": in_flight,
        "budget": call_tokens,
        "max_queued": max_queued_tokens,
        "prefetch": in_flight,
        "prefetch_at": call_tokens // 4,
    }


def _joined(results: Sequence[EmbedResult]) -> EmbedResult:
    return EmbedResult(
        vectors=np.concatenate([result.vectors for result in results]),
        tokens=np.concatenate([result.tokens for result in results]),
        truncated=np.concatenate([result.truncated for result in results]),
        timings=Timings(
            queue_s=max(result.timings.queue_s for result in results),
            tokenize_s=max(result.timings.tokenize_s for result in results),
            forward_s=max(result.timings.forward_s for result in results),
        ),
    )


def _renamed(error: MemserveError, start: int, path_of: Callable[[int], str]) -> MemserveError:
    """The engine's error with the path of the input in the caller's request."""
    if error.position is None or not isinstance(error, InvalidRequest | EmbeddingFailed):
        return error
    path = path_of(start + error.position)
    return error.at(path)
