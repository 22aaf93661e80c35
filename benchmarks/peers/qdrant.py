"""Qdrant's local mode (no server; numpy), in memory, with one collection for each user, searched by vector.

    python -m benchmarks.peers.qdrant --model FOLDER --corpus FOLDER --port 8500

Qdrant's server is a separate binary that PyPI does not have. Local mode is not thread-safe, so there is one lock.
"""

import threading

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams
from starlette.concurrency import run_in_threadpool

from benchmarks.peers.arguments import parser
from benchmarks.peers.corpus import Corpus, collections

TOP_K = 10


def fill(client: QdrantClient, corpus: Corpus) -> None:
    for name, part in collections(corpus).items():
        client.create_collection(
            name, vectors_config=VectorParams(size=corpus.vectors.shape[1], distance=Distance.COSINE)
        )
        points = zip(part.ids(name), part.vectors.tolist(), part.texts, strict=True)
        client.upsert(name, [PointStruct(id=i, vector=vector, payload={"text": text}) for i, vector, text in points])


def application(client: QdrantClient) -> FastAPI:
    api, lock = FastAPI(), threading.Lock()

    def find(user: str, body: bytes) -> Response:
        vector = orjson.loads(body)["vector"]
        with lock:
            points = client.query_points(user, query=vector, limit=TOP_K, with_payload=True).points
        found = [{"id": point.id, "text": point.payload["text"], "score": point.score} for point in points]
        return Response(orjson.dumps({"results": found}), media_type="application/json")

    @api.post("/v1/users/{user}/memories/search")
    async def post(user: str, request: Request) -> Response:
        return await run_in_threadpool(find, user, await request.body())

    return api


def main() -> None:
    options = parser(__doc__).parse_args()
    client = QdrantClient(":memory:")
    fill(client, Corpus.read(options.corpus))
    uvicorn.run(application(client), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
