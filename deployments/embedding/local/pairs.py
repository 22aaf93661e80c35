"""Tokenizes pairs for a cross-encoder: a query with each of many texts.

Token ids, token types and truncation are those of CrossEncoder (`longest_first`), but the query is tokenized once for
all texts of a call. Of a long text only a part is tokenized, as in tokenizers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from tokenizers import Tokenizer

from deployments.embedding.local.spec import Spec
from deployments.embedding.local.tokenizers import Tokenizers
from deployments.embedding.model import InputType, Tokens, Truncate
from deployments.errors import InvalidRequest, ModelUnavailable


class Frame(NamedTuple):
    """The special tokens in front of the parts of a pair, between them, and behind them."""

    first: list[int]
    middle: list[int]
    last: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Frame | None:
        """The frame that a tokenizer puts around a pair; None if it does not mark the parts as `Tokens` does.

        Token types are 0 in front of the second part and 1 from there, or all 0.
        """
        encoding = tokenizer.encode("a", "b")
        ids, parts = encoding.ids, encoding.sequence_ids
        places = [[place for place, part in enumerate(parts) if part == which] for which in (0, 1)]
        if not all(places) or places[0][-1] > places[1][0]:
            return None
        (first, end_of_first), (second, end_of_second) = ((part[0], part[-1] + 1) for part in places)
        types = [int(place >= second) for place in range(len(ids))]
        if encoding.type_ids not in (types, [0] * len(ids)):
            return None
        return cls(ids[:first], ids[end_of_first:second], ids[end_of_second:])


class Pairs(Tokenizers):
    """See the module.

    Args:
        own: the model's tokenizer, of the library tokenizers.
        spec: limits and special tokens of the model.

    Raises:
        ModelUnavailable: the tokenizer puts together a pair in a way that is not supported.
    """

    _ways: ClassVar[tuple[Truncate, ...]] = ()  # pairs are cut here

    def __init__(self, own: Tokenizer, spec: Spec) -> None:
        super().__init__(own, spec)
        frame = Frame.of(self.whole)
        if frame is None:
            raise ModelUnavailable(f"The tokenizer of the model {spec.info.name!r} does not make pairs of texts.")
        self._frame = frame

    def tokenize(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        prompt: str,
        truncate: Truncate,
        input_type: InputType | None = None,
    ) -> list[Tokens | int]:
        """Pair `prompt`, which is the query, with each input. See Model.tokenize.

        Raises:
            InvalidRequest: an input is not a text.
        """
        first, middle, last = self._frame
        added = len(first) + len(middle) + len(last)
        room = self._spec.info.limit(input_type) - added
        query = self.whole.encode(prompt, add_special_tokens=False).ids
        texts = [given for given in inputs if isinstance(given, str)]
        if len(texts) < len(inputs):
            raise InvalidRequest("must be a text: token ids make no pair", None, "token_ids_refused")
        answer: list[Tokens | int] = []
        # Which part is cut depends on which is longer, so a text is read until it is longer than the query.
        for ids in self._ids_of(texts, truncate, max(room, len(query))):
            too_long = len(query) + len(ids) > room
            if too_long and truncate == "none":
                answer.append(len(query) + len(ids) + added)
                continue
            of_query, of_text = longest_first(len(query), len(ids), room)
            if truncate == "start":
                kept = query[len(query) - of_query :], ids[len(ids) - of_text :]
            else:
                kept = query[:of_query], ids[:of_text]
            pair = [*first, *kept[0], *middle, *kept[1], *last]
            answer.append(Tokens(pair, len(first) + of_query + len(middle), too_long))
        return answer

    def _ids_of(self, texts: list[str], truncate: Truncate, enough: int) -> list[list[int]]:
        """The token ids of each text without special tokens. If they are more than `enough`, some may be missing."""
        encodings = self._encode_parts(
            self.whole,
            texts,
            truncate,
            self._spec.info.max_tokens,
            lambda encoding: len(encoding) > enough,
            add_special_tokens=False,
        )
        return [encoding.ids for encoding in encodings]


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """The tokens that are kept of each part of a pair: the longer one is cut first, as the library tokenizers does.

    Args:
        first, second: tokens of the parts.
        room: the most tokens of both together; negative if not even the special tokens fit.
    """
    shorter, longer = sorted((first, second))
    if shorter + longer > room:
        longer = max(shorter, room - shorter)
        if shorter + longer > room:
            shorter = max(0, room) // 2
            longer = max(0, room) - shorter
    return (shorter, longer) if first <= second else (longer, shorter)
