"""The Reranker deployment: an Embedder whose model is a cross-encoder (deployments/embedding/local/reranker.py).

It exists only if `reranker.model` is set. It batches pairs as an Embedder batches texts.
"""

from deployments.embedder import Embedder
from deployments.embedding.load import load_reranker
from deployments.embedding.model import Model
from deployments.settings import EmbedderSettings, Settings


class Reranker(Embedder):
    """One replica: one cross-encoder on one device."""

    deployment = "Reranker"

    def _replicas(self, settings: Settings) -> EmbedderSettings:
        return settings.reranker

    def _load(self, settings: Settings, num_threads: int) -> Model:
        return load_reranker(**settings.reranker.of_model(), num_threads=num_threads)
