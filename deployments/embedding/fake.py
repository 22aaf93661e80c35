"""A model without weights, for tests and dry runs. It is deterministic and instant, and it records its batches.

The vector of a text is the normalised sum of one pseudo-random vector per word. So texts that share words are closer,
the same text gives the same bits on every machine, and a test can compute the vector that it expects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from deployments.embedding import token_ids
from deployments.embedding.model import InputType, Model, ModelInfo, TextToken, Tokens, Truncate

PROMPTS = {"query": "query: ", "document": ""}


def word_id(word: str, vocab_size: int) -> int:
    """The token id of a word, which is a hash of the word."""
    return int.from_bytes(hashlib.blake2b(word.lower().encode(), digest_size=8).digest(), "little") % vocab_size


class FakeModel(Model):
    """Each word is one token; there are no special tokens.

    Args:
        dim: length of a vector.
        max_tokens: words of the longest input.
        vocab_size: number of token ids.
        fail_word: a batch that holds this word raises RuntimeError, as a poisoned input would.
        nan_word: a text that holds this word gets a vector that is not finite.
        oom_above_tokens: a batch of more padded tokens raises MemoryError.

    Attributes:
        batches: for every forward, including failed ones, the lengths of its texts.
    """

    def __init__(
        self,
        dim: int = 32,
        *,
        max_tokens: int = 256,
        vocab_size: int = 1 << 20,
        name: str = "fake",
        fail_word: str = "poison",
        nan_word: str = "notanumber",
        oom_above_tokens: int | None = None,
    ) -> None:
        self.info = ModelInfo(name, f"fake-{dim}", dim, max_tokens, vocab_size, dict(PROMPTS), "cpu", "float32")
        self.batches: list[list[int]] = []
        self.oom_above_tokens = oom_above_tokens
        self._fail_id = word_id(fail_word, vocab_size)
        self._nan_id = word_id(nan_word, vocab_size)
        self._words: dict[int, np.ndarray] = {}

    async def tokenize(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        prompt: str,
        truncate: Truncate,
        input_type: InputType | None = None,
    ) -> list[Tokens | int]:
        """See Model. Words are separated by white space."""
        limit = self.info.limit(input_type)
        answer: list[Tokens | int] = []
        for given in inputs:
            if isinstance(given, str):
                ids = [word_id(word, self.info.vocab_size) for word in (prompt + given).split()]
            else:
                ids = list(given)
            if len(ids) > limit and truncate == "none":
                answer.append(len(ids))
                continue
            cut = token_ids.cut(ids, limit, truncate, self.info)
            prompt_tokens = len(prompt.split()) if isinstance(given, str) else 0
            answer.append(Tokens(cut, min(prompt_tokens, len(cut)), len(ids) > limit))
        return answer

    async def forward(self, batch: Sequence[Tokens]) -> np.ndarray:
        """See Model.

        Raises:
            RuntimeError: the batch holds `fail_word`.
            MemoryError: the batch has more than `oom_above_tokens` padded tokens.
        """
        lengths = [len(tokens) for tokens in batch]
        self.batches.append(lengths)
        if self.oom_above_tokens is not None and len(lengths) * max(lengths) > self.oom_above_tokens:
            raise MemoryError("the fake device is out of memory")
        if any(self._fail_id in tokens.ids for tokens in batch):
            raise RuntimeError("the fake model was told to fail on this text")
        return np.stack([self._vector(tokens.ids) for tokens in batch])

    def _vector(self, ids: Sequence[int]) -> np.ndarray:
        total = np.zeros(self.info.dim)  # (dim,) float64, so that the order of the sum does not show in float32
        for token in ids:
            word = self._words.get(token)
            if word is None:
                word = self._words[token] = np.random.default_rng(token).standard_normal(self.info.dim)
            total += word
        if self._nan_id in ids:
            total[0] = np.nan
        return (total / max(float(np.linalg.norm(total)), 1e-12)).astype(np.float32)

    async def warm_up(self, max_batch_tokens: int, forwards: int) -> None:
        """See Model. Does nothing: there is nothing to warm up, and `batches` stays empty."""

    async def split(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[TextToken]]:
        """See Model."""
        answer = []
        for text in texts:
            tokens, place = [], 0
            for word in text.split():
                start = text.index(word, place)
                place = start + len(word)
                token = word_id(word, self.info.vocab_size)
                tokens.append(TextToken(id=token, text=word, special=False, start=start, stop=place))
            answer.append(tokens)
        return answer

    async def decode(self, ids: Sequence[Sequence[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """See Model. A hash cannot be reversed, so each id is written as `<id>`. The largest id counts as special."""
        special = self.info.vocab_size - 1 if skip_special_tokens else None
        return [" ".join(f"<{token}>" for token in sequence if token != special) for sequence in ids]


class FakeReranker(FakeModel):
    """A cross-encoder without weights: the logit of a text is the number of its words that the query has.

    Queries and texts are tokenized as by FakeModel, and the words `poison` and `notanumber` do the same.

    Attributes:
        batches: for every forward, including failed ones, the tokens of its pairs.
    """

    def __init__(self, *, max_tokens: int = 256, name: str = "fake-reranker") -> None:
        super().__init__(2, max_tokens=max_tokens, name=name)

    async def tokenize(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        prompt: str,
        truncate: Truncate,
        input_type: InputType | None = None,
    ) -> list[Tokens | int]:
        """See Model. The query is kept whole."""
        texts = [f" {text}" if isinstance(text, str) else text for text in inputs]
        return await super().tokenize(texts, prompt, truncate, input_type)  # type: ignore[arg-type]

    async def forward(self, batch: Sequence[Tokens]) -> np.ndarray:
        """Score a batch. Returns (batch, 2) float32: the logits' logistic function, and the logits."""
        await super().forward(batch)
        logits = np.array([self._logit(tokens) for tokens in batch])
        return np.stack([1 / (1 + np.exp(-logits)), logits], axis=1).astype(np.float32)

    def _logit(self, tokens: Tokens) -> float:
        query, text = set(tokens.ids[: tokens.prompt_tokens]), tokens.ids[tokens.prompt_tokens :]
        return float("nan") if self._nan_id in text else float(sum(token in query for token in text))
