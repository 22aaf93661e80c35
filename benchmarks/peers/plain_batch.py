"""Ray Serve with its own batching, as in its documentation: `@serve.batch(32, 10 ms)` around `encode`.

    python -m benchmarks.peers.plain_batch --model FOLDER --port 8100

As with memserve, HAProxy is in front, the mode is throughput-optimized, and the replicas use all cores.
"""

import asyncio
import os
import sys
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response

from benchmarks.peers.arguments import parser
from benchmarks.peers.model import Encoder
from benchmarks.peers.wire import answer, inputs
from deployments.serving.processes import supervise


def serve_it(model: str, dtype: str, port: int, replicas: int, threads: int) -> int:
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
            self.encode = Encoder(model, dtype, threads)

        @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
        async def embed(self, texts: list[str]) -> list[np.ndarray]:
            return list(self.encode(texts))

    class Gateway:
        def __init__(self, embedder: Any) -> None:
            self.embedder = embedder

        def __serve_build_asgi_app__(self) -> FastAPI:
            api = FastAPI()

            @api.post("/v1/embeddings")
            async def post(request: Request) -> Response:
                texts = inputs(await request.body())
                vectors = await asyncio.gather(*(self.embedder.embed.remote(text) for text in texts))
                return Response(answer(vectors), media_type="application/json")

            return api

    ray.init(address="local", namespace="serve", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
    embedder = serve.deployment(
        Embedder, num_replicas=replicas, max_ongoing_requests=4096, ray_actor_options={"num_cpus": 1.4 / replicas}
    ).bind()
    gateway = serve.deployment(
        serve.ingress()(Gateway), max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0.2}
    ).bind(embedder)
    serve.run(gateway, name="plain-batch", blocking=True)
    return 0


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--replicas", type=int, default=2)
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args()
    return supervise(lambda: serve_it(options.model, options.dtype, options.port, options.replicas, options.threads))


if __name__ == "__main__":
    sys.exit(main())
