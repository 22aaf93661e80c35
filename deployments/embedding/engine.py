"""The embedding engine: requests in, vectors out. Requests that arrive while the device is busy share its next forward.

Guarantees:
- The vectors of a request are in the order of its inputs, whichever forwards computed them.
- A failure belongs to the request that caused it. Bad input is refused before it joins a batch. A batch that fails is
  halved until only the failing request fails. A vector that is not finite is an error, never an answer.
- Inputs are tokenized while a forward runs, so that the next batch is ready when the device is free.
- The texts of a cancelled request leave the queue before the forward.
- A long text is tokenized beside the others, which do not wait for it.
- Callers take turns at the tokenizer and at the device, and urgent requests go before bulk ones
  (deployments/batcher.py). Beside bulk requests, a single request waits for the forward that runs and at most one more.
- Admission counts tokens, and of an input at most the tokens that the model reads. A request beyond its caller's share
  of a full queue is refused as a whole and at once.
- A text that is still queued when its time has passed does not reach the device.

Nothing is durable: queued requests are lost with the process.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import numpy as np

from deployments.batcher import Batcher, Waiting, oldest_call, oldest_first
from deployments.embedding.model import InputType, Model, ModelInfo, TextToken, Tokens, Truncate
from deployments.embedding.outputs import Answers, EmbedResult, Timings
from deployments.embedding.packing import pick, runs
from deployments.errors import (
    DeadlineExceeded,
    EmbeddingFailed,
    InvalidRequest,
    MemserveError,
    Unavailable,
    UpstreamFailed,
)
from deployments.fair_queue import Turn

# Inputs are tokenized in groups of about this many characters, so that a huge request does not delay a small one. A
# request with a longer text has a queue of its own, since some tokenizers must read a text to its end.
_TOKENIZE_CHARACTERS = 65_536
# Characters to split, or token ids to decode, at a time.
_SPLIT_UNITS = 8_192
CHARACTERS_PER_TOKEN = 4
"""Of English text. It bounds the texts that are queued before they are tokenized, whose tokens are not known yet."""
MOST_CHARACTERS_PER_TOKEN = 4_096
"""A text counts at least one token for so many characters. So the limits of the queues bound their memory, too."""


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts, or lists of token ids, that are embedded in the same way.

    Attributes:
        inputs: at least one; none of them may be empty. Token ids are used verbatim.
        prompt: put in front of each text, but not of token ids. For a cross-encoder, the query.
        truncate: the end at which an input that is too long is cut; with `none` the request is refused instead.
        input_type: what the inputs are. Some models read more tokens of a document than of a query.
        caller: by which shares of the work are counted; empty if the request is a caller of its own.
        bulk: less urgent than other requests.
        timeout_s: the longest time that the request may be queued, in seconds; None for no limit of its own.
        begun: it is a part of a larger one of which another part was admitted, so it is not refused.
    """

    inputs: list[str] | list[list[int]]
    prompt: str = ""
    truncate: Truncate = "end"
    input_type: InputType | None = None
    caller: str = ""
    bulk: bool = False
    timeout_s: float | None = None
    begun: bool = False


@dataclass(frozen=True, slots=True)
class BatchStats:
    """One forward: its texts, their tokens without and with padding, and its duration in seconds."""

    texts: int
    tokens: int
    padded_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges, and counters since the start, for metrics.

    `queued_tokens` includes an estimate for the texts that are not tokenized yet. `failed_texts` counts the texts that
    got an error in place of a vector. It does not count the other texts of their requests.
    """

    queued_texts: int
    queued_tokens: int
    running_forwards: int
    forwards: int
    texts: int
    tokens: int
    padded_tokens: int
    forward_s: float
    failed_texts: int
    drain_rate: float


@dataclass(frozen=True, slots=True)
class _Text:
    """A text that is ready for the device."""

    tokens: Tokens
    queued_at: float


@dataclass(frozen=True, slots=True)
class _Vector:
    """The vector of a text, (dim,) float32, and its times in seconds."""

    row: np.ndarray
    queue_s: float
    forward_s: float


@dataclass(frozen=True, slots=True)
class _Input:
    """An input that is to be tokenized."""

    given: str | list[int]
    prompt: str
    truncate: Truncate
    input_type: InputType | None


_Select = Callable[[Sequence[Waiting[_Text]], int], Sequence[int]]


class Engine:
    """Dynamic batching in front of one model. An engine belongs to one event loop.

    Args:
        model: local, remote or fake.
        max_batch_tokens: the most padded tokens of a batch; None for the value that suits the model's device.
        max_batch_texts: the most texts of a batch; None for no limit. Without a queue it has no effect.
        forwards_in_flight: how many forwards run at a time; None for the value that suits the model's device.
        queue_enabled: False gives each request a forward of its own, in the order of arrival: a baseline to compare
            with.
        max_queued_tokens: the tokens of urgent requests, and of bulk requests, above which a caller may queue no more
            than its share of them; None for no limit.
        max_wait_s: the longest time that a text may wait for the tokenizer, or for the device, and a part of a call of
            `split` or `decode` for its turn; None for no limit.
        on_batch: called after every forward that succeeded.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_batch_tokens: int | None = None,
        max_batch_texts: int | None = None,
        forwards_in_flight: int | None = None,
        queue_enabled: bool = True,
        max_queued_tokens: int | None = None,
        max_wait_s: float | None = None,
        on_batch: Callable[[BatchStats], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self._clock = clock
        self._on_batch = on_batch
        self._queue_enabled = queue_enabled
        self._max_wait_s = max_wait_s
        self._splitting = asyncio.Lock()  # callers of `split` and `decode` take turns
        self._forwards = self._texts = self._tokens = self._padded_tokens = self._failed_texts = 0
        self._forward_s = 0.0
        self._tokenizer, self._long_tokenizer = (
            Batcher[_Input, Tokens | int](self._tokenize, cost=self._characters, bisect=True, clock=clock, **limits)
            for limits in _tokenizer_limits(max_queued_tokens, max_wait_s)
        )
        select: _Select = oldest_call  # the baseline: each request is a batch, and it fails as a whole
        if queue_enabled:
            select = pick if model.pads else oldest_first
            if max_batch_texts is not None:
                select = _at_most(max_batch_texts, select)
        self._device: Batcher[_Text, _Vector] = Batcher(
            self._forward,
            in_flight=forwards_in_flight or model.forwards_in_flight,
            budget=max_batch_tokens or model.max_batch_tokens,
            cost=lambda text: len(text.tokens),
            select=select,
            max_queued=max_queued_tokens,
            max_wait_s=max_wait_s,
            bisect=queue_enabled,
            clock=clock,
        )

    @property
    def info(self) -> ModelInfo:
        """What is known about the model."""
        return self.model.info

    def reconfigure(
        self,
        *,
        max_batch_tokens: int | None = None,
        forwards_in_flight: int | None = None,
        max_queued_tokens: int | None = None,
        max_wait_s: float | None = None,
    ) -> None:
        """Change the limits of a running engine. None means the same as in the constructor."""
        self._max_wait_s = max_wait_s
        tokenizers = (self._tokenizer, self._long_tokenizer)
        for tokenizer, limits in zip(tokenizers, _tokenizer_limits(max_queued_tokens, max_wait_s), strict=True):
            tokenizer.reconfigure(**limits)
        self._device.reconfigure(
            in_flight=forwards_in_flight or self.model.forwards_in_flight,
            budget=max_batch_tokens or self.model.max_batch_tokens,
            max_queued=max_queued_tokens,
            max_wait_s=max_wait_s,
        )

    async def embed(self, requests: Sequence[EmbedRequest]) -> Answers:
        """Embed many requests. Each gets its result or its own error. Cancelling the call cancels all of them."""
        answers = await asyncio.gather(*(self.embed_one(request) for request in requests), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, Exception):
                raise answer
        return Answers(answers)  # type: ignore[arg-type]

    async def embed_one(self, request: EmbedRequest) -> EmbedResult:
        """Embed one request. Cancelling the call takes its texts out of the queue.

        Raises:
            InvalidRequest: the input at `position` is empty, is not Unicode, holds a token id outside the vocabulary,
                or is too long and `truncate` is `none`.
            Overloaded: too many tokens are queued.
            DeadlineExceeded: a text was queued for too long.
            EmbeddingFailed: the model failed on the input at `position` alone, or its vector is not finite.
            UpstreamFailed: a remote model failed.
            Unavailable: the engine is closed.
        """
        self._check(request)
        # Before any work is done for the request. The queue counts its tokens once they are known.
        arrived = self._clock()
        turn = self._turn(request, arrived)
        self._device.admit(len(request.inputs), turn)
        inputs = [_Input(given, request.prompt, request.truncate, request.input_type) for given in request.inputs]
        limit = self.info.limit(request.input_type)
        room = _TOKENIZE_CHARACTERS - len(request.prompt)
        long = any(isinstance(given, str) and len(given) > room for given in request.inputs)
        answers_of = (self._long_tokenizer if long else self._tokenizer).submit_all
        tokens = [self._fitting(*answer, limit) for answer in enumerate(await answers_of(inputs, turn))]
        queued_at = self._clock()
        texts = [_Text(one, queued_at) for one in tokens]
        answers = await self._device.submit_all(texts, turn)
        failed = [(position, answer) for position, answer in enumerate(answers) if isinstance(answer, Exception)]
        if failed:
            self._failed_texts += len(failed)
            position, error = failed[0]
            raise _located(error, position) from error
        vectors = cast(list[_Vector], answers)
        values = np.concatenate([vector.row for vector in vectors])
        return EmbedResult(
            values.reshape(len(vectors), -1),  # np.stack takes twice as long
            np.fromiter((len(one) for one in tokens), np.int32, len(tokens)),
            np.fromiter((one.truncated for one in tokens), np.bool_, len(tokens)),
            Timings(
                max(vector.queue_s for vector in vectors),
                queued_at - arrived,
                max(vector.forward_s for vector in vectors),
            ),
        )

    def _turn(self, request: EmbedRequest, now: float) -> Turn:
        deadline = None if request.timeout_s is None else now + request.timeout_s
        if not self._queue_enabled:  # one caller, whose requests are kept in the order of arrival
            return Turn("", False, deadline, request.begun)
        if not request.caller:
            return Turn(bulk=request.bulk, deadline=deadline, begun=request.begun)
        return Turn(request.caller, request.bulk, deadline, request.begun)

    def _check(self, request: EmbedRequest) -> None:
        """Refuse inputs that can never be embedded, before they join a batch."""
        if not request.inputs:
            raise InvalidRequest("must not be empty", "input", "empty_input")
        vocab_size = self.info.vocab_size
        for position, given in enumerate(request.inputs):
            if not given:
                raise InvalidRequest("must not be empty", None, "empty_input", position)
            if isinstance(given, str):
                if given.isascii():  # which Python knows without a look at the text
                    continue
                try:
                    given.encode()
                except UnicodeEncodeError as error:
                    message = "is not valid Unicode: it holds half of a surrogate pair"
                    raise InvalidRequest(message, None, None, position) from error
            else:
                outside = next((token for token in cast(list[int], given) if not 0 <= token < vocab_size), None)
                if outside is not None:
                    message = f"holds the token id {outside}, which is outside the vocabulary of {vocab_size} tokens"
                    raise InvalidRequest(message, None, None, position)

    def _characters(self, one: _Input) -> int:
        """The characters of an input that count. A token id counts as one character, as tokenizing it is free."""
        read = self.info.limit(one.input_type) * CHARACTERS_PER_TOKEN
        size = len(one.given)
        return max(min(len(one.prompt) + size, read), size * CHARACTERS_PER_TOKEN // MOST_CHARACTERS_PER_TOKEN)

    @property
    def _untokenized(self) -> int:
        """The tokens, as estimated, of the inputs that are queued for the tokenizer."""
        return (self._tokenizer.queued_cost + self._long_tokenizer.queued_cost) // CHARACTERS_PER_TOKEN

    async def _tokenize(self, inputs: list[_Input]) -> list[Tokens | int | Exception]:
        """Tokenize a batch of inputs, with one call of the model for all that are to be tokenized alike."""
        alike: dict[tuple[bool, str, Truncate, InputType | None], list[int]] = {}
        for index, one in enumerate(inputs):
            input_type = one.input_type if one.input_type in self.info.max_tokens_of else None
            alike.setdefault((isinstance(one.given, str), one.prompt, one.truncate, input_type), []).append(index)
        answers: list[Tokens | int | Exception] = [0] * len(inputs)
        for (_, prompt, truncate, input_type), members in alike.items():
            given: list[Any] = [inputs[index].given for index in members]
            made = await self.model.tokenize(given, prompt, truncate, input_type)
            for index, tokens in zip(members, made, strict=True):
                answers[index] = tokens
        return answers

    @staticmethod
    def _fitting(position: int, tokens: Tokens | int | Exception, limit: int) -> Tokens:
        """The tokens of an input. Raises the error of one that could not be tokenized, is too long or has none."""
        if isinstance(tokens, Exception):
            raise _located(tokens, position) from tokens
        if isinstance(tokens, int):
            message = f"has at least {tokens} tokens; the model reads at most {limit}"
            raise InvalidRequest(message, None, "context_length_exceeded", position)
        if len(tokens) == 0:
            raise InvalidRequest("holds nothing to embed", None, None, position)
        return tokens

    async def _forward(self, texts: list[_Text]) -> list[_Vector | Exception]:
        """Run a batch of texts. Returns a vector or an error for each."""
        started = self._clock()
        try:
            matrix = await self.model.forward([text.tokens for text in texts])  # (texts, dim) float32
        except (UpstreamFailed, Unavailable) as error:
            return [error] * len(texts)  # no text is at fault: smaller batches would fail as well
        seconds = self._clock() - started
        lengths = [len(text.tokens) for text in texts]
        padded = len(texts) * max(lengths) if self.model.pads else sum(lengths)
        stats = BatchStats(len(texts), sum(lengths), padded, seconds)
        self._forwards += 1
        self._texts += stats.texts
        self._tokens += stats.tokens
        self._padded_tokens += stats.padded_tokens
        self._forward_s += seconds
        if self._on_batch is not None:
            self._on_batch(stats)
        finite = np.isfinite(matrix).all(axis=1)
        return [
            _Vector(row, started - text.queued_at, seconds)
            if good
            else EmbeddingFailed("the model made a vector that is not finite")
            for text, row, good in zip(texts, matrix, finite.tolist(), strict=True)
        ]

    def check_health(self) -> None:
        """Raise Unavailable if the model's device is lost: only a new process can help."""
        if self.model.lost is not None:
            raise Unavailable(f"The model's device is lost: {self.model.lost}")

    async def split(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, timeout_s: float | None = None
    ) -> list[list[TextToken]]:
        """Tokenize texts without truncation. Returns the tokens of each text with their places in it.

        Args:
            timeout_s: no part of the texts is begun after this time; None for no limit.

        Raises:
            InvalidRequest: the text at `position` is empty or not Unicode; or the model is tokenized by its provider.
            DeadlineExceeded: `timeout_s` has passed, or the call has waited for its turn for `max_wait_s`.
        """
        self._check(EmbedRequest(list(texts)))
        answer = []
        deadline = self._deadline(timeout_s)
        for start, end in runs([len(text) for text in texts], _SPLIT_UNITS):
            async with self._turn_to_split(deadline):
                answer += await self.model.split(texts[start:end], add_special_tokens=add_special_tokens)
        return answer

    async def count_tokens(self, texts: Sequence[str], *, timeout_s: float | None = None) -> list[int]:
        """The number of tokens of each text, without special tokens and truncation. Raises what `split` does."""
        return [len(tokens) for tokens in await self.split(texts, add_special_tokens=False, timeout_s=timeout_s)]

    async def decode(
        self, ids: Sequence[Sequence[int]], *, skip_special_tokens: bool = True, timeout_s: float | None = None
    ) -> list[str]:
        """Turn lists of token ids into texts.

        Args:
            timeout_s: no part of the lists is begun after this time; None for no limit.

        Raises:
            InvalidRequest: the list at `position` is empty or holds a token id outside the vocabulary; or the model is
                tokenized by its provider.
            DeadlineExceeded: `timeout_s` has passed, or the call has waited for its turn for `max_wait_s`.
        """
        self._check(EmbedRequest([list(sequence) for sequence in ids]))
        answer = []
        deadline = self._deadline(timeout_s)
        for start, end in runs(map(len, ids), _SPLIT_UNITS):
            async with self._turn_to_split(deadline):
                answer += await self.model.decode(ids[start:end], skip_special_tokens=skip_special_tokens)
        return answer

    def _deadline(self, timeout_s: float | None) -> float:
        return math.inf if timeout_s is None else self._clock() + timeout_s

    @asynccontextmanager
    async def _turn_to_split(self, deadline: float) -> AsyncIterator[None]:
        """A context in which no other caller splits or decodes. Raises DeadlineExceeded if it does not begin in time.

        Args:
            deadline: of the engine's clock.
        """
        wait_s = min(deadline - self._clock(), math.inf if self._max_wait_s is None else self._max_wait_s)
        if wait_s <= 0:
            raise DeadlineExceeded("The deadline of the request has passed.")
        try:
            async with asyncio.timeout(wait_s if wait_s < math.inf else None):
                await self._splitting.acquire()
        except TimeoutError as error:
            raise DeadlineExceeded("The request waited in the queue until its deadline passed.") from error
        try:
            yield
        finally:
            self._splitting.release()

    async def warm_up(self) -> None:
        """Run batches of the shapes that will occur, up to the full budget, so that the first caller need not wait."""
        await self.model.warm_up(self._device.budget, self._device.in_flight)

    def stats(self) -> EngineStats:
        """A snapshot for metrics."""
        device = self._device
        return EngineStats(
            device.queued,
            device.queued_cost + self._untokenized,
            device.running,
            self._forwards,
            self._texts,
            self._tokens,
            self._padded_tokens,
            self._forward_s,
            self._failed_texts,
            device.drain_rate,
        )

    async def close(self) -> None:
        """Let the running forwards finish, answer queued requests with Unavailable, and release the model."""
        await self._tokenizer.close()
        await self._long_tokenizer.close()
        await self._device.close()
        await self.model.close()


class _TokenizerLimits(TypedDict):
    in_flight: int
    budget: int
    max_queued: int | None
    max_wait_s: float | None


def _tokenizer_limits(
    max_queued_tokens: int | None, max_wait_s: float | None
) -> tuple[_TokenizerLimits, _TokenizerLimits]:
    """The limits of the queue of short texts, and of the queue of long ones, which are tokenized one by one."""
    max_queued = None if max_queued_tokens is None else max_queued_tokens * CHARACTERS_PER_TOKEN
    return (
        {"in_flight": 1, "budget": _TOKENIZE_CHARACTERS, "max_queued": max_queued, "max_wait_s": max_wait_s},
        {"in_flight": 1, "budget": 1, "max_queued": max_queued, "max_wait_s": max_wait_s},
    )


def _at_most(count: int, select: _Select) -> _Select:
    """The selection without its youngest texts, if there are more than `count`."""
    return lambda waiting, budget: sorted(select(waiting, budget))[:count]


def _located(error: Exception, position: int) -> Exception:
    """The error of the text at `position`, as its caller gets it."""
    if isinstance(error, EmbeddingFailed | InvalidRequest):  # of one text that does not know its position
        return error.at(error.field, position)
    if isinstance(error, MemserveError):
        return error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return EmbeddingFailed(f"the model failed on this input: {reason}", None, None, position)
