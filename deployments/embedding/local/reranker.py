"""A sentence-transformers cross-encoder on this machine's CPU or GPU.

It is a model like any other to the engine: its inputs are texts, the query that they are scored for is the prompt, and
the "vector" of a text is its score, twice: (score, logit). The score is the logit after the model's activation, as
`CrossEncoder.predict` gives it. The model's own modules run, as those of an embedding model do (forward.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from deployments.embedding.local.model import SAMPLES, LocalModel
from deployments.embedding.local.pairs import Pairs
from deployments.embedding.local.spec import Spec, load_cross_encoder
from deployments.embedding.model import Tokens

_SAMPLE_QUERY = "What is Rex afraid of?"


class LocalReranker(LocalModel):
    """See the module. The arguments are those of LocalModel.

    Raises:
        ModelUnavailable: it cannot be loaded, or its scores would differ from those of `predict`; one line for an
            operator.
    """

    def _load(self, path: str, **options: Any) -> Any:
        network = load_cross_encoder(path, **options)
        self._activation = network.activation_fn
        return network

    def _tokenizers_of(self, tokenizer: Tokenizer, spec: Spec) -> Pairs:
        return Pairs(tokenizer, spec)

    def _sample_prompt(self, spec: Spec) -> str:
        return _SAMPLE_QUERY

    def _results_of_samples(self, network: Any) -> np.ndarray:
        pairs = [(_SAMPLE_QUERY, text) for text in SAMPLES]
        logits = network.predict(pairs, batch_size=1, show_progress_bar=False, activation_fn=torch.nn.Identity())
        return np.asarray(logits, np.float32)[:, None]

    async def forward(self, batch: Sequence[Tokens]) -> np.ndarray:
        """Score one batch. Returns (batch, 2) float32, in its order: the scores, and the logits that they are of."""
        logits = await super().forward(batch)  # (batch, 1)
        with torch.inference_mode():
            scores = self._activation(torch.from_numpy(logits)).numpy()
        return np.concatenate([scores, logits], axis=1)
