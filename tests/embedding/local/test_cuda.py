"""The CUDA path. Needs a card; its arithmetic on shapes is tested without one, in test_model.py."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

from deployments.embedding.engine import EmbedRequest, Engine
from deployments.embedding.load import load_model, load_reranker
from deployments.embedding.local.cuda import GRAPH_TOKENS
from deployments.embedding.local.model import LocalModel
from deployments.embedding.model import Tokens
from deployments.embedding.outputs import EmbedResult

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Sentences = Callable[..., list[str]]

# The least cosine to the vector in float32. On these texts, `encode` in bfloat16 itself comes down to 0.9998. The
# nearest vector of another text is at 0.76.
SAME = 0.999


@pytest.fixture(scope="module")
def model() -> LocalModel:
    made = load_model("local", device="cuda")
    assert isinstance(made, LocalModel)
    return made


@pytest.fixture(scope="module")
def reference(sentences: Sentences, minilm_folder: Path) -> tuple[list[str], np.ndarray]:
    """Texts of every length, and their float32 vectors from the CPU."""
    texts = sentences(600, 1, longest=250)
    return texts, SentenceTransformer(str(minilm_folder), device="cpu").encode(texts)


def worst_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.min(np.sum(ours * theirs, axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)))


def test_it_runs_unpadded_in_bfloat16(model: LocalModel) -> None:
    assert (model.info.device, model.info.dtype, model.pads) == ("cuda:0", "bfloat16", False)


async def test_large_and_small_batches_give_the_directions_of_encode(
    model: LocalModel, reference: tuple[list[str], np.ndarray]
) -> None:
    texts, expected = reference
    engine = Engine(model)
    await engine.warm_up()
    assert model._forward._gpu is not None
    graphs = [len(worker.graphs) for worker in model._forward._gpu._idle]
    assert graphs == [len(GRAPH_TOKENS)] * model.forwards_in_flight
    whole = await engine.embed_one(EmbedRequest(texts))
    assert worst_cosine(whole.vectors, expected) >= SAME
    for size in (1, 2, 7, 30):  # through graphs of several shapes
        part = await engine.embed_one(EmbedRequest(texts[:size]))
        assert worst_cosine(part.vectors, expected[:size]) >= SAME


async def test_concurrent_forwards_do_not_mix_their_batches(
    model: LocalModel, reference: tuple[list[str], np.ndarray]
) -> None:
    texts, expected = reference
    engine = Engine(model, max_batch_tokens=512, forwards_in_flight=2)
    answers = await asyncio.gather(*(engine.embed_one(EmbedRequest([text])) for text in texts))
    vectors = np.concatenate([answer.vectors for answer in answers if isinstance(answer, EmbedResult)])
    assert worst_cosine(vectors, expected) >= SAME


async def test_the_vector_of_a_text_is_the_same_in_any_batch(model: LocalModel, sentences: Sentences) -> None:
    tokens = [one for one in await model.tokenize(sentences(64, 2), "", "end") if isinstance(one, Tokens)]
    alone = (await model.forward(tokens[:1]))[0]
    for size in range(1, 64):
        together = (await model.forward(tokens[:size]))[0]
        # Other shapes use other kernels.
        assert worst_cosine(alone[None], together[None]) >= SAME


async def test_a_model_that_makes_the_host_wait_runs_without_graphs(
    minilm_folder: Path, tmp_path: Path, sentences: Sentences
) -> None:
    """Weighted mean pooling reads the number of tokens back from the card."""
    folder = tmp_path / "weightedmean"
    shutil.copytree(minilm_folder, folder)
    (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 384, "pooling_mode": "weightedmean"}')
    weighted = LocalModel(str(folder), device="cuda")
    await weighted.warm_up(1024, 2)
    assert weighted._forward._gpu is not None
    assert [len(worker.graphs) for worker in weighted._forward._gpu._idle] == [0, 0]
    texts = sentences(64, 4)
    tokens = [one for one in await weighted.tokenize(texts, "", "end") if isinstance(one, Tokens)]
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts)
    assert worst_cosine(await weighted.forward(tokens), expected) >= SAME
    assert torch.cuda.get_sync_debug_mode() == 0
    await weighted.close()


async def test_float32_vectors_are_those_of_encode(minilm_folder: Path, sentences: Sentences) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    single = load_model("local", device="cuda", dtype="float32")
    assert isinstance(single, LocalModel) and single.pads
    texts = sentences(64, 3)
    tokens = [one for one in await single.tokenize(texts, "", "end") if isinstance(one, Tokens)]
    expected = SentenceTransformer(str(minilm_folder), device="cuda").encode(texts)
    assert np.abs(await single.forward(tokens) - expected).max() <= 1e-5
    await single.close()


async def test_out_of_memory_is_survived(model: LocalModel, reference: tuple[list[str], np.ndarray]) -> None:
    texts, expected = reference
    _, total = torch.cuda.mem_get_info()
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + (64 << 20)) / total))
        answer = await Engine(model, max_batch_tokens=1 << 22).embed_one(EmbedRequest(texts * 20))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert worst_cosine(answer.vectors, np.tile(expected, (20, 1))) >= SAME


async def test_scores_of_pairs_are_near_those_of_predict(tiny_cross_encoder: Callable[..., Path]) -> None:
    """Through a graph with filler, and in the shape of the batch."""
    folder = tiny_cross_encoder("bert", activation="Identity")
    reranker = load_reranker(str(folder), device="cuda")
    await reranker.warm_up(1024, 1)
    query, texts = "the dog", ["a cat", "the dog of my sister", "thunder at night " * 8] * 30
    expected = CrossEncoder(str(folder), device="cpu").predict([(query, text) for text in texts[:3]])
    tokens = [one for one in await reranker.tokenize(texts, query, "end") if isinstance(one, Tokens)]
    for batch in (tokens[:3], tokens):
        logits = (await reranker.forward(batch))[:, 1]
        assert np.abs(logits.reshape(-1, 3) - expected).max() <= 0.2  # bfloat16 has eight bits
    await reranker.close()
