"""The embedding engine: requests in, vectors out, batches by themselves.

Guarantees:
- A request's vectors are in the order of its inputs, whatever forwards they travelled in.
- A failure belongs to the request that caused it: bad input is refused before it joins a batch, a batch that fails is
  halved until only the culprit's request fails, and a vector that is not finite is an error, never an answer.
- Tokenizing runs beside the forward: the next batch is ready when the device is.
- The texts of a cancelled request leave before the forward.
- Admission counts tokens; past the limit a request is refused whole and at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from deployments.batcher import Batcher, oldest_first
from deployments.embedding.model import InputType, Model, ModelInfo, TextToken, Tokens, Truncate
from deployments.embedding.packing import pick, runs
from deployments.errors import EmbeddingFailed, InvalidRequest, MemserveError, Unavailable, UpstreamFailed

# Inputs are tokenized in groups of about this many characters, so that a huge request does not hold up a small one.
_TOKENIZE_CHARACTERS = 65_536
# Of ordinary text; what waits to be tokenized is bounded by it before its tokens are known.
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that a request spent; of its slowest text where texts differ.

    Attributes:
        queue_s: from tokenized to the start of the forward.
        tokenize_s: from arrival to tokenized.
        forward_s: of the forward that its text was in.
    """

    queue_s: float
    tokenize_s: float
    forward_s: float


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts, or lists of token ids (used verbatim), to be embedded alike.

    Attributes:
        inputs: at least one; none of them empty.
        prompt: put in front of each text; not of token ids.
        truncate: which end of a too long input is cut; with `none` the request is refused.
        input_type: what the inputs are: some models read more of a document than of a query.
    """

    inputs: list[str] | list[list[int]]
    prompt: str = ""
    truncate: Truncate = "end"
    input_type: InputType | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EmbedResult:
    """The answer to one request.

    Attributes:
        vectors: (n, dim) float32, C-contiguous, in the order of the inputs.
        tokens: (n,) int32, tokens the model read, special tokens included, padding not.
        truncated: (n,) bool.
        timings: where the time went.
    """

    vectors: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    timings: Timings


@dataclass(frozen=True, slots=True)
class BatchStats:
    """One forward: texts, their real tokens, tokens with padding, seconds."""

    texts: int
    tokens: int
    padded_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges and counters since the start, for metrics. `queued_tokens` are those that wait to be tokenized, too.

    `failed_texts` are those that got an error in place of a vector, not those that only shared a request with one.
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
    """A text on its way to the device."""

    tokens: Tokens
    queued_at: float


@dataclass(frozen=True, slots=True)
class _Vector:
    """A text's vector (dim,) float32 and its times."""

    row: np.ndarray
    queue_s: float
    forward_s: float


@dataclass(frozen=True, slots=True)
class _Input:
    """An input on its way to the tokenizer."""

    given: str | list[int]
    prompt: str
    truncate: Truncate
    input_type: InputType | None


class Engine:
    """Dynamic batching in front of one model. Belongs to one event loop.

    Args:
        model: local, remote or fake.
        max_batch_tokens: padded tokens of a batch; None for what suits the model's device.
        forwards_in_flight: forwards at a time; None for what suits the model's device.
        queue_enabled: False runs each request as a batch of its own, in the order of arrival: a baseline.
        max_queued_tokens: tokens that may wait before requests are refused; None for no limit.
        on_batch: told of every forward that succeeded.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_batch_tokens: int | None = None,
        forwards_in_flight: int | None = None,
        queue_enabled: bool = True,
        max_queued_tokens: int | None = None,
        on_batch: Callable[[BatchStats], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self._clock = clock
        self._on_batch = on_batch
        self._forwards = self._texts = self._tokens = self._padded_tokens = self._failed_texts = 0
        self._forward_s = 0.0
        self._tokenizer: Batcher[_Input, Tokens | int] = Batcher(
            self._tokenize,
            in_flight=1,
            budget=_TOKENIZE_CHARACTERS,
            cost=lambda one: len(one.prompt) + len(one.given),
            max_queued=None if max_queued_tokens is None else max_queued_tokens * _CHARACTERS_PER_TOKEN,
            bisect=True,
            clock=clock,
        )
        in_flight = forwards_in_flight or model.forwards_in_flight
        self._texts_queue: Batcher[_Text, _Vector] | None = None
        self._requests_queue: Batcher[list[_Text], list[_Vector | Exception]] | None = None
        self._device: Batcher[Any, Any]
        if queue_enabled:
            self._device = self._texts_queue = Batcher(
                self._forward,
                in_flight=in_flight,
                budget=max_batch_tokens or model.max_batch_tokens,
                cost=lambda text: len(text.tokens),
                select=pick if model.pads else oldest_first,
                max_queued=max_queued_tokens,
                bisect=True,
                clock=clock,
            )
        else:
            self._device = self._requests_queue = Batcher(
                self._forward_alone,
                in_flight=in_flight,
                budget=1,
                cost=lambda texts: sum(len(text.tokens) for text in texts),
                max_queued=max_queued_tokens,
                clock=clock,
            )

    @property
    def info(self) -> ModelInfo:
        """What is known of the model."""
        return self.model.info

    def reconfigure(
        self,
        *,
        max_batch_tokens: int | None = None,
        forwards_in_flight: int | None = None,
        max_queued_tokens: int | None = None,
    ) -> None:
        """Change the limits while it runs; None as in the constructor."""
        self._tokenizer.reconfigure(
            in_flight=1,
            budget=_TOKENIZE_CHARACTERS,
            max_queued=None if max_queued_tokens is None else max_queued_tokens * _CHARACTERS_PER_TOKEN,
        )
        self._device.reconfigure(
            in_flight=forwards_in_flight or self.model.forwards_in_flight,
            budget=(max_batch_tokens or self.model.max_batch_tokens) if self._texts_queue else 1,
            max_queued=max_queued_tokens,
        )

    async def embed(self, requests: Sequence[EmbedRequest]) -> list[EmbedResult | Exception]:
        """Embed many requests. Each gets its result or its own error; cancelling the call abandons them all."""
        answers = await asyncio.gather(*(self.embed_one(request) for request in requests), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, Exception):
                raise answer
        return answers  # type: ignore[return-value]

    async def embed_one(self, request: EmbedRequest) -> EmbedResult:
        """Embed one request; cancelling the call takes its texts out of the queue.

        Raises:
            InvalidRequest: `param` names the input: empty, a token id outside the vocabulary, or too long with
                truncate `none`.
            Overloaded: too many tokens wait.
            EmbeddingFailed: the model failed on one of these inputs alone, or its vector is not finite.
            UpstreamFailed: a remote model failed.
            Unavailable: the engine is closed.
        """
        self._check(request)
        # Before any work is done for it; by its tokens once they are known.
        self._device.admit(len(request.inputs) + self._tokenizer.queued_cost // _CHARACTERS_PER_TOKEN)
        arrived = self._clock()
        inputs = [_Input(given, request.prompt, request.truncate, request.input_type) for given in request.inputs]
        limit = self.info.limit(request.input_type)
        tokens = [self._fitting(*answer, limit) for answer in enumerate(await self._tokenizer.submit_all(inputs))]
        queued_at = self._clock()
        texts = [_Text(one, queued_at) for one in tokens]
        if self._texts_queue is not None:
            answers = await self._texts_queue.submit_all(texts)
        else:
            assert self._requests_queue is not None
            answers = await self._requests_queue.submit(texts)
        failed = [(index, answer) for index, answer in enumerate(answers) if isinstance(answer, Exception)]
        if failed:
            self._failed_texts += len(failed)
            index, error = failed[0]
            raise _error_of(error, index) from error
        vectors = cast(list[_Vector], answers)
        return EmbedResult(
            np.stack([vector.row for vector in vectors]),
            np.fromiter((len(one) for one in tokens), np.int32, len(tokens)),
            np.fromiter((one.truncated for one in tokens), np.bool_, len(tokens)),
            Timings(
                max(vector.queue_s for vector in vectors),
                queued_at - arrived,
                max(vector.forward_s for vector in vectors),
            ),
        )

    def _check(self, request: EmbedRequest) -> None:
        if not request.inputs:
            raise InvalidRequest("There is no input.", "input")
        vocab_size = self.info.vocab_size
        for index, given in enumerate(request.inputs):
            if not given:
                raise InvalidRequest("An input must not be empty.", f"input.{index}")
            if isinstance(given, str):
                try:
                    given.encode()
                except UnicodeEncodeError as error:
                    message = "An input is not valid Unicode: it holds half of a surrogate pair."
                    raise InvalidRequest(message, f"input.{index}") from error
            else:
                outside = next((token for token in cast(list[int], given) if not 0 <= token < vocab_size), None)
                if outside is not None:
                    raise InvalidRequest(
                        f"Token id {outside} is outside the vocabulary of {vocab_size} tokens.", f"input.{index}"
                    )

    async def _tokenize(self, inputs: list[_Input]) -> list[Tokens | int | Exception]:
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
    def _fitting(index: int, tokens: Tokens | int | Exception, limit: int) -> Tokens:
        if isinstance(tokens, Exception):
            raise _error_of(tokens, index) from tokens
        if isinstance(tokens, int):
            message = f"input.{index} has {tokens} tokens; the model reads at most {limit}."
            raise InvalidRequest(message, f"input.{index}", "context_length_exceeded")
        if len(tokens) == 0:
            raise InvalidRequest("There is nothing to embed in this input.", f"input.{index}")
        return tokens

    async def _forward_alone(self, requests: list[list[_Text]]) -> list[list[_Vector | Exception] | Exception]:
        answers: list[list[_Vector | Exception] | Exception] = []
        for texts in requests:
            try:
                answers.append(await self._forward(texts))
            except Exception as error:  # noqa: BLE001 - handed to the one who waits
                answers.append([error] * len(texts))
        return answers

    async def _forward(self, texts: list[_Text]) -> list[_Vector | Exception]:
        started = self._clock()
        try:
            matrix = await self.model.forward([text.tokens for text in texts])  # (texts, dim) float32
        except (UpstreamFailed, Unavailable) as error:
            return [error] * len(texts)  # nobody's fault here: smaller batches would fail as well
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
            else EmbeddingFailed("The model made a vector that is not finite.")
            for text, row, good in zip(texts, matrix, finite.tolist(), strict=True)
        ]

    def check_health(self) -> None:
        """Raises Unavailable when the model's device is lost, so that only a new process can help."""
        if self.model.lost is not None:
            raise Unavailable(f"The model's device is lost: {self.model.lost}")

    async def split(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[TextToken]]:
        """The tokens of each text with their places in it, uncut.

        Raises:
            InvalidRequest: a text is empty or not Unicode, with `param` naming it, or the tokenizer is not here.
        """
        self._check(EmbedRequest(list(texts)))
        answer = []
        for start, end in runs([len(text) for text in texts], _TOKENIZE_CHARACTERS):
            answer += await self.model.split(texts[start:end], add_special_tokens=add_special_tokens)
        return answer

    async def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each list of token ids, special tokens left out.

        Raises:
            InvalidRequest: a token id outside the vocabulary; `param` names the list. The tokenizer is not here.
        """
        self._check(EmbedRequest([list(sequence) for sequence in ids]))
        answer = []
        for start, end in runs(map(len, ids), _TOKENIZE_CHARACTERS):
            answer += await self.model.decode(ids[start:end])
        return answer

    async def warm_up(self) -> None:
        """Run the shapes that a batch can have, up to the full budget: the first caller does not pay for them."""
        budget = self._device.budget if self._texts_queue else self.model.max_batch_tokens
        await self.model.warm_up(budget, self._device.in_flight)

    def stats(self) -> EngineStats:
        """A snapshot for metrics."""
        device = self._device
        return EngineStats(
            device.queued,
            device.queued_cost + self._tokenizer.queued_cost // _CHARACTERS_PER_TOKEN,
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
        """Finish the running forwards; what waits gets Unavailable. Then release the model."""
        await self._tokenizer.close()
        await self._device.close()
        await self.model.close()


def _error_of(error: Exception, index: int) -> Exception:
    """What the caller is told about a text that failed."""
    if isinstance(error, EmbeddingFailed | InvalidRequest):  # a remote model refuses an input, without its number
        return type(error)(error.message, f"input.{index}", error.code)
    if isinstance(error, MemserveError):
        return error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return EmbeddingFailed(f"The model failed on this input: {reason}", f"input.{index}")
