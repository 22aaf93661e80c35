"""The gateway's side of its calls to the other deployments: coalesced, retried where that is safe, errors mapped.

Hundreds of small HTTP requests become a few handle calls: while a call is on its way, everything that arrives waits,
and rides the next one. A call that dies with its replica is sent again: reads change nothing, and a write carries an id
under which the log remembers it, so that it is made once however often it arrives.
"""

import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypedDict, TypeVar, cast

import numpy as np
import ray.exceptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.batcher import Batcher
from deployments.calls.partitions import partition_of
from deployments.calls.searches import QUEUED_CALLS, Answers, CoalescedSearches
from deployments.embedding.cache import CachedVector, VectorCache, cache_key
from deployments.embedding.engine import EmbedRequest, EmbedResult, Timings
from deployments.embedding.model import InputType, ModelInfo, TextToken, Truncate
from deployments.embedding.packing import runs
from deployments.errors import EmbeddingFailed, InvalidRequest, MemserveError, Overloaded, ShuttingDown, Unavailable
from store import Append, AppendResult, Search, SearchResult, StoreError
from store import Store as Memories
from store.errors import OUTCOME_UNKNOWN

Answer = TypeVar("Answer")
Arguments = ParamSpec("Arguments")
Inputs = list[str] | list[list[int]]

ATTEMPTS = 3
LONE_CALLS = 1024  # for one request each, that may be on their way to a deployment; past it `Overloaded`
CHARACTERS_PER_TOKEN = 4  # English text; what waits is admitted by this estimate, the embedder counts exactly

_REPLICA_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.ActorUnavailableError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
)


async def resilient(call: Callable[[], Awaitable[Answer]], what: str, *, writes: bool = False) -> Answer:
    """Await `call()`, again if its replica died.

    Args:
        writes: once it was lost it may have been made, so that no failure after that may deny it.

    Raises:
        Overloaded: the deployment refuses more work.
        Unavailable: no replica could answer in `ATTEMPTS` attempts; `OUTCOME_UNKNOWN` for a write that was lost.
    """
    lost = False
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await call()
        except (*_REPLICA_LOST, BackPressureError, DeploymentUnavailableError, RayServeException) as error:
            lost = lost or isinstance(error, _REPLICA_LOST)
            if isinstance(error, _REPLICA_LOST) and attempt < ATTEMPTS:
                continue
            if writes and lost:
                message = f"The {what} was lost while it worked, and whether this was written is not known."
                raise Unavailable(message, None, OUTCOME_UNKNOWN) from error
            if isinstance(error, BackPressureError):
                raise Overloaded(f"The {what} has more work than it admits.") from error
            raise Unavailable(f"The {what} is not available; try again.", None, f"{what}_unavailable") from error
    raise AssertionError("unreachable")


def quick(handle: DeploymentHandle, **options: Any) -> DeploymentHandle:
    """The handle with plain pickle: what travels is made of importable classes, and cloudpickle takes twice as long."""
    return handle.options(request_serialization="pickle", response_serialization="pickle", **options)


def estimated_tokens(given: object) -> int:
    """Tokens of one input before anything is tokenised: token ids exactly, a text by its length."""
    if isinstance(given, str):
        return len(given) // CHARACTERS_PER_TOKEN + 2
    return len(cast(list[int], given))


def _request_tokens(request: EmbedRequest) -> int:
    return sum(map(estimated_tokens, request.inputs))


class LoneCalls:
    """Counts the calls to a deployment that are made for one request each.

    Args:
        what: the deployment, for errors.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._on_their_way = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Around a call. Raises Overloaded where `LONE_CALLS` are on their way."""
        if self._on_their_way >= LONE_CALLS:
            raise Overloaded(f"The {self._what} has more work than it admits; try again later.")
        self._on_their_way += 1
        try:
            yield
        finally:
            self._on_their_way -= 1


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
            tokenise_s=max(result.timings.tokenise_s for result in results),
            forward_s=max(result.timings.forward_s for result in results),
        ),
    )


def _renamed(error: MemserveError, start: int, path_of: Callable[[int], str]) -> MemserveError:
    """The engine's `input.N` as the caller knows it."""
    match = re.match(r"input\.(\d+)", error.param or "")
    if match is None or not isinstance(error, InvalidRequest | EmbeddingFailed):
        return error
    path = path_of(start + int(match[1]))
    param = path + (error.param or "")[match.end() :]
    return type(error)(error.message.replace(match[0], path), param, error.code)


def _checked(answer: Answer | StoreError) -> Answer:
    """A store's answer; an error that came as a value is raised here."""
    if isinstance(answer, StoreError):
        raise answer
    return answer


class StoreCalls:
    """Calls to the store: writes to any replica, reads to the one that is warm for the user's partition.

    Appends and searches are coalesced. Of each so much may wait as fills `QUEUED_CALLS` calls; past it `Overloaded`.
    So is what asks for anything else, erasures too, past `LONE_CALLS`: it was not done, and what waits is not delayed.

    Args:
        handle: the Store deployment.
        partitions: number of buckets that users hash to.
        append_in_flight: write calls at once.
        append_memories: memories in one write call.
    """

    def __init__(
        self, handle: DeploymentHandle, *, partitions: int, append_in_flight: int, append_memories: int
    ) -> None:
        self._handle = quick(handle)
        self._by_partition = [quick(handle, session_id=f"partition-{number}") for number in range(partitions)]
        self._appends: Batcher[Sequence[Append], list[AppendResult]] = Batcher(
            self._append,
            in_flight=append_in_flight,
            budget=append_memories,
            max_queued=QUEUED_CALLS * append_memories,
            cost=lambda call: sum(len(request.memories) for request in call),
        )
        self._searches = CoalescedSearches(
            self._search,
            partition_of=lambda request: self._partition(request.tenant, request.user_id),
            partitions=partitions,
        )
        self._lone_calls = LoneCalls("store")

    def reconfigure(self, *, append_in_flight: int, append_memories: int) -> None:
        """Change what the constructor was given, while calls wait and travel."""
        self._appends.reconfigure(
            in_flight=append_in_flight, budget=append_memories, max_queued=QUEUED_CALLS * append_memories
        )

    async def _append(self, calls: list[Sequence[Append]]) -> Sequence[list[AppendResult] | Exception]:
        return await self._write(Memories.append_together, calls)

    async def _search(self, partition: int, requests: list[Search]) -> tuple[str, Answers]:
        warm = self._by_partition[partition]
        return _checked(await resilient(lambda: warm.search.remote(requests), "store"))

    def _partition(self, tenant: str, user_id: str) -> int:
        return partition_of(tenant, user_id, len(self._by_partition))

    async def append(self, call: Sequence[Append]) -> list[AppendResult]:
        """Commit one call, all of it or nothing, in a transaction with whatever else waits.

        Raises:
            Overloaded: at once, where too much waits. Else its own error.
        """
        return await self._appends.submit(call)

    async def search(self, request: Search) -> SearchResult:
        """Search one user. Raises its own error, or Overloaded."""
        return await self._searches.search(request)

    async def run_warm(
        self,
        method: Callable[Concatenate[Memories, str, str, Arguments], Answer],
        tenant: str,
        user_id: str,
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Call a method of the store that reads one user (`Memories.get`), on the replica that is warm for it."""
        warm = self._by_partition[self._partition(tenant, user_id)]
        with self._lone_calls.one():
            return _checked(
                await resilient(lambda: warm.run.remote(method, tenant, user_id, *args, **options), "store")
            )

    async def run(
        self,
        method: Callable[Concatenate[Memories, Arguments], Answer],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Call a method of the store that reads, on any replica."""
        with self._lone_calls.one():
            return _checked(await resilient(lambda: self._handle.run.remote(method, *args, **options), "store"))

    async def write(
        self,
        method: Callable[Concatenate[Memories, Arguments], Answer],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Call a method of the store that writes, on any replica.

        Raises:
            Unavailable: `OUTCOME_UNKNOWN` where whether it was done cannot be told.
        """
        with self._lone_calls.one():
            return await self._write(method, *args, **options)

    async def _write(
        self,
        method: Callable[Concatenate[Memories, Arguments], Answer],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        return _checked(
            await resilient(lambda: self._handle.run.remote(method, *args, **options), "store", writes=True)
        )

    async def ping(self) -> None:
        """Read the log, past every queue."""
        _checked(await resilient(lambda: self._handle.run.remote(Memories.ping), "store"))
