"""The scores of a local reranker are those of `CrossEncoder.predict`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder

from deployments.embedding.engine import EmbedRequest, Engine
from deployments.embedding.load import load_reranker
from deployments.embedding.local import unpadded
from deployments.embedding.local.pairs import longest_first
from deployments.embedding.local.reranker import LocalReranker
from deployments.embedding.model import Tokens, Truncate
from deployments.errors import InvalidRequest, ModelUnavailable

Sentences = Callable[..., list[str]]
Make = Callable[..., Path]

QUERY = "what is the dog of my sister afraid of"


def reference(folder: Path, query: str, texts: list[str]) -> np.ndarray:
    """The scores of `predict`, (texts,) float32, of texts one by one."""
    network = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    return np.asarray(network.predict([(query, text) for text in texts], batch_size=1, show_progress_bar=False))


async def scores_of(model: LocalReranker, query: str, texts: list[str]) -> np.ndarray:
    tokens = await model.tokenize(texts, query, "end")
    return await model.forward([one for one in tokens if isinstance(one, Tokens)])


@pytest.mark.parametrize(
    ("kind", "of_config", "pads"),
    [
        ("bert", {}, False),
        ("roberta", {}, False),
        ("distilbert", {}, False),
        ("electra", {}, False),
        ("modernbert", {"classifier_pooling": "cls"}, False),
        ("modernbert", {"classifier_pooling": "mean"}, True),  # its head reads all tokens of a row
        ("deberta", {}, True),  # its attention cannot be replaced
        ("mpnet", {}, True),  # its attention has a bias
    ],
    ids=lambda one: "-".join(one.values()) if isinstance(one, dict) else str(one),
)
async def test_scores_are_those_of_predict(
    sentences: Sentences, tiny_cross_encoder: Make, kind: str, of_config: dict[str, str], pads: bool
) -> None:
    folder = tiny_cross_encoder(kind, **of_config)
    model = LocalReranker(str(folder), device="cpu", dtype="float32")
    texts = sentences(40, seed=1, longest=90)  # some pairs are longer than the model reads
    ours, theirs = await scores_of(model, QUERY, texts), reference(folder, QUERY, texts)
    assert ours.shape == (40, 2) and ours.dtype == np.float32
    assert np.abs(ours[:, 0] - theirs).max() <= 1e-5
    assert theirs.std() > 0.01  # the scores tell the texts apart
    assert model.pads == pads
    await model.close()


async def test_the_activation_is_the_models_own_and_the_logit_comes_with_the_score(
    sentences: Sentences, tiny_cross_encoder: Make
) -> None:
    texts = sentences(5, seed=2)
    by_default = LocalReranker(str(tiny_cross_encoder("bert")), device="cpu", dtype="float32")
    scores, logits = (await scores_of(by_default, QUERY, texts)).T
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), rtol=0, atol=1e-6)  # sigmoid
    folder = tiny_cross_encoder("bert", activation="Identity")
    without = LocalReranker(str(folder), device="cpu", dtype="float32")
    same = await scores_of(without, QUERY, texts)
    np.testing.assert_array_equal(same[:, 0], same[:, 1])
    np.testing.assert_allclose(same[:, 1], logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(same[:, 0], reference(folder, QUERY, texts), rtol=0, atol=1e-5)
    await by_default.close()
    await without.close()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
async def test_long_pairs_are_cut_as_the_tokenizer_cuts_them(
    sentences: Sentences, tiny_cross_encoder: Make, kind: str
) -> None:
    """A text of many words is tokenized in part only."""
    folder = tiny_cross_encoder(kind)
    model = LocalReranker(str(folder), device="cpu", dtype="float32")
    tokenizer = CrossEncoder(str(folder), device="cpu").tokenizer
    texts = [*sentences(20, seed=4, longest=200), " ".join(sentences(100, seed=5)), "", "a"]
    words = " ".join(sentences(20, seed=3)).split()
    for number, way in itertools.product((3, 40, 200), ("end", "start")):
        query = " ".join(words[:number])
        tokenizer.truncation_side = "right" if way == "end" else "left"
        queries = [query] * len(texts)
        expected = tokenizer(queries, texts, truncation="longest_first", max_length=64, return_token_type_ids=True)
        whole = [len(ids) for ids in tokenizer(queries, texts)["input_ids"]]
        made = await model.tokenize(texts, query, cast(Truncate, way))
        tokens = [one for one in made if isinstance(one, Tokens)]
        assert [one.ids for one in tokens] == expected["input_ids"]
        if kind == "bert":
            types = [[0] * one.prompt_tokens + [1] * (len(one) - one.prompt_tokens) for one in tokens]
            assert types == expected["token_type_ids"]
        assert [one.truncated for one in tokens] == [length > 64 for length in whole]
        uncut = await model.tokenize(texts, query, "none")
        assert [isinstance(one, int) for one in uncut] == [length > 64 for length in whole]
        assert [one for one in uncut if isinstance(one, Tokens)] == [one for one in tokens if not one.truncated]
    await model.close()


@pytest.mark.parametrize(
    ("first", "second", "room", "kept"),
    [
        (3, 4, 7, (3, 4)),
        (3, 9, 7, (3, 4)),
        (9, 3, 7, (4, 3)),
        (4, 9, 7, (3, 4)),
        (9, 4, 7, (4, 3)),
        (9, 9, 7, (3, 4)),
        (9, 8, 7, (4, 3)),
        (9, 9, 8, (4, 4)),
        (0, 9, 7, (0, 7)),
        (9, 9, 0, (0, 0)),
        (9, 9, -1, (0, 0)),
    ],
)
def test_the_longer_part_of_a_pair_is_cut_first(first: int, second: int, room: int, kept: tuple[int, int]) -> None:
    assert longest_first(first, second, room) == kept


async def test_the_engine_packs_pairs_of_several_queries_into_batches(
    sentences: Sentences, tiny_cross_encoder: Make
) -> None:
    folder = tiny_cross_encoder("bert")
    model = load_reranker(str(folder), device="cpu", dtype="float32")
    stats: list[tuple[int, int, int]] = []
    engine = Engine(
        model, max_batch_tokens=256, on_batch=lambda one: stats.append((one.texts, one.tokens, one.padded_tokens))
    )
    queries = [QUERY, "where does the river begin", "poison"]
    texts = sentences(12, seed=6, longest=40)
    results = await engine.embed([EmbedRequest(texts, query) for query in queries])
    lengths = []
    for query, result in zip(queries, results, strict=True):
        assert not isinstance(result, Exception)
        assert np.abs(result.vectors[:, 0] - reference(folder, query, texts)).max() <= 1e-5
        lengths += result.tokens.tolist()
    assert sum(one[0] for one in stats) == 36
    assert sum(one[1] for one in stats) == sum(one[2] for one in stats) == sum(lengths)  # nothing is padded
    assert max(one[1] for one in stats) <= 256
    assert len(stats) < 12  # pairs share batches
    await engine.close()


async def test_a_pair_that_is_too_long_is_refused_unless_it_may_be_cut(tiny_cross_encoder: Make) -> None:
    engine = Engine(load_reranker(str(tiny_cross_encoder("bert")), device="cpu", dtype="float32"))
    with pytest.raises(InvalidRequest, match=r"^1: has at least 75 tokens; the model reads at most 64$") as caught:
        await engine.embed_one(EmbedRequest(["the dog", "the " * 60], QUERY, "none"))
    assert (caught.value.position, caught.value.code) == (1, "context_length_exceeded")
    with pytest.raises(InvalidRequest, match="must be a text: token ids make no pair"):
        await engine.embed_one(EmbedRequest([[101, 102]], QUERY))
    await engine.close()


async def test_scores_in_half_precision_are_near_those_in_float32_and_do_not_tie(
    sentences: Sentences, tiny_cross_encoder: Make
) -> None:
    folder = tiny_cross_encoder("bert", activation="Identity")
    model = LocalReranker(str(folder), device="cpu", dtype="bfloat16")
    texts = sentences(60, seed=7, longest=30)
    ours, theirs = (await scores_of(model, QUERY, texts))[:, 0], reference(folder, QUERY, texts)
    assert np.abs(ours - theirs).max() <= 0.2  # bfloat16 has eight bits, and random weights of this size amplify them
    rounded = torch.from_numpy(ours).bfloat16().float().numpy()
    assert len(set(rounded.tolist())) < len(set(ours.tolist())) == len(set(theirs.tolist()))
    await model.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 3}, "The model 'cross' gives a pair 3 scores; one is supported."),
        ({}, "The model 'cross' is not a cross-encoder: it has no layer that makes a score."),
    ],
    ids=["three labels", "an embedding model"],
)
def test_a_model_that_is_no_reranker_is_refused(
    tiny: Make, tiny_cross_encoder: Make, options: dict[str, int], message: str
) -> None:
    folder = tiny_cross_encoder("bert", **options) if options else tiny("bert")
    with pytest.raises(ModelUnavailable, match=message):
        LocalReranker(str(folder), name="cross", device="cpu", dtype="float32")


def test_a_model_whose_scores_would_differ_from_those_of_predict_is_refused(
    tiny_cross_encoder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalReranker, "_sample_prompt", lambda *_: "Another query.")
    with pytest.raises(ModelUnavailable, match=r"gives other scores here than predict does \(the relative difference"):
        LocalReranker(str(tiny_cross_encoder("bert")), device="cpu", dtype="float32")


@pytest.mark.parametrize("kind", ["bert", "roberta"])  # with token types, and without
async def test_a_batch_filled_up_to_a_fixed_shape_gives_the_same_scores(
    sentences: Sentences, tiny_cross_encoder: Make, kind: str
) -> None:
    """CUDA graphs replay such batches: filler texts follow the batch, empty texts precede it."""
    model = LocalReranker(str(tiny_cross_encoder(kind)), device="cpu", dtype="float32")
    tokens = [one for one in await model.tokenize(sentences(9, seed=3), QUERY, "end") if isinstance(one, Tokens)]
    exact = (await model.forward(tokens))[:, 1:]
    flat = model._forward._flatten(tokens)
    assert len(flat.rows()) == (4 if kind == "bert" else 3)
    bounded = unpadded.fill(flat, len(flat.ids) + 200, 40, 64)
    assert {row.shape for row in bounded.rows()} == {(len(flat.ids) + 200,)}
    with torch.inference_mode():
        features = unpadded.features(bounded, torch.device("cpu"), torch.float32)
        filled = model._forward._vectors(features).numpy()[bounded.place]
    assert np.abs(filled - exact).max() <= 1e-5
    await model.close()
