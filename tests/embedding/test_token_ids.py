"""Which token ids are accepted in place of texts, and what is read of those that are too long."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deployments.embedding.fake import FakeModel
from deployments.embedding.model import ModelInfo, Truncate
from deployments.embedding.token_ids import Accepted, check, cut
from deployments.errors import InvalidRequest

BARE = FakeModel().info
BERT = replace(BARE, first_ids=(101,), last_ids=(102,))
T5 = replace(BARE, last_ids=(1,))
PHRASE = replace(BARE, first_ids=(7, 8), last_ids=(8, 9))

OWN: list[tuple[ModelInfo, list[int]]] = [
    (BERT, [101, 2009, 102]),
    (BERT, [101, 102]),
    (BERT, [101, 5, 102, 6, 102]),
    (T5, [5, 6, 1]),
    (T5, [1]),
    (PHRASE, [7, 8, 8, 9]),
    (BARE, [5]),
]
FOREIGN: list[tuple[ModelInfo, list[int], str]] = [
    (BERT, [2009], "begin with 101 and end with 102"),
    (BERT, [101], "begin with 101 and end with 102"),
    (BERT, [101, 2009], "begin with 101 and end with 102"),
    (BERT, [2009, 102], "begin with 101 and end with 102"),
    (BERT, [101, 2009, 102, 0, 0], "begin with 101 and end with 102"),
    (BERT, [102, 101], "begin with 101 and end with 102"),
    (T5, [1, 5], "end with 1"),
    (PHRASE, [7, 8, 9], "begin with 7, 8 and end with 8, 9"),
]


@pytest.mark.parametrize(("info", "ids"), OWN)
def test_ids_that_begin_and_end_as_the_models_own_are_accepted(info: ModelInfo, ids: list[int]) -> None:
    check([ids, ids], info, "checked")


@pytest.mark.parametrize(("info", "ids", "ends"), FOREIGN)
def test_other_ids_are_refused(info: ModelInfo, ids: list[int], ends: str) -> None:
    own = [*info.first_ids, 5, *info.last_ids]
    with pytest.raises(InvalidRequest) as refused:
        check([own, ids, own], info, "checked")
    assert (refused.value.position, refused.value.code) == (1, "foreign_token_ids")
    assert str(refused.value) == (
        f"1: must {ends}, as the ids of this model's tokenizer do: ids of another tokenizer would give a wrong vector; "
        "send the text itself (in langchain-openai: check_embedding_ctx_length=False)"
    )
    check([ids], info, "any")


@pytest.mark.parametrize("info", [BERT, T5, BARE])
def test_all_ids_may_be_refused(info: ModelInfo) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check([[*info.first_ids, 5, *info.last_ids]], info, "refuse")
    assert (refused.value.position, refused.value.code) == (0, "token_ids_refused")
    assert str(refused.value) == (
        "0: must be a text, since this server accepts no token ids: "
        "send the text itself (in langchain-openai: check_embedding_ctx_length=False)"
    )


@pytest.mark.parametrize("accepted", ["checked", "any", "refuse"])
def test_texts_are_always_accepted(accepted: Accepted) -> None:
    check(["a text", "101"], BERT, accepted)


@pytest.mark.parametrize(
    ("info", "ids", "truncate", "kept"),
    [
        (BERT, [101, 1, 2, 102], "end", [101, 1, 2, 102]),
        (BERT, [101, 1, 2, 3, 102], "end", [101, 1, 2, 102]),
        (BERT, [101, 1, 2, 3, 102], "start", [101, 2, 3, 102]),
        (BERT, [101, 1, 2, 3, 102], "none", [101, 1, 2, 102]),
        (BERT, [101, 1, 2, 3, 4], "end", [101, 1, 2, 3]),
        (BERT, [1, 2, 3, 4, 102], "start", [2, 3, 4, 102]),
        (T5, [1, 2, 3, 4, 1], "end", [1, 2, 3, 1]),
        (T5, [1, 2, 3, 4, 1], "start", [2, 3, 4, 1]),
        (BARE, [1, 2, 3, 4, 5], "end", [1, 2, 3, 4]),
        (BARE, [1, 2, 3, 4, 5], "start", [2, 3, 4, 5]),
        (PHRASE, [7, 8, 0, 8, 9], "start", [7, 8, 8, 9]),
        (replace(PHRASE, first_ids=(7, 7, 8)), [7, 7, 8, 8, 9], "end", [7, 7, 8, 8]),
    ],
)
def test_the_special_tokens_at_both_ends_are_kept(
    info: ModelInfo, ids: list[int], truncate: Truncate, kept: list[int]
) -> None:
    assert cut(ids, 4, truncate, info) == kept
