"""The provider `openai`: one memserve embeds by calling another."""

from pathlib import Path

import numpy as np

from tests.cluster.server import Server


def test_a_memserve_in_front_of_a_memserve(server: Server, tmp_path: Path) -> None:
    model = {"provider": "openai", "name": "all-MiniLM-L6-v2", "base_url": f"{server.url}/v1"}
    front = Server(tmp_path, {"model": model, "embedder": {"num_cpus": 0.1}})
    texts = ["a remote text", "and another one"]
    try:
        assert "model all-MiniLM-L6-v2 on remote (float32)" in front.start()
        with front.client() as ours, server.client() as theirs:
            near, far = (http.post("/v1/embeddings", json={"input": texts}).json() for http in (ours, theirs))
            assert np.array_equal(*([entry["embedding"] for entry in answer["data"]] for answer in (near, far)))
            assert ours.post("/v1/users/u/memories", json={"text": texts[0]}).status_code == 201
            body = {"query": texts[0], "mode": "vector"}
            (found,) = ours.post("/v1/users/u/memories/search", json=body).json()["results"]
            assert found["score"] > 0.999
            wrong = ours.post("/v1/embeddings", json={"input": [[101, 999_999, 102]]})
            assert wrong.status_code == 400
            assert "999999" in wrong.json()["error"]["message"]
    finally:
        front.stop()
