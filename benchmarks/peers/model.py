"""The model of the peers that do not load one themselves: SentenceTransformer and its `encode`."""

from typing import Any

import numpy as np


class Encoder:
    """`encode` of sentence-transformers on the CPU, with `threads` intra-op threads."""

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        self._model: Any = SentenceTransformer(
            model, device="cpu", local_files_only=True, model_kwargs={"dtype": getattr(torch, dtype)}
        )

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Embed texts. Returns (n, dim) float32, L2-normalised if the model's folder says so."""
        vectors: np.ndarray = self._model.encode(texts, convert_to_tensor=True, show_progress_bar=False).float().numpy()
        return vectors
