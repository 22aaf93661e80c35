"""The gateway's calls to the embedder: batched, behind a cache of vectors.

Requests that arrive while a call is in progress are batched into the next one, so that hundreds of small HTTP requests
become a few handle calls.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypedDict, TypeVar, cast

import numpy as np
from ray.serve.handle import DeploymentHandle

from deployments.batcher import Batcher
from deployments.calls.resilient import UnbatchedCalls, resilient, with_plain_pickle
from deployments.embedding import token_ids
from deployments.embedding.cache import CachedVector, VectorCache, cache_key
from deployments.embedding.engine import EmbedRequest
from deployments.embedding.model import InputType, ModelInfo, TextToken, Truncate
from deployments.embedding.outputs import EmbedResult, Timings
from deployments.embedding.packing import runs
from deployments.errors import MemserveError, ShuttingDown, renumbered
from deployments.fair_queue import Turn

Answer = TypeVar("Answer")
Inputs = list[str] | list[list[int]]

CHARACTERS_PER_TOKEN = 4  # of English text. Requests are admitted by this estimate; the embedder counts exactly


def estimated_tokens(given: object, limit: int) -> int:
    """The tokens of one input that is not tokenized yet: exact for token ids, by length for a text.

    An input counts at most `limit`, the tokens that the model reads of it.
    """
    if isinstance(given, str):
        return min(limit, len(given) // CHARACTERS_PER_TOKEN + 2)
    return min(limit, len(cast(list[int], given)))


class EmbedderCalls:
    """Calls to the Embedder deployment. Belongs to one event loop.

    Args:
        handle: the Embedder deployment.
        in_flight: calls at a time; twice as many while at least a quarter of a call waits.
        call_tokens: estimated tokens in one call.
        max_queued_tokens: estimated tokens that may wait; more are refused with `Overloaded`.
        cache_bytes: bytes of vectors to keep; with 0 every text is embedded anew.
    """

    def __init__(
        self, handle: DeploymentHandle, *, in_flight: int, call_tokens: int, max_queued_tokens: int, cache_bytes: int
    ) -> None:
        self._handle = with_plain_pickle(handle)
        self._call_tokens = call_tokens
        self._unbatched = UnbatchedCalls("embedder")
        self._info: ModelInfo | None = None
        self.cache = VectorCache(cache_bytes)
        self.batcher: Batcher[EmbedRequest, EmbedResult] = Batcher(
            self._call, cost=self._tokens_of, **_limits(in_flight, call_tokens, max_queued_tokens)
        )

    def reconfigure(self, *, in_flight: int, call_tokens: int, max_queued_tokens: int, cache_bytes: int) -> None:
        """Change these arguments of the constructor. Calls that wait or run are kept."""
        self._call_tokens = call_tokens
        self.batcher.reconfigure(**_limits(in_flight, call_tokens, max_queued_tokens))
        self.cache.resize(cache_bytes)

    def _tokens_of(self, request: EmbedRequest) -> int:
        assert self._info is not None  # `_embed` asks for it
        limit = self._info.limit(request.input_type)
        return sum(estimated_tokens(given, limit) for given in request.inputs)

    async def _call(self, requests: list[EmbedRequest]) -> Sequence[EmbedResult | Exception]:
        reply = await self._send(requests)
        not_begun = [n for n, answer in enumerate(reply) if isinstance(answer, ShuttingDown)]
        if not_begun:  # by a replica that is being stopped
            for n, answer in zip(not_begun, await self._send([requests[n] for n in not_begun]), strict=True):
                reply[n] = answer
        return reply

    async def _send(self, requests: list[EmbedRequest]) -> list[EmbedResult | Exception]:
        reply: list[EmbedResult | Exception] = await resilient(lambda: self._handle.embed.remote(requests), "embedder")
        return reply

    @property
    def known_info(self) -> ModelInfo | None:
        """The model's info if an embedder has answered before, else None."""
        return self._info

    async def info(self) -> ModelInfo:
        """The model's info. It is fetched from an embedder once."""
        if self._info is None:
            await self.ping()
        assert self._info is not None
        return self._info

    async def ping(self) -> None:
        """Ask an embedder for its model's info, without queueing. Raises Unavailable if none answers."""
        self._info = await resilient(self._handle.info.remote, "embedder")

    async def embed(
        self,
        inputs: Inputs,
        prompt: str,
        truncate: Truncate,
        *,
        input_type: InputType | None = None,
        cached: bool = True,
    ) -> EmbedResult:
        """Embed any number of inputs, in order.

        Args:
            inputs: texts, or lists of token ids.
            prompt: put in front of each text.
            truncate: the end at which an input that is too long is cut.
            input_type: the kind of inputs, since some models read more tokens of one kind than of another.
            cached: False bypasses the cache: nothing of these inputs is kept.

        Raises:
            MemserveError: the error of the first input that failed; `position` is its index in `inputs`.
        """
        info = await self.info()
        inputs = _readable(inputs, truncate, info.limit(input_type), info)
        if self.cache.max_bytes == 0 or not cached:
            return await self._embed(inputs, prompt, truncate, input_type)
        revision = f"{info.revision}-{info.limit(input_type)}"
        timings = Timings(0.0, 0.0, 0.0)

        async def compute(missing: list[int]) -> list[CachedVector]:
            nonlocal timings
            picked = cast(Inputs, [inputs[position] for position in missing])
            with renumbered(missing):
                result = await self._embed(picked, prompt, truncate, input_type)
            timings = result.timings
            rows = zip(result.vectors, result.tokens.tolist(), result.truncated.tolist(), strict=True)
            # Rows are copied, since a view of a row would keep the whole reply in memory.
            return [CachedVector(row.copy(), tokens, truncated) for row, tokens, truncated in rows]

        keys = [cache_key(revision, prompt, truncate, item) for item in inputs]
        entries = await self.cache.get_or_compute(keys, compute)
        return EmbedResult(
            vectors=np.stack([entry.vector for entry in entries]),
            tokens=np.fromiter((entry.tokens for entry in entries), np.int32, len(entries)),
            truncated=np.fromiter((entry.truncated for entry in entries), np.bool_, len(entries)),
            timings=timings,
        )

    async def split(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[TextToken]]:
        """The tokens of each text, with their places in it. Raises InvalidRequest, Overloaded."""
        return await self._call_unbatched(lambda: self._handle.split.remote(texts, add_special_tokens))

    async def decode(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        """The text of each list of token ids. Raises InvalidRequest, Overloaded."""
        return await self._call_unbatched(lambda: self._handle.decode.remote(ids, skip_special_tokens))

    async def _call_unbatched(self, call: Callable[[], Awaitable[Answer | MemserveError]]) -> Answer:
        with self._unbatched.admit(Turn()):
            answer = await resilient(call, "embedder")
        if isinstance(answer, MemserveError):
            raise answer
        return answer

    async def _embed(
        self, inputs: Inputs, prompt: str, truncate: Truncate, input_type: InputType | None
    ) -> EmbedResult:
        """Cut inputs into requests of at most `call_tokens`, and join the answers in order."""
        limit = (await self.info()).limit(input_type)
        pieces = list(runs((estimated_tokens(given, limit) for given in inputs), self._call_tokens))
        requests = [EmbedRequest(inputs[start:end], prompt, truncate, input_type) for start, end in pieces]
        results: list[EmbedResult] = []
        for (start, end), answer in zip(pieces, await self.batcher.submit_all(requests), strict=True):
            if isinstance(answer, Exception):
                with renumbered(range(start, end)):
                    raise answer
            else:
                results.append(answer)
        return results[0] if len(results) == 1 else _joined(results)


def _readable(inputs: Inputs, truncate: Truncate, limit: int, info: ModelInfo) -> Inputs:
    """The inputs without the token ids that the model does not read, but for one that shows that there are more."""
    return cast(
        Inputs,
        [given if isinstance(given, str) else token_ids.cut(given, limit + 1, truncate, info) for given in inputs],
    )


class _Limits(TypedDict):
    in_flight: int
    budget: int
    max_queued: int
    prefetch: int
    prefetch_at: int


def _limits(in_flight: int, call_tokens: int, max_queued_tokens: int) -> _Limits:
    """Limits of the batcher. A quarter of a call is worth sending while another call is in progress."""
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
