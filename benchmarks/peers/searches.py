"""A closed loop of searches by vector. Prints one line of JSON, as benchmarks.load does.

    python -m benchmarks.peers.searches --url URL --corpus FOLDER --shape memserve --users user-0 user-1

With `--shape chroma`, `--users` are Chroma's ids of collections.
"""

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

import orjson
import uvloop

from benchmarks.connections import Connections
from benchmarks.load import Load, Samples, closed_loop, result_of
from benchmarks.peers.corpus import Corpus
from benchmarks.workload import Request

TOP_K = 10
CHROMA = "/api/v2/tenants/default_tenant/databases/default_database/collections"


def path_and_body(shape: str, user: str, vector: list[float]) -> tuple[str, bytes]:
    """Path and body of a search for the ten nearest memories with their texts."""
    if shape == "chroma":
        body = {"query_embeddings": [vector], "n_results": TOP_K, "include": ["documents", "distances"]}
        return f"{CHROMA}/{user}/query", orjson.dumps(body)
    return f"/v1/users/{user}/memories/search", orjson.dumps({"vector": vector, "top_k": TOP_K})


async def drive(load: Load, requests: list[Request]) -> Samples:
    rng = random.Random(load.seed)
    async with Connections(load.url) as server:
        return await closed_loop(server, lambda: rng.choice(requests), load)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--shape", choices=["memserve", "chroma"], required=True)
    parser.add_argument("--users", nargs="+", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--warm-s", type=float, default=1.0)
    parser.add_argument("--measure-s", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    queries = Corpus.read(options.corpus).queries.tolist()
    # Made beforehand, because the generator shares its cores with the server.
    requests = [
        Request(*path_and_body(options.shape, options.users[n % len(options.users)], query), 1)
        for n, query in enumerate(queries)
    ]
    load = Load(
        url=options.url,
        job="search",
        clients=options.clients,
        warm_s=options.warm_s,
        measure_s=options.measure_s,
        seed=options.seed,
    )
    samples = uvloop.run(drive(load, requests))
    print(json.dumps(asdict(result_of(load, samples))))


if __name__ == "__main__":
    main()
