"""The words of a user against BM25 in plain Python, and the words of texts in many scripts."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from store.index.tokens import keys_of
from store.index.words import Words

DISTINCT = ["tea", "rain", "dog", "lamp", "moon", "1234", "zürich", "猫"]  # each is its own stem
texts = st.lists(st.sampled_from([*DISTINCT, "the", "what"]), max_size=12).map(" ".join)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(texts, min_size=1, max_size=6)),
        st.tuples(st.just("remove"), st.sets(st.integers(0, 40), max_size=6)),
        st.tuples(st.just("maintain"), st.sampled_from([0.0, 0.2])),
        st.tuples(st.just("restart"), st.none()),
        st.tuples(st.just("search"), st.tuples(texts, st.sampled_from([1, 3, 100]), st.booleans())),
    ),
    min_size=3,
    max_size=40,
)


def bm25(memories: dict[int, str], query: str, k1: float = 1.2, b: float = 0.75) -> dict[int, float]:
    """The score of each memory that has a word of the query, by label."""
    counts = {label: Counter(word for word in text.split() if word in DISTINCT) for label, text in memories.items()}
    average = max(sum(count.total() for count in counts.values()) / max(len(counts), 1), 1.0)
    scores: dict[int, float] = {}
    for word in query.split():
        having = [label for label, count in counts.items() if count[word]]
        rarity = math.log(1 + (len(counts) - len(having) + 0.5) / (len(having) + 0.5))
        for label in having:
            times, norm = counts[label][word], k1 * (1 - b + b * counts[label].total() / average)
            scores[label] = scores.get(label, 0) + rarity * (k1 + 1) * times / (times + norm)
    return scores


@given(steps)
@settings(deadline=None, max_examples=200, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_every_answer_is_that_of_bm25_in_plain_python(steps: list[Any]) -> None:
    words = Words()
    memories: dict[int, str] = {}
    next_label = 0
    for kind, argument in [*steps, ("search", ("tea rain dog tea", 100, False))]:
        if kind == "add":
            labels = np.arange(next_label, next_label + len(argument))
            next_label += len(argument)
            words.add(labels, argument)
            memories.update(zip(labels.tolist(), argument, strict=True))
        elif kind == "remove":
            words.remove(np.array(sorted(argument), np.int64))
            memories = {label: text for label, text in memories.items() if label not in argument}
        elif kind == "maintain":
            words.maintain(argument)
        elif kind == "restart":
            words = Words.restore(words.arrays())
        else:
            query, k, only_odd = argument
            usable = {label: text for label, text in memories.items() if not only_odd or label % 2}
            allowed = np.array(list(usable), np.int64) if only_odd else None
            expected = bm25(usable, query)
            found = words.search(query, k, allowed)
            assert len(found.labels) == min(k, len(expected))
            assert found.scores.tolist() == pytest.approx(sorted(expected.values(), reverse=True)[:k], rel=1e-5)
            assert found.scores.tolist() == pytest.approx([expected[n] for n in found.labels.tolist()], rel=1e-5)
            for (one, score), (other, same) in zip(
                zip(found.labels.tolist(), found.scores.tolist(), strict=True),
                zip(found.labels[1:].tolist(), found.scores[1:].tolist(), strict=True),
                strict=False,
            ):
                assert score > same or one > other  # ties by newest
            wanted = np.array([*memories, 10_000], np.int64)
            scores = words.scores_of(query, wanted, allowed)
            assert scores.tolist() == pytest.approx([expected.get(n, 0.0) for n in wanted.tolist()], rel=1e-5)
        assert words.live == len(memories)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Running biscuits", "run BISCUIT"),
        ("Café Zürich naïve", "cafe zurich naive"),
        ("STRASSE", "straße"),
        ("part no. AB-1234/x", "part ab 1234 X"),
        ("snake_case", "snake case"),
        ("ＦＵＬＬ ｗｉｄｔｈ ﬁle", "full width file"),
        ("Ёлка", "елка"),
        ("Ελλάδα", "ΕΛΛΑΔΑ"),
        ("İstanbul", "istanbul"),
        ("שָׁלוֹם", "שלום"),
        ("مُحَمَّد", "محمد"),
        ("한국어", "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165"),
        ("Nguyễn", "Nguyen"),
        ("Biscuit's bowl", "biscuit bowl"),
    ],
)
def test_texts_that_have_the_same_words(one: str, other: str) -> None:
    assert keys_of(one) == keys_of(other) != []


@pytest.mark.parametrize(
    ("query", "text", "others"),
    [
        ("東京", "私は東京に住んでいます", "京都に住んでいます"),
        ("大学", "北京大学很大", "学习很大"),
        ("ประเทศไทย", "ฉันอยู่ประเทศไทย", "ฉันอยู่บ้าน"),
        ("がっこう", "きのうがっこうへ", "きのうかつこうへ"),
        ("한국어", "저는 한국어 공부", "저는 영어 공부"),
        ("हिंदी", "मैं हिंदी बोलता हूँ", "मैं अंग्रेज़ी बोलता हूँ"),
        ("Dostoyevsky", "Dostoyevsky wrote it", "Tolstoy wrote it"),
    ],
)
def test_a_memory_is_found_by_a_word_of_its_script(query: str, text: str, others: str) -> None:
    words = Words()
    words.add(np.array([1, 2]), [others, text])
    assert words.search(query, 10).labels.tolist()[0] == 2
    assert words.scores_of(query, np.array([2]))[0] > words.scores_of(query, np.array([1]))[0]


@pytest.mark.parametrize("query", ["", "?!", "what is the", "Who are you?", "\0", "🙂"])
def test_a_query_without_words_finds_nothing(query: str) -> None:
    words = Words()
    words.add(np.array([1]), ["what is the who are you"])
    assert words.search(query, 10).labels.tolist() == []
    assert Words().search("tea", 10).labels.tolist() == []


def test_nothing_of_a_removed_memory_is_in_the_arrays() -> None:
    words = Words()
    words.add(np.array([1, 2, 3]), ["tea with Kowalski", "tea", "rain with Kowalska"])
    words.remove(np.array([1, 3, 99]))
    arrays = words.arrays()
    assert (arrays.labels.tolist(), arrays.words.tolist(), arrays.rows.tolist()) == ([2], keys_of("tea"), [0])
    assert (words.live, words.search("Kowalski", 10).labels.tolist()) == (1, [])


def test_only_the_beginning_of_a_long_text_is_read() -> None:
    assert len(keys_of("tea " * 1_000_000)) == 50_000


def test_words_take_less_than_half_the_memory_of_vectors(rng: np.random.Generator) -> None:
    vocabulary = [f"w{n}" for n in range(30_000)]
    chosen = (rng.pareto(1.0, size=(20_000, 20)) * 10).astype(np.int64) % 30_000  # some words are frequent, as in texts
    words = Words()
    for start in range(0, 20_000, 500):
        part = chosen[start : start + 500].tolist()
        words.add(np.arange(start, start + 500), [" ".join(vocabulary[n] for n in row) for row in part])
    assert words.bytes / words.live < 4 * 384 / 2
    held = sum(array.nbytes for array in words.arrays())
    assert words.bytes == pytest.approx(held, rel=0.1)


def test_a_word_has_the_same_key_in_every_process() -> None:
    code = "from store.index.tokens import keys_of; print(keys_of('Running Zürich 東京都'))"
    command = [sys.executable, "-c", code]
    answers = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    assert answers == [f"{keys_of('Running Zürich 東京都')}\n"] * 2
