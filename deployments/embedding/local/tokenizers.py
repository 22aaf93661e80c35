"""Tokenizes for a local model, with the tokenizer of its folder.

Token ids, truncation and prompt lengths are those of sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from deployments.embedding.local.spec import Spec
from deployments.embedding.model import InputType, TextToken, Tokens, Truncate


class Tokenizers:
    """Copies of a model's tokenizer: a tokenizer holds how it truncates as state, so each way has a copy of its own.

    Args:
        own: the model's tokenizer, of the library tokenizers.
        spec: limits and special tokens of the model.

    Attributes:
        whole: the copy that does not truncate.
    """

    def __init__(self, own: Tokenizer, spec: Spec) -> None:
        ways: tuple[Truncate, ...] = ("end", "start")
        limits = {spec.info.max_tokens, *spec.info.max_tokens_of.values()}
        self._spec = spec
        self.whole = _unpadded_copy(own)
        self._cut = {(way, limit): _truncating_copy(own, way, limit) for way in ways for limit in limits}

    def tokenize(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        prompt: str,
        truncate: Truncate,
        input_type: InputType | None = None,
    ) -> list[Tokens | int]:
        """See Model.tokenize."""
        limit = self._spec.info.limit(input_type)
        texts = [prompt + given for given in inputs if isinstance(given, str)]
        tokenizer = self.whole if truncate == "none" else self._cut[truncate, limit]
        encodings = iter(tokenizer.encode_batch_fast(texts) if texts else ())
        prompt_tokens = self._prompt_tokens(prompt, limit) if prompt and self._spec.pools_without_prompt else 0
        answer: list[Tokens | int] = []
        for given in inputs:
            if isinstance(given, str):
                encoding = next(encodings)
                ids, too_long = encoding.ids, len(encoding) >= limit and bool(encoding.overflowing)
            else:
                ids, too_long = list(given), len(given) > limit
            if len(ids) > limit and truncate == "none":
                answer.append(len(ids))
                continue
            cut = ids[-limit:] if truncate == "start" else ids[:limit]
            leading = prompt_tokens if isinstance(given, str) else 0
            if isinstance(given, str) and leading and too_long and truncate == "start":
                # The cut removes the prompt first, but not a special token in front of it, such as [CLS].
                dropped = len(self.whole.encode(prompt + given)) - limit
                leading = max(int(ids[0] in self._spec.special_ids), leading - dropped)
            answer.append(Tokens(cut, leading, too_long))
        return answer

    def _prompt_tokens(self, prompt: str, limit: int) -> int:
        # As sentence-transformers counts them: a special token at the end belongs to the text.
        ids = self._cut["end", limit].encode(prompt).ids
        return len(ids) - 1 if ids and ids[-1] in self._spec.special_ids else len(ids)

    def split(self, texts: list[str], add_special_tokens: bool) -> list[list[TextToken]]:
        """See Model.split."""
        encodings: list[Any] = self.whole.encode_batch(texts, add_special_tokens=add_special_tokens)
        return [
            [
                TextToken(token, text, bool(special), None if special else start, None if special else stop)
                for token, text, special, (start, stop) in zip(
                    encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
                )
            ]
            for encoding in encodings
        ]

    def decode(self, ids: list[list[int]]) -> list[str]:
        """See Model.decode."""
        return self.whole.decode_batch(ids)


def _unpadded_copy(own: Tokenizer) -> Tokenizer:
    copy = Tokenizer.from_str(own.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def _truncating_copy(own: Tokenizer, truncate: Truncate, limit: int) -> Tokenizer:
    """A copy that keeps at most `limit` tokens, special tokens included; `truncate` is the end that it cuts off."""
    copy = _unpadded_copy(own)
    copy.enable_truncation(limit, direction="right" if truncate == "end" else "left")
    return copy
