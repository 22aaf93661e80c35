"""What the engine needs of an embedding model, wherever it runs: tokenize, forward, and a few numbers about it.

A model answers in the order of its inputs, gives float32 vectors, and raises only errors of `deployments.errors` for
what a caller can mend. Its two methods are coroutines; blocking work runs in threads that the model owns.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from deployments.errors import InvalidRequest

Truncate = Literal["none", "end", "start"]
InputType = Literal["query", "document"]

_ELSEWHERE = "The tokenizer of this model is its provider's, and not here."


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a loaded model.

    Attributes:
        name: as configured.
        revision: changes whenever the vectors of what is read may: part of every cache key, as the limit is.
        dim: length of a full vector.
        max_tokens: longest input in tokens, special tokens included.
        vocab_size: token ids are in [0, vocab_size).
        prompts: prompt name -> text put in front of an input.
        default_prompt: what `encode` puts in front when no prompt is asked for; usually empty.
        max_tokens_of: of the input types that have a limit of their own.
        device: `cpu`, `cuda:0`, or `remote`.
        dtype: of the weights.
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

    @property
    def longest(self) -> int:
        """Tokens of the longest input of any type."""
        return max([self.max_tokens, *self.max_tokens_of.values()])

    def limit(self, input_type: InputType | None) -> int:
        """Tokens of the longest input of a type, special tokens included."""
        return self.max_tokens if input_type is None else self.max_tokens_of.get(input_type, self.max_tokens)


@dataclass(frozen=True, slots=True)
class Tokens:
    """One input, ready for the forward.

    Attributes:
        ids: token ids exactly as the model sees them, special tokens included.
        prompt_tokens: how many leading tokens belong to the prompt, for models that leave it out of the pooling.
        truncated: the input was longer than the model's limit and was cut.
        text: what a model that tokenizes elsewhere is sent; None where `ids` says it all.
    """

    ids: Sequence[int]
    prompt_tokens: int = 0
    truncated: bool = False
    text: str | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class TextToken:
    """One token of a text: `start` and `stop` are character offsets, None for a token that is not in the text."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class Model(ABC):
    """An embedding model.

    Attributes:
        info: see ModelInfo.
        max_batch_tokens: the padded tokens of a batch that suit its device.
        forwards_in_flight: how many forwards keep its device busy.
        lost: why no forward can succeed in this process any more; None while one can.
        pads: whether a batch is padded to its longest text; where not, its tokens are its real ones.
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
            inputs: texts, or lists of token ids that are inside the vocabulary and are used verbatim (no special tokens
                added, no prompt).
            prompt: put in front of each text.
            truncate: which end of a too long input is cut; with `none` it is not.
            input_type: what the inputs are; `ModelInfo.limit` says how long they may be.

        Returns:
            One an input: its Tokens or, with `none`, the token count of an input that is too long.
        """

    @abstractmethod
    async def forward(self, batch: Sequence[Tokens]) -> np.ndarray:
        """Run one batch. Returns (len(batch), dim) float32, C-contiguous, in the order of `batch`."""

    async def warm_up(self, max_batch_tokens: int, forwards: int) -> None:
        """Run what a batch can look like, up to the full budget, so that no caller pays for the first time.

        Args:
            max_batch_tokens: tokens of the largest batch.
            forwards: how many will be in flight.
        """
        limit, short = self.info.longest, min(16, self.info.longest)
        for length, texts in ((limit, max_batch_tokens // limit), (short, max_batch_tokens // short), (short, 1)):
            batch = [Tokens([0] * length)] * max(1, texts)
            await asyncio.gather(*(self.forward(batch) for _ in range(forwards)))

    async def split(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[TextToken]]:
        """The tokens of each text with their places in it, uncut.

        Raises:
            InvalidRequest: the tokenizer is not here.
        """
        raise InvalidRequest(_ELSEWHERE, None, "no_tokenizer")

    async def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each list of token ids, special tokens left out. Raises InvalidRequest as `split`."""
        raise InvalidRequest(_ELSEWHERE, None, "no_tokenizer")

    async def close(self) -> None:
        """Release threads and connections."""
        return None
