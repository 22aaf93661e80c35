"""Tokenizes for a local model, with the tokenizer of its folder.

Token ids, truncation and prompt lengths are those of sentence-transformers. Of a long text only the part that the model
can read is tokenized, if parts.py finds a part that certainly gives the same ids.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from tokenizers import Encoding, Tokenizer

from deployments.embedding import token_ids
from deployments.embedding.local.parts import Cuts
from deployments.embedding.local.spec import Spec
from deployments.embedding.model import InputType, TextToken, Tokens, Truncate

logger = logging.getLogger("memserve.embedding")

_CHARACTERS_PER_TOKEN = 8  # in the first part that is tried: nearly every text has more tokens than that
_GROWTH = 4  # of a part that has too few tokens


class Tokenizers:
    """Copies of a model's tokenizer: a tokenizer holds how it truncates as state, so each way has a copy of its own.

    Args:
        own: the model's tokenizer, of the library tokenizers.
        spec: limits and special tokens of the model.

    Attributes:
        whole: the copy that does not truncate.
    """

    _ways: ClassVar[tuple[Truncate, ...]] = ("end", "start")

    def __init__(self, own: Tokenizer, spec: Spec) -> None:
        limits = {spec.info.max_tokens, *spec.info.max_tokens_of.values()}
        self._spec = spec
        self.whole = _unpadded_copy(own)
        self._cuts = Cuts.of(self.whole)
        if self._cuts is None:
            name = spec.info.name
            logger.info("%s tokenizes long texts whole: it is not known where its tokenizer divides a text", name)
        self._cut = {(way, limit): _truncating_copy(own, way, limit) for way in self._ways for limit in limits}

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
        prompt_tokens = self._prompt_tokens(prompt, limit) if prompt and self._spec.pools_without_prompt else 0
        encodings = iter(self._encode(texts, truncate, limit))
        answer: list[Tokens | int] = []
        for given in inputs:
            if isinstance(given, str):
                encoding = next(encodings)
                ids, too_long = encoding.ids, _is_cut(encoding, limit)
            else:
                ids, too_long = list(given), len(given) > limit
            if len(ids) > limit and truncate == "none":
                answer.append(len(ids))
                continue
            cut = token_ids.cut(ids, limit, truncate, self._spec.info)
            leading = prompt_tokens if isinstance(given, str) else 0
            if isinstance(given, str) and leading and too_long and truncate == "start":
                # The cut removes the prompt first, but not a special token in front of it, such as [CLS].
                (known,) = self._encode([prompt + given], "none", limit + leading)
                dropped = len(known) - limit  # or fewer than there were, but then more than `leading`
                leading = max(int(ids[0] in self._spec.special_ids), leading - dropped)
            answer.append(Tokens(cut, leading, too_long))
        return answer

    def _encode(self, texts: list[str], truncate: Truncate, limit: int) -> list[Encoding]:
        """Encodings with the ids of the whole texts.

        With `none`, the encoding of a text of more than `limit` tokens may end before the text does, but not before it
        has more than `limit` tokens.
        """
        if truncate == "none":
            return self._encode_parts(self.whole, texts, truncate, limit, lambda encoding: len(encoding) > limit)
        cut = self._cut[truncate, limit]
        return self._encode_parts(cut, texts, truncate, limit, lambda encoding: _is_cut(encoding, limit))

    def _encode_parts(
        self,
        tokenizer: Tokenizer,
        texts: list[str],
        truncate: Truncate,
        limit: int,
        is_enough: Callable[[Encoding], bool],
        *,
        add_special_tokens: bool = True,
    ) -> list[Encoding]:
        """The encoding of each text, or of a part of it that `is_enough`. `truncate` is the end that is not read."""
        done: dict[int, Encoding] = {}
        size = limit * _CHARACTERS_PER_TOKEN
        while len(done) < len(texts):
            parts = {
                index: part
                for index, text in enumerate(texts)
                if index not in done and (part := self._part(text, truncate, size)) is not None
            }
            given = list(parts.values())
            encodings = tokenizer.encode_batch_fast(given, add_special_tokens=add_special_tokens) if parts else []
            for (index, part), encoding in zip(parts.items(), encodings, strict=True):
                if is_enough(encoding) or len(part) == len(texts[index]):
                    done[index] = encoding
            size *= _GROWTH
        return [done[index] for index in range(len(texts))]

    def _part(self, text: str, truncate: Truncate, size: int) -> str | None:
        """About `size` characters of a text, or all if it is not longer; None if there is no place to cut it."""
        if len(text) <= size or self._cuts is None:
            return text
        return self._cuts.end_of(text, size) if truncate == "start" else self._cuts.start_of(text, size)

    def _prompt_tokens(self, prompt: str, limit: int) -> int:
        # As sentence-transformers counts them: a special token at the end belongs to the text.
        ids = self._cut["end", limit].encode(prompt).ids
        return len(ids) - 1 if ids and ids[-1] in self._spec.special_ids else len(ids)

    def split(self, texts: list[str], add_special_tokens: bool) -> list[list[TextToken]]:
        """See Model.split."""
        encodings: list[Any] = self.whole.encode_batch(texts, add_special_tokens=add_special_tokens)
        return [
            [
                TextToken(
                    id=token,
                    text=text,
                    special=bool(special),
                    start=None if special else start,
                    stop=None if special else stop,
                )
                for token, text, special, (start, stop) in zip(
                    encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
                )
            ]
            for encoding in encodings
        ]

    def decode(self, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        """See Model.decode."""
        return self.whole.decode_batch(ids, skip_special_tokens)


def _is_cut(encoding: Encoding, limit: int) -> bool:
    return len(encoding) >= limit and bool(encoding.overflowing)


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
