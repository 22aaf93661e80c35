"""Finds the part of a long text that is enough to tokenize it as the model reads it.

A model reads a few hundred tokens, and a text may have millions. If a text is cut at a place where the tokenizer
certainly divides it, the tokens of the part before the cut are the first tokens of the whole text, and the tokens of
the part behind it are the last ones. So a part that has more tokens than the model reads gives the same ids as the
whole text, truncated.

A place is certain if all of this holds:
- No step of the normaliser joins or removes the characters around it, whatever else is in the text.
- The pre-tokenizer splits there. The tokens of a word then depend on that word alone.
- No added token, such as `[SEP]`, can lie across it.

`Cuts.of` reads from the tokenizer which places these are, and knows the steps of common tokenizers. If it does not know
a step, there are no such places, and texts of that tokenizer are tokenized whole.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

_PUNCTUATION = r"!-/:-@\[-`{-~"
_IDEOGRAPHS = r"\u4e00-\u9fff"
# Letters that no normal form joins to a space beside them, and that every version of Unicode calls letters.
_LETTERS = (
    r"0-9A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u00ff\u0391-\u03a1\u03a3-\u03a9\u03b1-\u03c9\u0400-\u0481\u048a-\u0513"
    rf"\u05d0-\u05ea\u0621-\u063a\u0641-\u064a\u0905-\u0939\u3041-\u3096\u30a1-\u30fa{_IDEOGRAPHS}\uac00-\ud7a3"
)
# A single space between two words: the first character of the part behind the cut is the space.
_SPACE = rf"(?<=[{_PUNCTUATION}{_LETTERS}])(?= [{_PUNCTUATION}{_LETTERS}])"
# BERT makes a word of each punctuation mark and, if its normaliser is told to, of each ideograph.
_BETWEEN_MARKS = rf"(?<=[{_PUNCTUATION}])(?=[{_PUNCTUATION}])"
_BETWEEN_IDEOGRAPHS = rf"(?<=[{_IDEOGRAPHS}])(?=[{_IDEOGRAPHS}])"

_WINDOW = 4096  # characters that are searched for a place; a search holds the interpreter's lock

# Normalisers that change each character alone, or together with the combining characters behind it.
_LOCAL_NORMALIZERS = frozenset(
    {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Strip", "StripAccents"}
)
_SPLIT_AT_SPACES = frozenset({"BertPreTokenizer", "ByteLevel", "Metaspace", "Split", "Whitespace", "WhitespaceSplit"})
_OTHER_PRE_TOKENIZERS = frozenset({"Digits", "Punctuation"})
# Of cl100k, Llama 3 and Qwen. Each ends a word in front of a single space.
_KNOWN_PATTERNS = frozenset(
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}", r"\p{N}{1,3}")
)


@dataclass(frozen=True, slots=True)
class Cuts:
    """The places at which a tokenizer certainly divides a text.

    Attributes:
        place: matches at a place.
        before: matches up to the last place.
        both_ways: whether the part behind a place is tokenized as within the text, as the part before it always is.
    """

    place: re.Pattern[str]
    before: re.Pattern[str]
    both_ways: bool

    @staticmethod
    def of(tokenizer: Tokenizer) -> Cuts | None:
        """The places of a tokenizer, or None if none is certain."""
        steps = json.loads(tokenizer.to_str())
        normalizers = _flat(steps["normalizer"], "normalizers")
        pre_tokenizers = _flat(steps["pre_tokenizer"], "pretokenizers")
        if not all(map(_is_local, normalizers)) or not _splits_at_spaces(pre_tokenizers):
            return None
        added = {token["content"] for token in steps["added_tokens"]}
        if tokenizer.normalizer is not None:  # the text is searched for some of them after it was normalised
            added |= set(map(tokenizer.normalizer.normalize_str, added))
        if any(re.search(r"\S\s", content.strip()) for content in added):
            return None
        places = [_SPACE]
        kinds = [step["type"] for step in normalizers]
        if [step["type"] for step in pre_tokenizers] == ["BertPreTokenizer"] and "Replace" not in kinds:
            places.append(_BETWEEN_MARKS)
            if any(step["type"] == "BertNormalizer" and step["handle_chinese_chars"] for step in normalizers):
                places.append(_BETWEEN_IDEOGRAPHS)
        place = "|".join(place for place in places if not any(re.search(place, content) for content in added))
        strips_start = any(step["type"] == "Strip" and step["strip_left"] for step in normalizers)
        return Cuts(re.compile(place), re.compile(f"(?s:.+)(?:{place})"), not strips_start)

    def start_of(self, text: str, size: int) -> str | None:
        """A part of about `size` characters whose tokens are the first ones of `text`; None if no place was found."""
        found = self.before.match(text, max(0, size - _WINDOW), size)
        return None if found is None else text[: found.end()]

    def end_of(self, text: str, size: int) -> str | None:
        """A part of about `size` characters whose tokens are the last ones of `text`; None if no place was found."""
        start = len(text) - size
        found = self.place.search(text, start, start + _WINDOW) if self.both_ways else None
        return None if found is None else text[found.start() :]


def _flat(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a sequence, which may hold sequences, in order."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [one for inner in step[name] for one in _flat(inner, name)]
    return [step]


def _is_local(normalizer: dict[str, Any]) -> bool:
    """Whether a normaliser leaves a place as it is, and treats what is before it as if nothing were behind it."""
    if normalizer["type"] == "Replace":
        pattern, content = normalizer["pattern"], normalizer["content"]
        if "String" in pattern:
            return bool(content) and not re.search(r"\s", content + pattern["String"])
        return bool(pattern == {"Regex": " {2,}"})
    return normalizer["type"] in _LOCAL_NORMALIZERS


def _splits_at_spaces(pre_tokenizers: list[dict[str, Any]]) -> bool:
    """Whether a space between two words is where a word ends, for these steps one after the other."""
    if not pre_tokenizers:
        return False
    for step in pre_tokenizers:
        if step["type"] not in _SPLIT_AT_SPACES | _OTHER_PRE_TOKENIZERS:
            return False
        if step["type"] == "Split" and not _is_known(step):
            return False
    first = pre_tokenizers[0]
    if first["type"] == "ByteLevel":
        return bool(first.get("use_regex", True))
    if first["type"] == "Metaspace":
        return bool(first.get("split", True))
    return first["type"] in _SPLIT_AT_SPACES


def _is_known(split: dict[str, Any]) -> bool:
    return split["pattern"].get("Regex") in _KNOWN_PATTERNS and split["behavior"] == "Isolated" and not split["invert"]
