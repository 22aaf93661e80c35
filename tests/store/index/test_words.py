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

from store.index.matching import Matcher, Query
from store.index.tokens import keys_of, keys_of_all, query_keys
from store.index.user_index import UserIndex
from store.index.words import Words
from store.log.reading import NEVER, Changes
from store.ranking import Candidates, best
from store.records import IndexOptions, Vector

STOP = ["the", "what"]
DISTINCT = ["tea", "rain", "dog", "lamp", "moon", "1234", "zürich", "猫"]  # each is its own stem
texts = st.lists(st.sampled_from([*DISTINCT, *STOP]), max_size=12).map(" ".join)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(texts, min_size=1, max_size=6)),
        st.tuples(st.just("lend"), st.lists(texts, min_size=1, max_size=6)),
        st.tuples(st.just("update"), st.dictionaries(st.integers(0, 40), texts, max_size=6)),
        st.tuples(st.just("remove"), st.sets(st.integers(0, 40), max_size=6)),
        st.tuples(st.just("expire"), st.none()),
        st.tuples(st.just("maintain"), st.booleans()),
        st.tuples(st.just("restart"), st.none()),
        st.tuples(st.just("begin again"), st.none()),
        st.tuples(st.just("search"), st.tuples(texts, st.sampled_from([1, 3, 100]), st.booleans())),
    ),
    min_size=3,
    max_size=40,
)


def bm25(memories: dict[int, str], query: str, k1: float = 1.2, b: float = 0.75) -> dict[int, float]:
    """The score of each memory that has a word of the query, by label."""
    counts = {label: Counter(text.split()) for label, text in memories.items()}
    average = max(sum(count.total() for count in counts.values()) / max(len(counts), 1), 1.0)
    scores: dict[int, float] = {}
    for word in [word for word in query.split() if word not in STOP] or query.split():
        having = [label for label, count in counts.items() if count[word]]
        rarity = math.log(1 + (len(counts) - len(having) + 0.5) / (len(having) + 0.5))
        for label in having:
            times, norm = counts[label][word], k1 * (1 - b + b * counts[label].total() / average)
            scores[label] = scores.get(label, 0) + rarity * (k1 + 1) * times / (times + norm)
    return scores


class Indexed:
    """An index with random vectors and with words, and the texts that it should hold by label."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)
        self.options = IndexOptions(switch=6, k1=1.2, b=0.75)
        self.index = UserIndex(1, 0, 4, self.options)
        self.index.add_words([])
        self.texts: dict[int, str] = {}
        self.vectors: dict[int, Vector] = {}
        self.version = self.now = 0
        self.expires: dict[int, int] = {}

    def write(self, labels: list[int], texts: list[str], *, lasts: int | None = None) -> None:
        for label, text in zip(labels, texts, strict=True):
            self.texts.pop(label, None)  # an updated memory is the newest
            self.texts[label] = text
            self.vectors[label] = self.rng.normal(size=4).astype(np.float32)
            self.expires[label] = NEVER if lasts is None else self.now + lasts
        self._apply(labels, texts)

    def delete(self, labels: list[int]) -> None:
        for label in labels:
            del self.texts[label]
        self._apply(labels, None)

    def _apply(self, labels: list[int], texts: list[str] | None) -> None:
        count = len(labels)
        kept = labels if texts is not None else []
        versions = np.arange(count) + self.version + 1
        self.version += count
        expires = np.array([self.expires[label] for label in kept], np.int64)
        vectors = np.array([self.vectors[label] for label in kept], np.float32).reshape(-1, 4)
        changes = Changes(np.array(labels), versions, np.full(count, texts is not None), expires, vectors, texts or [])
        self.index.apply(changes)

    def expire(self) -> None:
        self.now += 1
        self.index.expire(self.now)
        self.texts = {label: text for label, text in self.texts.items() if self.expires[label] > self.now}

    def begin_words_again(self) -> None:
        self.index.words = None
        pages = [(np.array([label], np.int64), [text]) for label, text in self.texts.items()]
        self.index.add_words([*pages, (np.array([10**6]), ["a memory that has expired here"])])

    def restart(self) -> None:
        index, alive = self.index, self.index.usable(None)
        assert index.words is not None
        index.words = Words.restore(index.words.arrays(alive), alive, self.options.k1, self.options.b)

    def find(self, query: str, k: int, allowed: np.ndarray | None = None) -> Candidates:
        matcher = Matcher(self.index, Query(None, query_keys(query)), self.fetch, allowed)
        matches = matcher.best(k)
        assert matches.bm25 is not None
        return best(Candidates(matches.labels, matches.rows, matches.bm25, {}), k, None)

    def fetch(self, labels: np.ndarray) -> Vector:
        return np.array([self.vectors[label] for label in labels.tolist()], np.float32)


@given(steps)
@settings(deadline=None, max_examples=200, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_every_answer_is_that_of_bm25_in_plain_python(steps: list[Any]) -> None:
    indexed = Indexed()
    next_label = 0
    for kind, argument in [*steps, ("search", ("tea rain dog tea", 100, False))]:
        if kind in ("add", "lend"):
            labels = list(range(next_label, next_label + len(argument)))
            next_label += len(argument)
            indexed.write(labels, argument, lasts=2 if kind == "lend" else None)
        elif kind == "update":
            known = [label for label in argument if label in indexed.texts]
            indexed.write(known, [f"{argument[label]}" for label in known])
        elif kind == "remove":
            indexed.delete([label for label in sorted(argument) if label in indexed.texts])
        elif kind == "expire":
            indexed.expire()
        elif kind == "maintain":
            while indexed.index.maintain() and argument:
                pass
        elif kind == "restart":
            indexed.restart()
        elif kind == "begin again":
            indexed.begin_words_again()
        else:
            query, k, only_odd = argument
            usable = {label: text for label, text in indexed.texts.items() if not only_odd or label % 2}
            allowed = np.array(list(usable), np.int64) if only_odd else None
            expected = bm25(usable, query)
            found = indexed.find(query, k, allowed)
            assert len(found.labels) == min(k, len(expected))
            assert found.scores.tolist() == pytest.approx(
                sorted(expected.values(), reverse=True)[:k], rel=1e-5, abs=1e-6
            )
            assert found.scores.tolist() == pytest.approx(
                [expected[n] for n in found.labels.tolist()], rel=1e-5, abs=1e-6
            )
            age = list(usable)
            for (one, score), (other, same) in zip(
                zip(found.labels.tolist(), found.scores.tolist(), strict=True),
                zip(found.labels[1:].tolist(), found.scores[1:].tolist(), strict=True),
                strict=False,
            ):
                assert score > same or age.index(one) > age.index(other)  # ties by newest
            matcher = Matcher(indexed.index, Query(None, query_keys(query)), indexed.fetch, allowed)
            matches = matcher.of(np.array([*usable, 10_000], np.int64))
            assert matches.labels.tolist() == list(usable)
            assert matches.bm25.tolist() == pytest.approx([expected.get(n, 0.0) for n in usable], rel=1e-5)
        assert indexed.index.live == len(indexed.texts)


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
    assert list(query_keys(one)) == list(query_keys(other)) != []


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
    indexed = Indexed()
    indexed.write([1, 2], [others, text])
    found = indexed.find(query, 10)
    assert found.labels.tolist()[0] == 2
    assert found.labels.tolist() == [2] or found.scores[0] > found.scores[1]


@pytest.mark.parametrize("query", ["", "?!", "\0", "🙂"])
def test_a_query_without_words_finds_nothing(query: str) -> None:
    indexed = Indexed()
    indexed.write([1], ["what is the who are you"])
    assert indexed.find(query, 10).labels.tolist() == []
    assert Indexed().find("tea", 10).labels.tolist() == []


def test_stop_words_count_only_in_a_query_of_nothing_else() -> None:
    indexed = Indexed()
    indexed.write([1, 2], ["The Who played", "who likes the rain"])
    assert indexed.find("who likes the rain", 10).labels.tolist() == [2]
    assert indexed.find("who played the rain", 10).scores.tolist() == indexed.find("played rain", 10).scores.tolist()
    assert indexed.find("The Who", 10).labels.tolist() == [1, 2]


def test_nothing_of_a_removed_memory_is_in_the_arrays() -> None:
    indexed = Indexed()
    indexed.write([1, 2, 3], ["tea with Kowalski", "tea", "rain with Kowalska"])
    indexed.delete([1, 3])
    assert indexed.index.words is not None
    arrays = indexed.index.words.arrays(indexed.index.usable(None))
    assert (arrays.words.tolist(), arrays.rows.tolist(), arrays.lengths.tolist()) == (keys_of("tea"), [1], [0, 1, 0])
    assert (indexed.index.live, indexed.find("Kowalski", 10).labels.tolist()) == (1, [])


@pytest.mark.parametrize("large", [False, True])
def test_a_merge_in_steps_makes_what_one_at_once_makes(monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    monkeypatch.setattr("store.index.words._STEP", 100_000 if large else 7)
    monkeypatch.setattr("store.index.words._AT_ONCE", 0)
    words = Words(1.2, 0.75)
    texts = [" ".join(DISTINCT[n % (2 + m % 7)] for n in range(m)) for m in range(1, 41)]
    for start in range(0, 40, 4):
        words.add(np.arange(start, start + 4), texts[start : start + 4])
    alive = np.arange(40) % 3 != 0
    before = words.scores(query_keys("tea moon 1234"), alive)
    steps = 1
    while words.maintain(alive, 0.2):
        steps += 1
        assert words.scores(query_keys("tea moon 1234"), alive).tolist() == before.tolist()
    assert len(words._segments) == 1
    assert not np.isin(words._segments[0].rows, np.flatnonzero(~alive)).any()
    assert (steps > 20) is not large


def test_only_the_beginning_of_a_long_text_is_read() -> None:
    assert len(keys_of("tea " * 1_000_000)) == 50_000


def test_a_long_run_of_combining_marks_takes_no_time() -> None:
    """To normalise 200,000 marks at once would take minutes."""
    marks = "\u0301" * 100_000 + "\u0316" * 100_000
    assert keys_of("Cafe" + marks[:30]) == keys_of("cafe") == keys_of("Cafe" + marks)
    assert keys_of("नमस्ते दुनिया") != keys_of("नमसत दनय")  # signs of a script are no accents


def test_many_texts_are_split_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["tea rain", "", "Ёлка 猫 tea", "x" * 300, "dog", "東京", "what?"]
    whole = keys_of_all(texts)
    for size in (1, 10, 300):
        monkeypatch.setattr("store.index.tokens._PIECE", size)
        keys, each = keys_of_all(texts)
        assert (keys.tolist(), each.tolist()) == (whole[0].tolist(), whole[1].tolist())
    assert each.tolist() == [2, 0, 3, 1, 1, 1, 1]
    assert keys.tolist() == [key for text in texts for key in keys_of(text)]
    assert [len(part) for part in keys_of_all([])] == [0, 0]


def test_words_take_less_than_half_the_memory_of_vectors(rng: np.random.Generator) -> None:
    vocabulary = [f"w{n}" for n in range(30_000)]
    chosen = (rng.pareto(1.0, size=(20_000, 20)) * 10).astype(np.int64) % 30_000  # some words are frequent, as in texts
    words = Words(1.2, 0.75)
    for start in range(0, 20_000, 500):
        part = chosen[start : start + 500].tolist()
        words.add(np.arange(start, start + 500), [" ".join(vocabulary[n] for n in row) for row in part])
    assert words.bytes / 20_000 < 4 * 384 / 2
    held = sum(array.nbytes for array in words.arrays(np.ones(20_000, np.bool_)))
    assert words.bytes == pytest.approx(held, rel=0.1)


def test_a_word_has_the_same_key_in_every_process() -> None:
    code = "from store.index.tokens import keys_of; print(keys_of('Running Zürich 東京都'))"
    command = [sys.executable, "-c", code]
    answers = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    assert answers == [f"{keys_of('Running Zürich 東京都')}\n"] * 2
