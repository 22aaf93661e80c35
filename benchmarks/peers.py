"""What people put in front of a model today, as small as it is usually written: the baselines of the benchmarks.

    python -m benchmarks.peers plain-batch --port 8100    # Ray Serve: @serve.batch(32, 10 ms), two replicas
    python -m benchmarks.peers lock --port 8200           # FastAPI, one model behind a lock, one text at a time

Both answer `POST /v1/embeddings` with base64 vectors, and end with their process.
"""

import argparse
import asyncio
import base64
import os
import sys
import threading
from typing import Any

import numpy as np
import orjson
from fastapi import FastAPI, Request, Response

from deployments.__main__ import supervise
from deployments.embedding.load import DEFAULT_MODEL, resolve

THREADS_OF_A_REPLICA = 1


def load(dtype: str, threads: int | None) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer

    if threads is not None:
        torch.set_num_threads(threads)
    return SentenceTransformer(
        resolve(DEFAULT_MODEL), device="cpu", local_files_only=True, model_kwargs={"dtype": getattr(torch, dtype)}
    )


def answer(vectors: list[np.ndarray]) -> Response:
    data = [
        {
            "object": "embedding",
            "index": n,
            "embedding": base64.b64encode(np.asarray(row, np.float32).tobytes()).decode(),
        }
        for n, row in enumerate(vectors)
    ]
    return Response(orjson.dumps({"object": "list", "data": data}), media_type="application/json")


async def inputs(request: Request) -> list[str]:
    given = orjson.loads(await request.body())["input"]
    return [given] if isinstance(given, str) else given


def locked(dtype: str) -> FastAPI:
    """One model behind a lock."""
    model, lock, api = load(dtype, None), threading.Lock(), FastAPI()

    def embed(texts: list[str]) -> list[np.ndarray]:
        rows = []
        for text in texts:
            with lock:
                rows.append(model.encode([text], convert_to_tensor=True).float().numpy()[0])
        return rows

    @api.post("/v1/embeddings")
    async def post(request: Request) -> Response:
        return answer(await asyncio.to_thread(embed, await inputs(request)))

    return api


def serve_plain_batch(dtype: str, port: int) -> int:
    """Ray Serve with its own batching, as its documentation shows it."""
    os.environ |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    base = 20_000 + port % 1_000 * 10
    for name, offset in (("DIRECT_INGRESS_MIN_HTTP", 0), ("DIRECT_INGRESS_MAX_HTTP", 8), ("FALLBACK_PROXY_HTTP", 9)):
        os.environ[f"RAY_SERVE_{name}_PORT"] = str(base + offset)
    os.environ |= {
        "RAY_SERVE_HAPROXY_STATS_PORT": str(port + 1),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(port + 2),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }
    import ray
    from ray import serve

    class Embedder:
        def __init__(self) -> None:
            self.model = load(dtype, THREADS_OF_A_REPLICA)

        @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
        async def embed(self, texts: list[str]) -> list[np.ndarray]:
            return list(self.model.encode(texts, convert_to_tensor=True).float().numpy())

    class Gateway:
        def __init__(self, embedder: Any) -> None:
            self.embedder = embedder

        def __serve_build_asgi_app__(self) -> FastAPI:
            api = FastAPI()

            @api.post("/v1/embeddings")
            async def post(request: Request) -> Response:
                texts = await inputs(request)
                return answer(await asyncio.gather(*(self.embedder.embed.remote(text) for text in texts)))

            return api

    ray.init(address="local", namespace="serve", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
    options: dict[str, Any] = {"num_replicas": 2, "max_ongoing_requests": 4096}
    embedder = serve.deployment(Embedder, ray_actor_options={"num_cpus": 0.7}, **options).bind()
    gateway = serve.deployment(
        serve.ingress()(Gateway), max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0.2}
    ).bind(embedder)
    serve.run(gateway, name="plain-batch", blocking=True)
    return 0


def serve_locked(dtype: str, port: int) -> int:
    import uvicorn

    uvicorn.run(locked(dtype), host="127.0.0.1", port=port, log_level="warning")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=["plain-batch", "lock"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    serve_it = {"plain-batch": serve_plain_batch, "lock": serve_locked}[options.peer]
    return supervise(lambda: serve_it(options.dtype, options.port))


if __name__ == "__main__":
    sys.exit(main())
