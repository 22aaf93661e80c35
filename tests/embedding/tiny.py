"""Tiny models with random weights that sentence-transformers has made and saved to a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def save_cross_encoder(folder: Path, backbone: Path, activation: str | None = None, longest: int = 64) -> Path:
    """A CrossEncoder around a backbone that classifies sequences; `activation` is the name of a module of torch.nn."""
    import torch
    from sentence_transformers import CrossEncoder

    made = getattr(torch.nn, activation)() if activation else None
    CrossEncoder(str(backbone), device="cpu", max_length=longest, activation_fn=made).save_pretrained(
        str(folder / "model"), create_model_card=False
    )
    return folder / "model"


def save_backbone(folder: Path, vocabulary: Path, kind: str, head: str = "Model", **more: Any) -> Path:
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
    names_of_inputs = ["input_ids", "token_type_ids", "attention_mask"]
    if head != "Model" and kind not in ("bert", "deberta", "electra"):  # which do not tell the parts of a pair apart
        names_of_inputs.remove("token_type_ids")
    tokenizer = transformers.AutoTokenizer.from_pretrained(vocabulary, model_input_names=names_of_inputs)
    tokenizer.save_pretrained(folder)
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


def save(
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
