"""mem0 with memories that are added unchanged (`infer=False`), embedded by its huggingface embedder, and searched.

    python -m benchmarks.peers.mem0 --model FOLDER --port 8400

The server has memserve's routes, and a lock, because threads break the local stores: adds on the local Qdrant raise
SystemError, and every later search raises IndexError. `POST /direct/add` and `/direct/search` measure how many calls a
second one caller makes in mem0's own process, without HTTP.
"""

import argparse
import os
import random
import tempfile
import threading
import time
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from benchmarks.peers.arguments import parser
from benchmarks.peers.corpus import USERS, Corpus, collections
from benchmarks.workload import texts

STORES = ("qdrant", "chroma", "faiss")
TOP_K = 10
ADDED_TO = 1_000  # users, as in the load generator


def memory(options: argparse.Namespace, folder: str) -> Any:
    """A mem0 Memory that keeps all its files in `folder`."""
    # mem0 reads these variables when it is imported. It makes an LLM client at once, but nothing here calls one.
    os.environ |= {"MEM0_TELEMETRY": "False", "MEM0_DIR": folder, "OPENAI_API_KEY": "unused"}
    import torch
    from mem0 import Memory

    torch.set_num_threads(options.threads)
    collection: dict[str, Any] = {"collection_name": "memories", "path": f"{folder}/{options.store}"}
    if options.store != "chroma":
        collection["embedding_model_dims"] = 384
    if options.store == "qdrant":
        collection["on_disk"] = True
    made = Memory.from_config(
        {
            "embedder": {
                "provider": "huggingface",
                "config": {
                    "model": options.model,
                    "model_kwargs": {"device": "cpu", "model_kwargs": {"dtype": getattr(torch, options.dtype)}},
                },
            },
            "vector_store": {"provider": options.store, "config": collection},
            "history_db_path": f"{folder}/history.db",
        }
    )
    if options.corpus:
        fill(made, Corpus.read(options.corpus))
    return made


def fill(made: Any, corpus: Corpus) -> None:
    """Put the memories of the small users into the vector store, as `add` would, but many at a time."""
    for user, part in collections(corpus, large=False).items():
        payloads = [{"user_id": user, "data": text, "text_lemmatized": text, "role": "user"} for text in part.texts]
        made.vector_store.insert(vectors=part.vectors.tolist(), ids=part.ids(user), payloads=payloads)


def add(made: Any, user: str, text: str) -> dict[str, Any]:
    found: dict[str, Any] = made.add(text, user_id=user, infer=False)
    return found


def search(made: Any, user: str, query: str) -> dict[str, Any]:
    found: dict[str, Any] = made.search(query, top_k=TOP_K, filters={"user_id": user}, threshold=0.0)
    return found


def calls_per_s(made: Any, job: str, users: int, measure_s: float, seed: int) -> float:
    """Calls a second of one caller, who waits for each."""
    rng = random.Random(seed)
    source = texts("short", rng)
    call = {"add": add, "search": search}[job]
    done, begun = 0, time.perf_counter()
    while time.perf_counter() < begun + measure_s:
        call(made, f"user-{rng.randrange(users)}", next(source))
        done += 1
    return done / (time.perf_counter() - begun)


def application(made: Any, users: int) -> FastAPI:
    api, lock = FastAPI(), threading.Lock()

    def locked(call: Any, *arguments: Any) -> Response:
        with lock:
            found = call(made, *arguments)
        return Response(orjson.dumps(found), media_type="application/json")

    @api.post("/v1/users/{user}/memories")
    async def post_memory(user: str, request: Request) -> Response:
        return await run_in_threadpool(locked, add, user, (await request.json())["text"])

    @api.post("/v1/users/{user}/memories/search")
    async def post_search(user: str, request: Request) -> Response:
        return await run_in_threadpool(locked, search, user, (await request.json())["query"])

    @api.post("/direct/{job}")
    async def post_direct(job: str, measure_s: float, seed: int) -> Response:
        return await run_in_threadpool(locked, calls_per_s, job, users, measure_s, seed)

    return api


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--store", choices=STORES, default="qdrant")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="mem0-") as folder:
        made = memory(options, folder)
        uvicorn.run(
            application(made, USERS if options.corpus else ADDED_TO),
            host="127.0.0.1",
            port=options.port,
            log_level="warning",
        )


if __name__ == "__main__":
    main()
