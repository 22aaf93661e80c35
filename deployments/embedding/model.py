"""What the engine needs from an embedding model, wherever it runs: `tokenize`, `forward`, and some facts about it.

A cross-encoder is such a model too: its prompt is the query, its inputs are the texts that are scored for the query,
and the vector of a text is its score and its logit.

A model answers in the order of its inputs and gives float32 vectors. If a caller can correct a mistake, it raises an
error of `deployments.errors`. Its methods are coroutines; blocking work runs in threads that the model owns.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import numpy as np

from deployments.errors import InvalidRequest

Truncate = Literal["none", "end", "start"]
InputType = Literal["query", "document"]

_ELSEWHERE = "This model is tokenized by its provider: its tokenizer is not available here."


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about a loaded model.

    Attributes:
        name: as configured.
        revision: changes whenever the vector of the same tokens may change. It is part of every cache key, as is the
            limit of tokens.
        dim: length of a full vector.
        max_tokens: longest input in tokens, special tokens included.
        vocab_size: token ids are in [0, vocab_size).
        prompts: prompt name -> text put in front of an input.
        device: `cpu`, `cuda:0`, or `remote`.
        dtype: of the weights.
        default_prompt: the text that `encode` puts in front if no prompt is requested; usually empty.
        max_tokens_of: the limits of the input types that have their own.
        first_ids, last_ids: the special tokens that the model's tokenizer puts in front of a text and behind it; empty
            if it puts none, or if the model is tokenized by its provider.
    """

    name: str
    revision: str
    dim: int
    max_tokens: int
    vocab_size: int
    prompts: dict[str, str]
    device: str
    dtype: str
    default_prompt: str = ""
    max_tokens_of: dict[InputType, int] = field(default_factory=dict)
    first_ids: tuple[int, ...] = ()
    last_ids: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest input of any type, special tokens included."""
        return max([self.max_tokens, *self.max_tokens_of.values()])

    def limit(self, input_type: InputType | None) -> int:
        """Tokens of the longest input of this type, special tokens included."""
        return self.max_tokens if input_type is None else self.max_tokens_of.get(input_type, self.max_tokens)


@dataclass(frozen=True, slots=True)
class Tokens:
    """One input, ready for the forward.

    Attributes:
        ids: token ids exactly as the model reads them, special tokens included.
        prompt_tokens: the number of leading tokens that belong to the prompt, for models that leave it out of the
            pooling; of a pair, to its first part and the special tokens behind it.
        truncated: whether the input was longer than the model's limit and was cut.
        text: the text to send to a model that is tokenized by its provider; None if `ids` are sent.
    """

    ids: Sequence[int]
    prompt_tokens: int = 0
    truncated: bool = False
    text: str | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.ids)


class TextToken(TypedDict):
    """One token of a text. `start` and `stop` are character offsets, or None if the token is not in the text.

    A dict, since those of 65,536 tokens are pickled in 17 ms and written as JSON in 6: instances of a class took 240
    and 50.
    """

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class Model(ABC):
    """An embedding model.

    Attributes:
        info: see ModelInfo.
        max_batch_tokens: the tokens of a batch that suit its device, with padding if the model pads.
        forwards_in_flight: the number of forwards that keeps its device busy.
        pads: whether a batch is padded to its longest text.
        lost: why no forward can succeed any more in this process; None while forwards can succeed.
    """

    info: ModelInfo
    max_batch_tokens: int = 1024
    forwards_in_flight: int = 1
    pads: bool = True
    lost: str | None = None

    @abstractmethod
    async def tokenize(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        prompt: str,
        truncate: Truncate,
        input_type: InputType | None = None,
    ) -> list[Tokens | int]:
        """Make inputs ready for the forward.

        Args:
            inputs: texts, or lists of token ids. Token ids must be inside the vocabulary and are used verbatim: no
                special tokens and no prompt are added.
            prompt: put in front of each text. A cross-encoder makes a pair of it and each text.
            truncate: the end at which an input that is too long is cut; with `none` it is not cut.
            input_type: what the inputs are; `ModelInfo.limit` says how long they may be.

        Returns:
            For each input its Tokens or, if it is too long and `truncate` is `none`, a number of tokens that it has at
            least, and that is larger than the limit.
        """

    @abstractmethod
    async def forward(self, batch: Sequence[Tokens]) -> np.ndarray:
        """Run one batch. Returns (len(batch), dim) float32, C-contiguous, in the order of `batch`."""

    async def warm_up(self, max_batch_tokens: int, forwards: int) -> None:
        """Run batches of typical shapes, up to the full budget, so that the first callers need not wait for set-up.

        Args:
            max_batch_tokens: tokens of the largest batch.
            forwards: the number of forwards that will be in flight.
        """
        limit, short = self.info.longest, min(16, self.info.longest)
        for length, texts in ((limit, max_batch_tokens // limit), (short, max_batch_tokens // short), (short, 1)):
            batch = [Tokens([0] * length)] * max(1, texts)
            await asyncio.gather(*(self.forward(batch) for _ in range(forwards)))

    async def split(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[TextToken]]:
        """Tokenize texts without truncation. Returns the tokens of each text with their places in it.

        Raises:
            InvalidRequest: the model is tokenized by its provider.
        """
        raise InvalidRequest(_ELSEWHERE, None, "no_tokenizer")

    async def decode(self, ids: Sequence[Sequence[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """Turn lists of token ids into texts. Raises InvalidRequest as `split` does."""
        raise InvalidRequest(_ELSEWHERE, None, "no_tokenizer")

    async def close(self) -> None:
        """Release threads and connections."""
        return None
