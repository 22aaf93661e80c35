"""The Reranker deployment in a live Serve: it starts with the first request to rerank, and its scores are predict's."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from sentence_transformers import CrossEncoder

from deployments.embedding.load import DEFAULT_MODEL, resolve
from tests.cluster.server import Server
from tests.embedding.tiny import save_backbone, save_cross_encoder

STARTS_WITHIN_S = 120.0
QUERY = "what is the dog afraid of"
TEXTS = ["the dog hides from thunder", "it rains", "dogs", "a cat sleeps " * 40]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a tiny cross-encoder."""
    backbone, folder = tmp_path / "backbone", tmp_path / "cross-encoder"
    for made in (backbone, folder):
        made.mkdir()
    vocabulary = Path(resolve(DEFAULT_MODEL))
    save_backbone(backbone, vocabulary, "bert", head="ForSequenceClassification", num_labels=1)
    return save_cross_encoder(folder, backbone)


@pytest.fixture
def server(tmp_path: Path, folder: Path) -> Iterator[Server]:
    args = {
        "model": {"provider": "fake", "name": "fake"},
        "embedder": {"max_replicas": 1, "num_cpus": 0.2},
        "reranker": {"model": str(folder), "dtype": "float32", "max_replicas": 1, "num_cpus": 0.5},
    }
    server = Server(tmp_path, args)
    server.start()
    yield server
    server.stop()


def test_it_starts_with_the_first_request_and_scores_as_predict_does(server: Server, folder: Path) -> None:
    with httpx.Client(base_url=server.url, timeout=STARTS_WITHIN_S) as http:
        assert http.get("/health/ready").status_code == 200
        assert server.replicas("Reranker") == set()
        answer = http.post("/v1/rerank", json={"query": QUERY, "documents": TEXTS})
        assert answer.status_code == 200, answer.text
        assert len(server.replicas("Reranker")) == 1
        results = answer.json()["results"]
        theirs = CrossEncoder(str(folder), device="cpu", local_files_only=True).predict([(QUERY, one) for one in TEXTS])
        ours = np.empty(len(TEXTS), np.float32)
        ours[[one["index"] for one in results]] = [one["relevance_score"] for one in results]
        assert np.abs(ours - theirs).max() <= 1e-5
        assert [one["index"] for one in results] == np.argsort(-theirs).tolist()
        assert answer.json()["model"] == str(folder)
        ranks = http.post("/rerank", json={"query": QUERY, "texts": TEXTS, "truncate": True}).json()
        assert [one["index"] for one in ranks] == np.argsort(-theirs).tolist()
        memories = [{"id": str(n), "text": text} for n, text in enumerate(TEXTS)]
        assert http.post("/v1/users/anna/memories", json={"memories": memories}).status_code == 201
        body = {"query": QUERY, "rerank": True, "explain": True}
        found = http.post("/v1/users/anna/memories/search", json=body).json()["results"]
        assert [one["id"] for one in found] == [str(n) for n in np.argsort(-theirs)]
        assert [one["scores"]["rerank"] for one in found] == [one["score"] for one in found]
