"""Latency of searches by vector through Serve handles, one search at a time.

    python -m benchmarks.store_handle [--sizes 1000,100000] [--searches 1000]

A search through the app's handle takes two hops (gateway, store) and the index; one through the handle of the Store
deployment takes one hop, as a gateway's call does. Fills a log in this process, serves it, and waits until background
work has built the large index. Prints a table and writes benchmarks/results/store-handle.json and its report. Run it in
the environment that serves: the driver joins the server's Ray by its address.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import machine, report
from benchmarks.store_bench import draw, fill
from deployments.serving.ray_internals import ON_LOOPBACK
from store import Search, Store

MODEL = "fake"
DIM = 384
TENANT = "default"
PARTITIONS = 64
ROUNDS = 5
SETTLED_MS = 8.0
SETTLE_WITHIN_S = 240.0


def serve(stack: ExitStack, folder: Path, url: str) -> None:
    config = yaml.safe_load((machine.ROOT / "serve_config.yaml").read_text())
    config["applications"][0]["args"] = {
        "model": {"provider": "fake", "name": MODEL, "dim": DIM},
        "embedder": {"num_cpus": 0.1},
        "store": {"url": url, "num_cpus": 0.2},
        "gateway": {"num_cpus": 0.2},
    }
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "PYTHONPATH": str(machine.ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "deployments", str(path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    stack.callback(process.wait)
    stack.callback(process.terminate)
    assert process.stdout is not None
    if not process.stdout.readline().startswith("memserve is ready"):
        raise SystemExit("the server did not start")


Ask = Callable[[str, np.ndarray], Awaitable[object]]


async def measure(ask: Ask, user: str, queries: np.ndarray) -> np.ndarray:
    """Search one after the other. Returns milliseconds: (len(queries),) float64."""
    taken = []
    for query in queries:
        started = time.perf_counter()
        await ask(user, query)
        taken.append((time.perf_counter() - started) * 1e3)
    return np.array(taken)


async def measure_all(app: Any, deployment: Any, sizes: list[int], searches: int) -> list[dict[str, Any]]:
    """Measure each user once its index is built. Returns the rows of the table."""
    from deployments.calls.store import StoreCalls

    calls = StoreCalls(deployment, partitions=PARTITIONS, append_in_flight=1, append_memories=1, max_wait_s=None)
    ways: dict[str, Ask] = {
        "app": lambda user, query: app.search.remote(user, vector=query.tolist()),
        "Store": lambda user, query: calls.search(Search(TENANT, user, query, 10)),
    }
    rows: list[dict[str, Any]] = []
    for size in sizes:
        user = f"user-{size}"
        started = time.perf_counter()
        cold_ms = (await measure(ways["app"], user, draw(1)))[0]
        while np.median(await measure(ways["app"], user, draw(20))) > SETTLED_MS:
            if time.perf_counter() - started > SETTLE_WITHIN_S:
                raise SystemExit(f"{user} did not settle in {SETTLE_WITHIN_S:g} s")
            await asyncio.sleep(1.0)
        settled_s = time.perf_counter() - started
        found: dict[str, list[np.ndarray]] = {way: [] for way in ways}
        for _ in range(ROUNDS):  # in turn, so that a change in the machine's speed affects both
            for way, ask in ways.items():
                found[way].append(await measure(ask, user, draw(searches // ROUNDS)))
        for way, taken in found.items():
            percentiles = {f"p{q}_ms": round(float(np.percentile(np.concatenate(taken), q)), 2) for q in (50, 90, 99)}
            first = {"cold_ms": round(float(cold_ms), 2), "settled_s": round(settled_s, 1)}
            rows.append({"handle": way, "memories": size, **(first if way == "app" else {}), **percentiles})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1000,100000")
    parser.add_argument("--searches", type=int, default=1000)
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = f"sqlite:///{folder}/memserve.db"
        store = Store.open(url, dim=DIM, model=MODEL)
        for size in sizes:
            fill(store, f"user-{size}", draw(size))
        store.close()
        serve(stack, folder, url)
        # The driver must use the same transport as the replicas. Ray reads these variables when it is imported.
        os.environ |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", **ON_LOOPBACK}
        import ray
        from ray import serve as ray_serve

        ray.init(address="auto", namespace="serve", log_to_driver=False, logging_level="ERROR")
        stack.callback(ray.shutdown)
        app = ray_serve.get_app_handle("memserve")
        deployment = ray_serve.get_deployment_handle("Store", "memserve")
        rows = asyncio.run(measure_all(app, deployment, sizes, options.searches))
    found = {"kind": "store-handle", **machine.provenance(), "rows": rows}
    print("\n".join(report.store_handle_report(found)))
    print("\n".join(map(str, report.save(found, machine.RESULTS / "store-handle.json"))))


if __name__ == "__main__":
    main()
