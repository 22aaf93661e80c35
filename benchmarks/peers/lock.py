"""One model behind a lock in FastAPI.

    python -m benchmarks.peers.lock --model FOLDER --port 8200

This is what most people write first.
"""

import threading

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from benchmarks.peers.arguments import parser
from benchmarks.peers.model import Encoder
from benchmarks.peers.wire import answer, inputs


def application(encode: Encoder) -> FastAPI:
    api, lock = FastAPI(), threading.Lock()

    def embed(body: bytes) -> Response:
        texts = inputs(body)
        with lock:
            vectors = encode(texts)
        return Response(answer(vectors), media_type="application/json")

    @api.post("/v1/embeddings")
    async def post(request: Request) -> Response:
        return await run_in_threadpool(embed, await request.body())

    return api


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=int, default=2)
    options = arguments.parse_args()
    encode = Encoder(options.model, options.dtype, options.threads)
    uvicorn.run(application(encode), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
