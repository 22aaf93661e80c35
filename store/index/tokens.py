"""The words of a text, as hashes of 64 bits.

Case and accents are folded, and English words are reduced to their stem. Scripts that put no spaces between words are
cut into overlapping pairs of characters. Of a text only the first 200,000 characters are read. Frequent English words
(`the`, `what`, `is`) do not count in a query, unless it has no other words.

Guarantees: the same text has the same hashes in every process with the same `VERSION`. This module keeps no word as
text.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from importlib.metadata import version
from itertools import groupby

import numpy as np
import numpy.typing as npt
import Stemmer

from store.log.reading import TEXT_READ

VERSION = f"2, PyStemmer {version('pystemmer')}, Unicode {unicodedata.unidata_version}"
"""Changes if the words of a text may have other hashes."""

_STEMMER = Stemmer.Stemmer("english", 0)  # its own cache would keep words as text
# Combining marks in a row; more are left out, as in the stream-safe format of Unicode (UAX 15). Normalisation sorts
# them in a time that grows with the square of their number.
_MAX_MARKS = 30
_PIECE = 1_000_000  # characters of texts that are split at once
_MAX_WORD = 64  # characters of a word; a longer one is cut
_MAX_KNOWN = 200_000  # words whose hash is remembered, 100 bytes each

_UNSPACED = (  # Thai and Lao, Myanmar, Khmer, kana, Han
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003fffd"
)
_PARTS = re.compile(f"([{_UNSPACED}]+)|[^ {_UNSPACED}]+")
_END = "\0"  # follows each text in a list of words; no text of a memory has it
_END_KEY = 0
_NONE = np.zeros(0, np.int64)
_ASCII = bytes(ord(chr(n).lower()) if chr(n).isalnum() or chr(n) == _END else ord(" ") for n in range(128)) + bytes(128)
"""From each ASCII character to what stands for it in a folded text."""


STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
    a about after again all also am an and any are aren as at be because been before being between both but by
    can cannot could couldn d did didn do does doesn doing don down during each few for from further had hadn
    has hasn have haven having he her here hers herself him himself his how i if in into is isn it its itself
    just ll m me more most my myself no nor not now o of off on once only or other our ours ourselves out over
    own re s same shall she should shouldn so some such t than that the their theirs them themselves then there
    these they this those through to too under until up ve very was wasn we were weren what when where which
    while who whom whose why will with won would wouldn y you your yours yourself yourselves
    """,
    )
)


class _Folding(dict[int, str]):
    """From a code point of a decomposed, case-folded text to what stands for it: itself, nothing, or a space."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        # Accents of the Latin, Greek and Cyrillic scripts, and the vowel signs of Hebrew and Arabic.
        optional = 0x300 <= code <= 0x36F or 0x591 <= code <= 0x5C7 or 0x64B <= code <= 0x65F or code == 0x670
        folded = "" if optional else char if unicodedata.category(char)[0] in "LMN" else " "
        self[code] = folded
        return folded


_folding = _Folding()
_known: dict[int, int] = {}  # from Python's hash of a word, which is another in each process, to its key


def keys_of(text: str) -> list[int]:
    """The key of each word of a text, in order."""
    keys, _ = keys_of_all([text.replace(_END, " ")])
    found: list[int] = keys.tolist()
    return found


def keys_of_all(texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The keys (words,) of the words of texts without NUL, in order, and the number of words of each text (texts,)."""
    found = [_keys_of_some(piece) for piece in _pieces([text[:TEXT_READ] for text in texts])]
    return np.concatenate([_NONE, *(keys for keys, _ in found)]), np.concatenate([_NONE, *(each for _, each in found)])


def _pieces(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in pieces of about `_PIECE` characters: the words of a piece are in memory at once, as text."""
    first = size = 0
    for n, text in enumerate(texts):
        size += len(text)
        if size >= _PIECE:
            yield texts[first : n + 1]
            first, size = n + 1, 0
    if first < len(texts):
        yield texts[first:]


def _keys_of_some(texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    words: list[str] = []
    for is_ascii, group in groupby(texts, str.isascii):
        if is_ascii:  # all at once: a call for each text would take longer than what it does
            words += f" {_END} ".join([*group, ""]).encode("ascii").translate(_ASCII).decode("ascii").split()
        else:
            for text in group:
                words += [*_unicode_words(text), _END]
    keys = {word: _remembered(word) for word in dict.fromkeys(words) if word != _END}
    keys[_END] = _END_KEY
    found = np.fromiter(map(keys.__getitem__, words), np.int64, len(words))
    ends = np.flatnonzero(found == _END_KEY)
    return np.delete(found, ends), np.diff(ends, prepend=-1) - 1


def query_keys(query: str) -> Counter[int]:
    """How often each word of a query occurs in it, by its key; without stop words, unless it has no other words."""
    keys = keys_of(query)
    return Counter([key for key in keys if key not in _STOP_KEYS] or keys)


def _remembered(word: str) -> int:
    """The key of a word that is folded."""
    known = hash(word)
    key = _known.get(known)
    if key is None:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        key = _known[known] = _key(word)
    return key


def _unicode_words(text: str) -> list[str]:
    """The words of a text, folded, in order."""
    text = _MANY_MARKS.sub(r"\1", text)
    folded = unicodedata.normalize("NFKD", text).casefold().translate(_folding)
    words: list[str] = []
    for match in _PARTS.finditer(unicodedata.normalize("NFC", folded)):
        word = match[0]
        if match[1] and len(word) > 1:
            words += [word[at : at + 2] for at in range(len(word) - 1)]
        else:
            words.append(word)
    return words


def _key(word: str) -> int:
    word = word[:_MAX_WORD]
    stem = _STEMMER.stemWord(word) if word.isascii() and word.isalpha() and word not in STOP_WORDS else word
    return int.from_bytes(blake2b(stem.encode(), digest_size=8).digest(), "little", signed=True)


_MARKS = "".join(mark for mark in map(chr, range(0x20000)) if unicodedata.combining(mark))
_MANY_MARKS = re.compile(f"([{_MARKS}]{{{_MAX_MARKS}}})[{_MARKS}]+")
_STOP_KEYS = frozenset(map(_key, STOP_WORDS))
