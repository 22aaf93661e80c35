"""Measure a GPU host: the engine compared with the card's matrix rate and with `encode`, and durable adds over HTTP.

    python -m benchmarks.gpu engine                # matrix rate, texts/s, share of the rate, `encode` on the same card
    python -m benchmarks.gpu serve                 # durable single adds and embeds over HTTP, on all cores
    python -m benchmarks.gpu table FILE...         # the main figures of results

`benchmarks/gpu.sh` runs these after the tests. `--device cpu` runs the same steps on a machine without a card.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import machine
from benchmarks.report import number, of_runs, ranged, table
from benchmarks.server import load, memserve, merged, parse_args, profile
from benchmarks.workload import seed_of

Found = dict[str, Any]

# Name -> words in a text. The model truncates the longest at 256 tokens.
MIXES = {"8 words": 8, "32 words": 32, "256 tokens": 300}
ADDS_PER_S = 10_000  # the target


def matrix_rate(device: str, dtype: str, size: int, repeats: int = 20) -> float:
    """Floating-point operations a second of a product of two square matrices, the best of the repeats."""
    import torch

    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(4):  # a single product would measure the launch of its kernel
            a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - began) / 4)
    return 2.0 * size**3 / best


async def engine_rows(options: argparse.Namespace) -> Found:
    """texts/s of the engine and of `encode`, which take turns, for texts of each length."""
    import torch
    from sentence_transformers import SentenceTransformer

    from benchmarks.engine_sweep import CLIENTS, WORDS, matrix_flops, run_engine
    from deployments.embedding.engine import Engine
    from deployments.embedding.load import load_model, resolve
    from deployments.embedding.local.model import LocalModel
    from deployments.embedding.model import Tokens

    model = load_model("local", options.model, device=options.device)
    assert isinstance(model, LocalModel)
    info, on_gpu = model.info, model.info.device.startswith("cuda")
    rate = matrix_rate(info.device, info.dtype, 8192 if on_gpu else 1024)
    found: Found = {"model": info.name, "device": info.device, "dtype": info.dtype, "matrix_flops_per_s": rate}
    reference = SentenceTransformer(
        resolve(options.model), device=info.device, model_kwargs={"dtype": getattr(torch, info.dtype)}
    )
    engine = Engine(model)
    await engine.warm_up()
    random = np.random.default_rng(options.seed)
    found["rows"] = []
    for name, words in tqdm(MIXES.items(), desc="engine"):
        count = options.texts * 8 // words if words > 8 else options.texts
        texts = [" ".join(random.choice(WORDS, words)) for _ in range(max(CLIENTS, count))]
        lengths = [len(one) for one in await model.tokenize(texts, "", "end") if isinstance(one, Tokens)]
        flops = matrix_flops(reference, lengths)
        reference.encode(texts[:64])
        taken: dict[str, list[float]] = {"encode": [], "engine": [], "clients": []}
        for _ in range(options.repeats):
            began = time.perf_counter()
            reference.encode(texts, batch_size=256 if on_gpu else 32)
            taken["encode"].append(time.perf_counter() - began)
            for way, one_each in (("engine", False), ("clients", True)):
                began = time.perf_counter()
                await run_engine(engine, texts, one_each=one_each)
                taken[way].append(time.perf_counter() - began)
        runs = [
            {
                "encode_texts_per_s": len(texts) / encode_s,
                "engine_texts_per_s": len(texts) / engine_s,
                "clients_texts_per_s": len(texts) / clients_s,
                "times_encode": encode_s / engine_s,
                "flops_per_s": flops / engine_s,
                "share_of_matrix_rate": flops / engine_s / rate,
            }
            for encode_s, engine_s, clients_s in zip(*taken.values(), strict=True)
        ]
        found["rows"].append({"mix": name, "tokens": sum(lengths) / len(lengths), "texts": len(texts), "runs": runs})
    await model.close()
    return found


def serve_rows(options: argparse.Namespace) -> Found:
    """Durable single adds and embeds of one short text over HTTP, with more and more clients."""
    settings = merged(profile(), {"model": {"device": options.device, "name": options.model}}, options.args)
    rows: list[Found] = []
    with memserve(settings) as server:
        found: Found = {**server.ready, "settings": settings, "load_processes": options.processes}
        plan = [(job, clients) for job in ("add", "embed") for clients in options.clients]
        for job, clients in plan:
            rows.append({"job": job, "clients": clients, "runs": []})
        with tqdm(total=options.repeats * len(rows), desc="serve") as bar:
            for turn in range(options.repeats):
                for row in rows:
                    arguments = ["--job", row["job"], "--clients", row["clients"], "--measure-s", options.measure_s]
                    arguments += ["--processes", min(options.processes, row["clients"])]
                    seed = seed_of(options.seed, turn, row["job"], row["clients"])
                    row["runs"].append(load(server.url, *arguments, "--seed", seed))
                    bar.update()
    return {**found, "rows": rows}


def lines_of(results: Iterable[Found]) -> list[list[str]]:
    """Rows of (figure, value, target, hardware and model)."""
    lines = []
    for found in results:
        hardware = (found["gpus"] or ["a card"])[0] if found["device"].startswith("cuda") else found["cpu"]
        on = f"{hardware}, {found['model']}, {found['dtype']}, {found['commit'][:8]}"
        if found["kind"] == "gpu-engine":
            lines.append(["matrix products", f"{number(found['matrix_flops_per_s'] / 1e12)} TFLOP/s", "", on])
            for row in found["rows"]:
                short, long = row["mix"] == "8 words", row["mix"] == "256 tokens"
                seen = row["runs"]
                rates = [ranged(of_runs(seen, key)) for key in ("engine_texts_per_s", "clients_texts_per_s")]
                lines.append([f"engine, {row['mix']}", f"{rates[0]} texts/s; 64 callers {rates[1]}", "", on])
                times = ranged(of_runs(seen, "times_encode"))
                lines.append([f"engine / `encode`, {row['mix']}", f"{times}x", "3x" if short else "", on])
                share = number(100 * of_runs(seen, "share_of_matrix_rate").median)
                lines.append([f"share of the matrix rate, {row['mix']}", f"{share} %", "50 %" if long else "", on])
        elif found["kind"] == "gpu-serve":
            for job, name, target in (("add", "durable single adds", f"{ADDS_PER_S:,}/s"), ("embed", "embeds", "")):
                rows = [row for row in found["rows"] if row["job"] == job]
                best = max(rows, key=lambda row: of_runs(row["runs"], "texts_per_s").median)
                rate, p99 = of_runs(best["runs"], "texts_per_s"), of_runs(best["runs"], "p99_ms").median
                value = f"{ranged(rate)}/s at {best['clients']} clients, p99 {number(p99)} ms"
                lines.append([f"{name} over HTTP", value, target, on])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["engine", "serve", "table"])
    parser.add_argument("files", type=Path, nargs="*", help="the results for `table`")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument(
        "--texts", type=int, default=65_536, help="engine: short texts in one measurement; fewer if they are longer"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--processes", type=int, default=max(1, machine.cores() // 4), help="load generator processes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure-s", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--args", type=parse_args, default={}, help="settings over this machine's profile, as JSON")
    parser.add_argument("--commit", help="the commit of a copy without git")
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    options = parser.parse_args()
    if options.part == "table":
        results = [json.loads(path.read_text()) for path in options.files]
        print(table(["figure", "measured", "target", "with"], lines_of(results)))
        return
    found: Found = {"kind": f"gpu-{options.part}", **machine.provenance(options.commit)}
    found |= asyncio.run(engine_rows(options)) if options.part == "engine" else serve_rows(options)
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"gpu-{options.part}-{machine.stem(found)}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(table(["figure", "measured", "target", "with"], lines_of([found])))
    print(path)


if __name__ == "__main__":
    main()
