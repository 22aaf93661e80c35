"""Tokenizing a part of a long text gives the ids that tokenizing all of it and truncating gives."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from deployments.embedding.local.parts import _KNOWN_PATTERNS, Cuts
from deployments.embedding.local.spec import Spec
from deployments.embedding.local.tokenizers import Tokenizers
from deployments.embedding.model import ModelInfo, Tokens, Truncate
from tests.repetitions import repetitions

LIMIT = 12
CORPUS = (
    "The quick brown fox jumps over the lazy dog, 42 times. Don't stop!",
    "Съешь же ещё этих мягких французских булок; ελληνικά γράμματα",
    "我能吞下玻璃而不伤身体。私はガラスを食べられます。한국어 텍스트 예시",
    "<b>x</b> == y[0]; foo_bar(baz) -> '' `` \"quoted\" ... --- !!!",
    "naïve café Ångström e\u0301 \u1e9b\u0323 ﬁ ½ Ⅷ ｆｕｌｌ",
)


def _trained(model: Any, trainer: Any, normalizer: Any, pre_tokenizer: Any, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    first, last = (tokenizer.token_to_id(token) for token in special[:2])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A {special[1]}", special_tokens=[(special[0], first), (special[1], last)]
    )
    return tokenizer


def _byte_level(pre_tokenizer: Any, normalizer: Any = None, special: list[str] | None = None) -> Tokenizer:
    special = special or ["<s>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer = _trained(models.BPE(), trainer, normalizer, pre_tokenizer, special)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _unigram(pre_tokenizer: Any, *steps: Any) -> Tokenizer:
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    return _trained(models.Unigram(), trainer, normalizers.Sequence(list(steps)), pre_tokenizer, special)


def _word_piece(normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    special = ["[CLS]", "[SEP]", "[UNK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    return _trained(
        models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=6), trainer, normalizer, pre_tokenizer, special
    )


def _roberta() -> Tokenizer:
    tokenizer = _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.add_tokens([AddedToken("fox", rstrip=True, lstrip=True), AddedToken("dog", single_word=True)])
    return tokenizer


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def _minilm() -> Tokenizer:
    from deployments.embedding.load import DEFAULT_MODEL, resolve

    return Tokenizer.from_file(str(Path(resolve(DEFAULT_MODEL)) / "tokenizer.json"))


def _with_token(content: str) -> Tokenizer:
    tokenizer = _word_piece(normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer())
    tokenizer.add_tokens([content])
    return tokenizer


_SPACES = normalizers.Replace(Regex(" {2,}"), " ")
CUT = {
    "minilm": _minilm(),
    "word piece": _word_piece(normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
    "word piece, cased": _word_piece(
        normalizers.BertNormalizer(lowercase=False, handle_chinese_chars=False), pre_tokenizers.BertPreTokenizer()
    ),
    "word piece, white space": _word_piece(normalizers.NFKC(), pre_tokenizers.Whitespace()),
    "added mark": _with_token("!!"),
    "gpt2": _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "modernbert": _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC()),
    "roberta": _roberta(),
    "qwen": _byte_level(_split(sorted(_KNOWN_PATTERNS)[0]), normalizers.NFC()),
    "llama3": _byte_level(_split(sorted(_KNOWN_PATTERNS)[1])),
    "xlm-roberta": _unigram(
        pre_tokenizers.Metaspace(), normalizers.Nmt(), normalizers.NFKC(), normalizers.Strip(False, True), _SPACES
    ),
    "albert": _unigram(
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        normalizers.Replace("``", '"'),
        normalizers.NFKD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        _SPACES,
    ),
    "t5": _unigram(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]), normalizers.NFKC()
    ),
    "strip": _unigram(pre_tokenizers.Metaspace(), normalizers.Strip()),
}
# These read a text to its end.
WHOLE = {
    "no pre-tokenizer": _unigram(None, normalizers.NFKC()),
    "one word": _unigram(pre_tokenizers.Metaspace(split=False), normalizers.NFKC()),
    "no spaces left": _unigram(pre_tokenizers.Metaspace(), normalizers.Replace(" ", "▁")),
    "spaces made": _word_piece(normalizers.Replace(".", " "), pre_tokenizers.BertPreTokenizer()),
    "other pattern": _byte_level(_split(r"\w+|\W+")),
    "bytes without words": _byte_level(pre_tokenizers.ByteLevel(use_regex=False)),
    "scripts": _unigram(pre_tokenizers.UnicodeScripts(), normalizers.NFKC()),
    "token with a space": _with_token("quick brown"),
    "token that is normalised to one with a space": _with_token("我能"),
}

WORDS = st.sampled_from(
    [
        *" \n\t\r.,!'-_=<>[]()\"`\0\x07\ufffd\u00a0\u3000\u2581",
        *"aZ9ßéΣσ我能。カ한é½ﷺﬁ\u0301\u0338\u0308\u200d\u0e33\u037a",
        "🙂", "👩\u200d👩\u200d👧", "🇩🇪", "the ", " fox", "fox ", "dog", "don't", "'ll ", "Ångström", "x y", "  ", "``",
        "[SEP]", "[CLS] ", "<mask>", " <mask> ", "</s>", "!!", "quick brown", "булок ", "unaffordability", "123456789",
    ]
)  # fmt: skip
TEXTS = (
    st.lists(WORDS, max_size=400).map("".join)
    | st.lists(WORDS, min_size=1, max_size=8).map(lambda words: "".join(words) * 40)
    | st.text(max_size=300)
    | st.lists(st.sampled_from(["the", "lazy", "dog", "我能", "over", "42", "."]), max_size=200).map(" ".join)
)


def tokenizers_of(own: Tokenizer, limit: int = LIMIT) -> Tokenizers:
    return Tokenizers(own, _spec(own, limit, pools_without_prompt=False))


def _spec(own: Tokenizer, limit: int, *, pools_without_prompt: bool) -> Spec:
    info = ModelInfo("tiny", "1", 4, limit, own.get_vocab_size(), {}, "cpu", "float32")
    special = frozenset(own.encode("").ids)
    return Spec(info, torch.device("cpu"), torch.float32, special, 0, 0, pools_without_prompt)


@cache
def _parts_and_whole(name: str) -> tuple[Tokenizers, Tokenizers]:
    """The tokenizers of a model, and the same made to read every text to its end. Copying a vocabulary takes long."""
    parts, whole = (tokenizers_of((CUT | WHOLE)[name]) for _ in range(2))
    whole._cuts = None
    return parts, whole


def set_limit(tokenizers: Tokenizers, own: Tokenizer, limit: int, *, pools_without_prompt: bool) -> None:
    """Give tokenizers that were made of `own` the state that they would have if they had been made with this limit."""
    tokenizers._spec = _spec(own, limit, pools_without_prompt=pools_without_prompt)
    tokenizers._cut = {(way, limit): copy for (way, _), copy in tokenizers._cut.items()}
    for (way, _), copy in tokenizers._cut.items():
        copy.enable_truncation(limit, direction="right" if way == "end" else "left")


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
@settings(max_examples=repetitions(60, quick=15), deadline=None)
@given(text=TEXTS, limit=st.integers(3, 16), prompt=st.sampled_from(["", "query: "]))
@example(text="." * 400, limit=12, prompt="")
@example(text="我能吞下玻璃" * 60, limit=12, prompt="")
@example(text="a" * 300 + " b" * 50 + "a" * 300, limit=12, prompt="query: ")
@example(text="x =" + "\u0338 =" * 200, limit=5, prompt="")
@example(text=" " * 500, limit=3, prompt="")
def test_a_part_gives_the_ids_of_the_whole_text(name: str, text: str, limit: int, prompt: str) -> None:
    parts, whole = _parts_and_whole(name)
    for pools_without_prompt in (False, True):
        for one in (parts, whole):
            set_limit(one, (CUT | WHOLE)[name], limit, pools_without_prompt=pools_without_prompt)
        ways: tuple[Truncate, ...] = ("end", "start", "none")
        for way in ways:
            expected, got = (one.tokenize([text, "the fox"], prompt, way) for one in (whole, parts))
            if isinstance(expected[0], int):
                assert isinstance(got[0], int) and limit < got[0] <= expected[0]
                expected, got = expected[1:], got[1:]
            assert got == expected


@pytest.mark.parametrize("name", CUT)
def test_a_long_text_is_read_as_far_as_the_model_needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = tokenizers_of(CUT[name])
    read: list[int] = []
    whole_part = tokenizers._part

    def record(text: str, truncate: Truncate, size: int) -> str | None:
        part = whole_part(text, truncate, size)
        read.append(0 if part is None else len(part))
        return part

    monkeypatch.setattr(tokenizers, "_part", record)
    text = "The quick brown fox, " * 5_000
    for way in ("end", "start", "none"):
        tokenizers.tokenize([text], "", way)
        assert sum(read) <= (len(text) if (name, way) == ("strip", "start") else 1_000)
        read.clear()


@pytest.mark.parametrize("text", ["." * 1_000_000, "我" * 1_000_000])
def test_bert_reads_little_of_a_text_without_spaces(text: str) -> None:
    tokenizers = tokenizers_of(_minilm(), 256)
    assert tokenizers._cuts is not None
    for way, part in (("end", tokenizers._cuts.start_of(text, 2048)), ("start", tokenizers._cuts.end_of(text, 2048))):
        assert part is not None and len(part) <= 2048
        (tokens,) = tokenizers.tokenize([text], "", way)  # type: ignore[arg-type]
        assert isinstance(tokens, Tokens) and len(tokens) == 256 and tokens.truncated


@pytest.mark.parametrize("name", WHOLE)
def test_a_tokenizer_that_is_not_known_to_split_reads_whole_texts(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert Cuts.of(WHOLE[name]) is None
    caplog.set_level("INFO", "memserve.embedding")
    tokenizers_of(WHOLE[name])
    told = "tiny tokenizes long texts whole: it is not known where its tokenizer divides a text"
    assert [record.getMessage() for record in caplog.records] == [told]


def test_a_place_is_not_within_an_added_token() -> None:
    cuts = Cuts.of(_with_token("!!"))
    assert cuts is not None and cuts.place.search("!!!! ???? (!)") is not None
    assert [found.start() for found in cuts.place.finditer("!!!! ?? (!)")] == [4, 7]
