"""Searches by words, on SQLite and PostgreSQL, are as fresh, as separate and as forgetful as those by vectors."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from store import Append, IndexOptions, InvalidInput, Mode, NewMemory, Search, SearchResult, Store
from store.records import Memory
from tests.store.conftest import DIM, Clock

T = "default"
EYE = np.eye(DIM, dtype=np.float32)


def add(store: Store, *texts: str, user: str = "ann", tenant: str = T, **fields: Any) -> None:
    """Add memories whose ids are their texts."""
    new = tuple(NewMemory(text, text, EYE[n % DIM], **fields) for n, text in enumerate(texts))
    (result,) = store.append([Append(tenant, user, new, upsert=True, issued_at=store._now())])
    assert not isinstance(result, Exception), result


def ask(store: Store, query: str, mode: Mode = "words", *, user: str = "ann", **options: Any) -> list[Memory]:
    (result,) = store.search(
        [Search(options.pop("tenant", T), user, EYE[0], query=query, mode=mode, explain=True, **options)]
    )
    assert isinstance(result, SearchResult), result
    return result.results


def texts(memories: list[Memory]) -> list[str]:
    return [memory.text for memory in memories]


def test_every_store_finds_a_word_as_soon_as_it_is_written(pair: tuple[Store, Store]) -> None:
    one, other = pair
    for n in range(60):  # more than an exact index holds
        writer, reader = (one, other) if n % 2 else (other, one)
        add(writer, f"heron {n}")
        assert texts(ask(reader, f"{n}")) == [f"heron {n}"]
        reader.background_step()
    one.update(T, "ann", "heron 7", text="a stork", vector=EYE[0])
    assert texts(ask(other, "7 stork")) == ["a stork"]
    other.delete(T, "ann", "heron 8")
    assert texts(ask(one, "8")) == []
    one.erase_user(T, "ann")
    assert ask(other, "heron") == []


def test_the_words_of_more_memories_than_are_read_at_a_time(open_store: Callable[..., Store]) -> None:
    one = open_store()
    add(one, "heron", *(f"memory {n}" for n in range(2_100)))
    assert texts(ask(one, "heron")) == ["heron"]  # reads the words of all memories
    assert texts(ask(one, "2099")) == ["memory 2099"]
    add(one, *(f"another {n}" for n in range(2_100)))
    assert texts(ask(one, "another 2099", top_k=1)) == ["another 2099"]  # reads the changes
    assert texts(ask(open_store(), "2099")) == ["another 2099", "memory 2099"]


def test_users_and_tenants_do_not_share_words(store: Store) -> None:
    add(store, "tea with milk", "milk")
    add(store, "tea", user="bob")
    add(store, "tea", *(f"milk {n}" for n in range(20)), tenant="other")
    assert texts(ask(store, "tea")) == ["tea with milk"]
    before = ask(store, "tea milk")
    add(store, *(f"tea {n}" for n in range(20)), user="bob")
    assert ask(store, "tea milk") == before  # nobody else's memories make a word less rare
    assert ask(store, "tea", user="nobody") == []


def test_a_memory_that_has_expired_counts_no_more(store: Store, clock: Clock) -> None:
    add(store, "tea in the morning", "coffee")
    add(store, "tea at night", expires_at=clock.now + timedelta(seconds=60))
    assert len(ask(store, "tea")) == 2
    alone = {}
    for name in ("expired", "never there"):
        if name == "expired":
            clock.advance(61)
        else:
            add(store, "tea in the morning", "coffee", user="other")
        alone[name] = ask(store, "tea coffee", user="other" if name == "never there" else "ann")
    assert [(one.text, one.score) for one in alone["expired"]] == [
        (one.text, one.score) for one in alone["never there"]
    ]


def test_a_filter_and_a_least_score_hold_for_words(store: Store) -> None:
    add(store, "red tea", "tea", metadata={"kind": "drink"})
    add(store, "red tea cup", "a cup", metadata={"kind": "thing"})
    found = ask(store, "red tea", filter={"kind": "drink"})
    assert [(one.text, one.scores) for one in found] == [
        ("red tea", {"words": 1.0}),
        ("tea", {"words": found[1].score}),
    ]
    assert texts(ask(store, "red tea", min_score=0.999)) == ["red tea"]
    assert texts(ask(store, "red tea", "hybrid", filter={"kind": "thing"})) == ["red tea cup", "a cup"]


def test_candidates_of_either_side_are_scored_by_both(open_store: Callable[..., Store]) -> None:
    """The memory that is far by its vector and has the word, among so many that it is on one list only."""
    store = open_store(index=IndexOptions(switch=100))
    near = [(EYE[0] + n / 300 * EYE[2]).astype(np.float32) for n in range(300)]
    store.append([Append(T, "ann", tuple(NewMemory(str(n), f"tea {n}", near[n]) for n in range(300)))])
    far = (EYE[0] + 2 * EYE[1]).astype(np.float32)
    store.append([Append(T, "ann", (NewMemory("far", "Biscuit the dog", far),))])
    while store.background_step():
        pass
    for _ in range(2):
        found = {one.id: one for one in ask(store, "biscuit", "hybrid", top_k=1000)}
        assert len(found) == 301
        assert found["far"].scores == {"vector": 0.447214, "words": 1.0}
        assert found["0"].scores == {"vector": 1.0, "words": 0.0}
        assert found["299"].scores == {"vector": 0.708286, "words": 0.0}
        while store.background_step():
            pass
    assert ask(store, "biscuit", "hybrid", top_k=1)[0].id == "far"
    assert texts(ask(store, "biscuit", "vector", top_k=1)) == ["tea 0"]


def test_words_are_kept_only_if_they_are_needed_and_count_in_the_budget(store: Store) -> None:
    add(store, *(f"a memory about heron {n}" for n in range(40)))
    ask(store, "", "vector")
    (index,) = store.resident
    before = store.resident.bytes
    assert index.words is None
    ask(store, "heron")
    assert index.words is not None
    assert store.resident.bytes - before == index.words.bytes > 40 * 5
    add(store, "one more")
    assert texts(ask(store, "more")) == ["one more"]
    assert ask(store, "", "vector", top_k=100)[-1].id == "a memory about heron 1"


@pytest.mark.parametrize(
    ("search", "field"),
    [
        (Search(T, "ann", EYE[0], mode="hybrid"), "query"),
        (Search(T, "ann", None, mode="words"), "query"),
        (Search(T, "ann", None, query="tea", mode="hybrid"), "vector"),
        (Search(T, "ann", None, query="tea"), "vector"),
        (Search(T, "ann", EYE[0], query="tea", mode="bm25"), "mode"),  # type: ignore[arg-type]
    ],
)
def test_a_search_without_what_its_mode_needs_is_refused(store: Store, search: Search, field: str) -> None:
    (refused,) = store.search([search])
    assert isinstance(refused, InvalidInput)
    assert refused.field == field


def test_a_process_of_an_older_version_can_read_what_does_not_use_new_fields() -> None:
    _, values = Search(T, "ann", EYE[0], 10, {"a": 1}).__reduce__()
    assert [*values[:2], *values[3:]] == [T, "ann", 10, {"a": 1}]
    new = Search(T, "ann", None, 10, query="tea", mode="words")
    assert new.__reduce__()[1] == (T, "ann", None, 10, None, None, False, "tea", "words")
    assert pickle.loads(pickle.dumps(new)) == new
