"""The gateway's calls to the embedder: batched, behind a cache of vectors. Calls to the reranker are made alike.

Guarantees:
- Requests that arrive while a call is in progress are batched into the next one, so that hundreds of small HTTP
  requests become a few handle calls.
- A call carries urgent requests or bulk requests. Both kinds have calls of their own, so that an urgent request is sent
  while bulk requests are being embedded.
- A request that is larger than a call is sent piece by piece: a few pieces of it wait or run at a time, and the next
  one follows when one of them is done. So its length does not make others wait, and it is admitted by its first piece.
- What is queued for longer than `max_wait_s`, or past its deadline, is not sent.
- A request that fails, or whose client disconnects, is charged the tokens of those of its pieces that were sent and
  that the embedder did not refuse. The tokens of a piece without a result are estimated.

Nothing is durable: queued requests are lost with the process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict, cast

import numpy as np

from deployments.batcher import Batcher
from deployments.calls.resilient import UnbatchedCalls, resilient, with_plain_pickle
from deployments.embedding import token_ids
from deployments.embedding.cache import CachedVector, VectorCache, cache_key
from deployments.embedding.engine import CHARACTERS_PER_TOKEN, MOST_CHARACTERS_PER_TOKEN, EmbedRequest
from deployments.embedding.model import InputType, ModelInfo, TextToken, Truncate
from deployments.embedding.outputs import EmbedResult, Timings
from deployments.embedding.packing import runs
from deployments.errors import (
    InvalidRequest,
    MemserveError,
    Overloaded,
    ShuttingDown,
    Unavailable,
    renumbered,
)
from deployments.fair_queue import Turn
from deployments.rate_limits import tokens_of_request

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

Inputs = list[str] | list[list[int]]

BULK_TOKENS = 1_024
"""A request of several inputs with more estimated tokens is bulk: it keeps a CPU busy for about a whole run."""


def estimated_tokens(given: object, limit: int, prompt: str = "") -> int:
    """The tokens of one input that is not tokenized yet: exact for token ids, by length for a text and its prompt.

    An input counts at most `limit`, the tokens that the model reads of it; a text of a megabyte and more counts by the
    memory that it takes. Requests are admitted by this estimate; the embedder counts exactly.
    """
    if isinstance(given, str):
        size, read = len(given), len(prompt) + len(given)
        return max(min(limit, read // CHARACTERS_PER_TOKEN + 2), size // MOST_CHARACTERS_PER_TOKEN)
    return min(limit, len(cast(list[int], given)))


@dataclass(slots=True)
class _Queued:
    """A request for the embedder, its deadline, and whether it was sent."""

    request: EmbedRequest
    deadline: float | None
    sent: bool = False


@dataclass(slots=True)
class _Spent:
    """The tokens of the inputs of one request that the embedder has read, or may have read."""

    tokens: int = 0


_NOT_RUN = (InvalidRequest, Overloaded, Unavailable)
"""The errors of requests whose inputs the embedder did not run."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What the pieces of one request have in common.

    Attributes:
        realm: part of the key in the cache; None if the cache is not used.
        revision: of the model, with its limit; part of the key in the cache.
        spent: is charged if the request fails.
    """

    prompt: str
    truncate: Truncate
    input_type: InputType | None
    turn: Turn
    realm: str | None
    revision: str
    spent: _Spent


class EmbedderCalls:
    """Calls to the Embedder deployment. Belongs to one event loop.

    Args:
        handle: the Embedder deployment, or one like it.
        deployment: its name, for errors.
        in_flight: urgent calls, and bulk calls, at a time; twice as many while at least a quarter of a call waits;
            more urgent calls while bulk calls are in progress (see `Batcher`).
        call_tokens: estimated tokens in one call.
        max_queued_tokens: estimated tokens, urgent and bulk, above which a caller may queue no more than its share.
        max_wait_s: the longest time that a piece of a request may wait for a call; None for no limit.
        cache_bytes: bytes of vectors to keep; with 0 every text is embedded anew.
        clock: seconds, monotonic; the clock of the turns' deadlines.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        *,
        deployment: str = "embedder",
        in_flight: int,
        call_tokens: int,
        max_queued_tokens: int,
        max_wait_s: float | None,
        cache_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._handle = with_plain_pickle(handle)
        self._call_tokens = call_tokens
        self._deployment = deployment
        self._unbatched = UnbatchedCalls(deployment)
        self._clock = clock
        self._info: ModelInfo | None = None
        self._unfed_tokens = 0  # of pieces that are not queued yet
        self.cache = VectorCache(cache_bytes, clock=clock)
        self.batcher: Batcher[_Queued, EmbedResult] = Batcher(
            self._call,
            cost=self._tokens_of,
            separate_slots=True,
            clock=clock,
            **_limits(in_flight, call_tokens, max_queued_tokens, max_wait_s),
        )

    def reconfigure(
        self,
        *,
        in_flight: int,
        call_tokens: int,
        max_queued_tokens: int,
        max_wait_s: float | None,
        cache_bytes: int,
    ) -> None:
        """Change these arguments of the constructor. Calls that wait or run are kept."""
        self._call_tokens = call_tokens
        self.batcher.reconfigure(**_limits(in_flight, call_tokens, max_queued_tokens, max_wait_s))
        self.cache.resize(cache_bytes)

    @property
    def queued_tokens(self) -> int:
        """Estimated tokens that wait for a call, with those of the pieces that are not queued yet."""
        return self.batcher.queued_cost + self._unfed_tokens

    def _tokens_of(self, queued: _Queued) -> int:
        assert self._info is not None  # `embed` asks for it
        request = queued.request
        limit = self._info.limit(request.input_type)
        return sum(estimated_tokens(given, limit, request.prompt) for given in request.inputs)

    async def _call(self, queued: list[_Queued]) -> Sequence[EmbedResult | Exception]:
        now = self._clock()
        requests = []
        for one in queued:
            one.sent = True
            left_s = None if one.deadline is None else max(0.0, one.deadline - now)
            requests.append(one.request if left_s is None else replace(one.request, timeout_s=left_s))
        reply = await self._send(requests)
        not_begun = [n for n, answer in enumerate(reply) if isinstance(answer, ShuttingDown)]
        if not_begun:  # by a replica that is being stopped
            for n, answer in zip(not_begun, await self._send([requests[n] for n in not_begun]), strict=True):
                reply[n] = answer
        return reply

    async def _send(self, requests: list[EmbedRequest]) -> list[EmbedResult | Exception]:
        reply: list[EmbedResult | Exception] = await resilient(
            lambda: self._handle.embed.remote(requests), self._deployment
        )
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
        self._info = await resilient(self._handle.info.remote, self._deployment)

    async def embed(
        self,
        inputs: Inputs,
        prompt: str,
        truncate: Truncate,
        *,
        realm: str | None,
        turn: Turn | None = None,
        input_type: InputType | None = None,
    ) -> EmbedResult:
        """Embed any number of inputs, in order.

        Args:
            inputs: texts, or lists of token ids.
            prompt: put in front of each text. For a reranker, the query.
            truncate: the end at which an input that is too long is cut.
            realm: whose requests share cached vectors with this one. None bypasses the cache: nothing of these inputs
                is kept.
            turn: of the request. It becomes bulk if there are several inputs with more than `BULK_TOKENS` together.
            input_type: the kind of inputs, since some models read more tokens of one kind than of another.

        Raises:
            MemserveError: the error of the first input that failed; `position` is its index in `inputs`.
            Overloaded: too much work is queued. Nothing of the request was sent.
            RateLimited: the key of the request has used its tokens. Nothing of the request was queued.
            DeadlineExceeded: a part of the request was still queued when its deadline passed.
        """
        info = await self.info()
        limit = info.limit(input_type)
        inputs = _readable(inputs, truncate, limit, info)
        costs = [estimated_tokens(given, limit, prompt) for given in inputs]
        total = sum(costs)
        turn = (turn or Turn()).in_bulk(len(inputs) > 1 and total > BULK_TOKENS)
        cached_for = realm if self.cache.max_bytes else None
        work = _Work(prompt, truncate, input_type, turn, cached_for, f"{info.revision}-{limit}", _Spent())
        limited = tokens_of_request.get()
        if limited is None:
            return await self._embed_work(work, inputs, costs)
        if turn.begun:
            limited.charge(total)
        else:
            await limited.take(total)
        try:
            result = await self._embed_work(work, inputs, costs)
            work.spent.tokens = int(result.tokens.sum())  # those of cached vectors are charged, too
            return result
        finally:
            limited.charge(work.spent.tokens - total)

    async def _embed_work(self, work: _Work, inputs: Inputs, costs: Sequence[int]) -> EmbedResult:
        pieces = list(runs(costs, self._call_tokens))
        if len(pieces) == 1:
            return await self._embed_piece(work, inputs)
        return await self._embed_pieces(work, inputs, [(start, end, sum(costs[start:end])) for start, end in pieces])

    async def _embed_pieces(self, work: _Work, inputs: Inputs, pieces: Sequence[tuple[int, int, int]]) -> EmbedResult:
        """Embed pieces (start, end, tokens) of the inputs, as many at a time as calls may be in flight.

        After an error no further piece is sent. The error is raised when the pieces that were sent have ended.
        """
        later = replace(work, turn=work.turn.after_begin())
        results: dict[int, EmbedResult] = {}
        failed: dict[int, Exception] = {}
        numbers = iter(range(len(pieces)))
        unfed = sum(tokens for *_, tokens in pieces)
        self._unfed_tokens += unfed

        async def feed() -> None:
            nonlocal unfed
            for number in numbers:  # each piece is fed once: `feed` runs several times, over one iterator
                if failed:
                    return
                start, end, tokens = pieces[number]
                unfed -= tokens
                self._unfed_tokens -= tokens
                try:
                    with renumbered(range(start, end)):
                        results[number] = await self._embed_piece(later if number else work, inputs[start:end])
                except Exception as error:  # noqa: BLE001 - raised below
                    failed[number] = error

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.batcher.slots, len(pieces))):
                    group.create_task(feed())
        finally:
            self._unfed_tokens -= unfed
        if failed:
            raise failed[min(failed)]
        return _joined([results[number] for number in range(len(pieces))])

    async def _embed_piece(self, work: _Work, inputs: Inputs) -> EmbedResult:
        """Embed inputs that fit into one call: from the cache, the others by the embedder."""
        if work.realm is None:
            return await self._submit(work, inputs)
        timings = Timings(0.0, 0.0, 0.0)

        async def compute(missing: list[int]) -> list[CachedVector]:
            nonlocal timings
            picked = cast(Inputs, [inputs[position] for position in missing])
            with renumbered(missing):
                result = await self._submit(work, picked)
            timings = result.timings
            rows = zip(result.vectors, result.tokens.tolist(), result.truncated.tolist(), strict=True)
            # Rows are copied, since a view of a row would keep the whole reply in memory.
            return [CachedVector(row.copy(), tokens, truncated) for row, tokens, truncated in rows]

        keys = [cache_key(work.realm, work.revision, work.prompt, work.truncate, item) for item in inputs]
        entries = await self.cache.get_or_compute(keys, compute, bulk=work.turn.bulk, deadline=work.turn.deadline)
        return EmbedResult(
            vectors=np.stack([entry.vector for entry in entries]),
            tokens=np.fromiter((entry.tokens for entry in entries), np.int32, len(entries)),
            truncated=np.fromiter((entry.truncated for entry in entries), np.bool_, len(entries)),
            timings=timings,
        )

    async def _submit(self, work: _Work, inputs: Inputs) -> EmbedResult:
        """Queue inputs for a call."""
        turn = work.turn
        request = EmbedRequest(
            inputs, work.prompt, work.truncate, work.input_type, turn.caller, turn.bulk, begun=turn.begun
        )
        queued = _Queued(request, turn.deadline)
        try:
            result = await self.batcher.submit(queued, turn)
        except _NOT_RUN:
            raise
        except BaseException:  # also if the client has disconnected
            if queued.sent:
                work.spent.tokens += self._tokens_of(queued)
            raise
        work.spent.tokens += int(result.tokens.sum())
        return result

    async def split(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[TextToken]]:
        """The tokens of each text, with their places in it. Raises InvalidRequest, Overloaded, DeadlineExceeded."""
        return await self._call_unbatched(self._handle.split, texts, add_special_tokens)

    async def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, without special tokens. Raises what `split` does."""
        return await self._call_unbatched(self._handle.count_tokens, texts)

    async def decode(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        """The text of each list of token ids. Raises InvalidRequest, Overloaded, DeadlineExceeded."""
        return await self._call_unbatched(self._handle.decode, ids, skip_special_tokens)

    async def _call_unbatched(self, method: DeploymentHandle, *args: object) -> Any:
        """Call a method of the embedder, which also takes the time that is left until the request's deadline."""
        turn = Turn()
        with self._unbatched.admit(turn):
            answer = await resilient(lambda: method.remote(*args, turn.remaining_s(self._clock())), self._deployment)
        if isinstance(answer, MemserveError):
            raise answer
        return answer


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
    max_wait_s: float | None
    prefetch: int
    prefetch_at: int


def _limits(in_flight: int, call_tokens: int, max_queued_tokens: int, max_wait_s: float | None) -> _Limits:
    """Limits of the batcher. A quarter of a call is worth sending while another call is in progress."""
    return {
        "in_flight": in_flight,
        "budget": call_tokens,
        "max_queued": max_queued_tokens,
        "max_wait_s": max_wait_s,
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
