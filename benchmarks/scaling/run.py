"""How replicas follow an open-loop load up and down, and how long a step up raises the latency.

    python -m benchmarks.scaling               # about 4 minutes on two cores

Serves the default serve_config.yaml with shorter delays, and with targets that two cores can exceed. First the capacity
of one embedder is measured. Then the load stays at a share of it, steps above it, and steps down again. Requests embed
four texts, add two memories or search by one text, in equal parts; other requests search by a vector. Texts have 24 to
40 words, so that the embedder and not the client on the same cores is the limit. Latency counts from the moment a
request was due.

Every search asks for all memories of its user. The answer must have each memory that was acknowledged before the search
was sent. At the end every user is listed, and must have each acknowledged memory once. The main figure is the time from
the step up until the 99th percentile of a second is below the target for five seconds in a row.

Writes benchmarks/results/scaling-<machine>-<commit>.json, a Markdown report next to it, and its plot.
"""

import argparse
import multiprocessing
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks import machine, report
from benchmarks.scaling.client import Phase, run_capacity, run_client
from benchmarks.scaling.figures import by_second, recovered_s, table
from benchmarks.scaling.observer import Observer, ray_address, watch
from benchmarks.server import memserve, merged, parse_args

SETTINGS = {
    "embedder": {"upscale_delay_s": 2.0, "downscale_delay_s": 15.0},
    "store": {"upscale_delay_s": 2.0, "downscale_delay_s": 15.0, "target_busy": 0.33},
    "gateway": {"upscale_delay_s": 2.0, "downscale_delay_s": 15.0, "target_ongoing_requests": 16.0},
}
PHASES = (Phase("low", 20, 0.4, 10), Phase("high", 75, 1.25, 60), Phase("low again", 60, 0.3, 5))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--per-s", type=float, help="capacity of one embedder in requests a second; default: measured")
    parser.add_argument("--target-ms", type=float, default=500.0, help="target of the 99th percentile")
    parser.add_argument("--high", type=float, default=PHASES[1].share, help="the load after the step, in embedders")
    parser.add_argument("--stretch", type=float, default=1.0, help="factor for the duration of all phases")
    parser.add_argument("--args", type=parse_args, default={}, help="JSON settings that override the scenario's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--commit", help="the commit of a copy without git")
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    options = parser.parse_args()
    phases = [
        phase._replace(
            seconds=phase.seconds * options.stretch, share=options.high if phase.name == "high" else phase.share
        )
        for phase in PHASES
    ]
    found = {"kind": "scaling", **machine.provenance(options.commit), "target_ms": options.target_ms}
    settings = merged(SETTINGS, options.args)
    spawn = multiprocessing.get_context("spawn")
    with memserve(settings) as server, ProcessPoolExecutor(1, spawn) as pool:
        found |= {name: server.ready[name] for name in ("model", "device", "dtype")}
        observer = Observer(ray_address(server.folder))
        per_s = options.per_s
        if per_s is None:
            per_s = pool.submit(run_capacity, server.url, options.seed).result()
        observer.wait_until_calm()
        started = time.monotonic() + 2.0  # the client's process starts
        client = pool.submit(run_client, server.url, phases, per_s, started, options.seed)
        samples = watch(observer, client)
        outcome = client.result()
        observer.close()
    seconds = int(sum(phase.seconds for phase in phases))
    rows = by_second(outcome.requests, started, seconds)
    low, high = phases[0].seconds, phases[0].seconds + phases[1].seconds
    errors = Counter(seen.error for seen in outcome.requests if seen.error)
    found |= {
        "settings": settings,
        "seed": options.seed,
        "phases": [phase._asdict() for phase in phases],
        "per_embedder_per_s": per_s,
        "recovered_s": recovered_s(rows, low, high, options.target_ms),
        "requests": len(outcome.requests),
        "errors": dict(errors),
        "acknowledged": outcome.acknowledged,
        "missing": outcome.missing[:100],
        "seconds": rows,
        "samples": [{**asdict(sample), "at": round(sample.at - started, 2)} for sample in samples],
    }
    print(table(found))
    print("\n".join(map(str, report.save(found, options.results / f"scaling-{machine.stem(found)}.json"))))
