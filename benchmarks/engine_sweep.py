"""Sweep the engine over token budgets, length mixes and threads, against `encode` on the same texts.

    python -m benchmarks.engine_sweep       # this machine's CPU, or its first GPU
    benchmarks/gpu.sh                       # all measurements of a GPU host

Prints a table and writes JSON and a report to benchmarks/results/. The reference and the engine take turns. Each figure
is the best of the repeats: on a shared machine, slower repeats show what other processes took. If other processes use
the machine, trust the gain in CPU time; on CUDA it has no meaning.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from benchmarks import machine, report
from deployments.embedding.engine import EmbedRequest, Engine
from deployments.embedding.load import DEFAULT_MODEL, load_model, resolve
from deployments.embedding.local.model import LocalModel
from deployments.embedding.model import Tokens

WORDS = (machine.ROOT / "tests" / "embedding" / "words.txt").read_text().split()
CLIENTS = 64


def texts_of(mix: str, count: int, seed: int = 0) -> list[str]:
    """Texts in the lengths of a mix, from the words that the tests use."""
    random = np.random.default_rng(seed)
    lengths = {
        "4-12 words": lambda: random.integers(4, 13, count),
        "32 words": lambda: np.full(count, 32),
        "4-200 words, log-normal": lambda: np.clip(random.lognormal(3.4, 0.9, count), 4, 200).astype(int),
        "200 words": lambda: np.full(count, 200),
    }[mix]()
    return [" ".join(random.choice(WORDS, length)) for length in lengths]


MIXES = ("4-12 words", "32 words", "4-200 words, log-normal", "200 words")


def matrix_flops(network: Any, tokens: list[int]) -> float:
    """Floating-point operations of the matrix products of one pass over texts with these numbers of tokens."""
    config = network[0].model.config
    weights = sum(
        module.in_features * module.out_features
        for name, module in network[0].model.named_modules()
        if isinstance(module, torch.nn.Linear) and "pooler" not in name  # the pooler sees one token of a text
    )
    attention = 4 * config.hidden_size * config.num_hidden_layers
    return float(sum(2 * weights * length + attention * length * length for length in tokens))


class Best:
    """The shortest wall-clock and CPU times of several runs, in seconds."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = float("inf")
        self._started = (0.0, 0.0)

    def __enter__(self) -> None:
        self._started = (time.perf_counter(), time.process_time())

    def __exit__(self, *_: object) -> None:
        self.wall_s = min(self.wall_s, time.perf_counter() - self._started[0])
        self.cpu_s = min(self.cpu_s, time.process_time() - self._started[1])


async def run_engine(engine: Engine, texts: list[str], one_each: bool) -> None:
    """Send all texts in one request, or (`one_each`) one at a time from `CLIENTS` clients."""
    if not one_each:
        await engine.embed_one(EmbedRequest(texts))
    else:
        left = iter(texts)

        async def client() -> None:
            for text in left:
                await engine.embed_one(EmbedRequest([text]))

        await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def alone(engine: Engine, model: LocalModel, repeats: int) -> dict[str, float]:
    """Median milliseconds for one short text: the forward pass alone, and the whole engine."""
    texts = texts_of("4-12 words", repeats)
    tokens = [one for one in await model.tokenize(texts, "", "end") if isinstance(one, Tokens)]
    bare, whole = [], []
    for text, one in zip(texts, tokens, strict=True):
        started = time.perf_counter()
        await model.forward([one])
        between = time.perf_counter()
        await engine.embed_one(EmbedRequest([text]))
        bare.append(between - started)
        whole.append(time.perf_counter() - between)
    return {"bare_ms": float(np.median(bare)) * 1e3, "engine_ms": float(np.median(whole)) * 1e3}


async def sweep(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything. Returns the result that is written."""
    found: dict[str, Any] = {"kind": "engine", **machine.provenance(arguments.commit), "rows": [], "alone": []}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        model = load_model(
            "local", arguments.model, device=arguments.device, dtype=arguments.dtype, num_threads=threads
        )
        assert isinstance(model, LocalModel)
        info = model.info
        found |= {"model": info.name, "revision": info.revision, "device": info.device, "dtype": info.dtype}
        weights = getattr(torch, info.dtype)
        reference = SentenceTransformer(resolve(arguments.model), device=info.device, model_kwargs={"dtype": weights})
        reference = reference.to(weights)
        warm = Engine(model)
        await warm.warm_up()
        found["alone"].append({"threads": threads, **await alone(warm, model, 40)})
        for mix in arguments.mixes:
            texts = texts_of(mix, arguments.texts)
            lengths = [len(one) for one in await model.tokenize(texts, "", "end") if isinstance(one, Tokens)]
            flops = matrix_flops(reference, lengths)
            engines = [Engine(model, max_batch_tokens=budget) for budget in arguments.budgets]
            reference.encode(texts[:8])
            encode = Best()
            whole, clients = [Best() for _ in engines], [Best() for _ in engines]
            for _ in range(arguments.repeats):
                with encode:
                    reference.encode(texts, batch_size=arguments.encode_batch)
                for index, engine in enumerate(engines):
                    with whole[index]:
                        await run_engine(engine, texts, one_each=False)
                    with clients[index]:
                        await run_engine(engine, texts, one_each=True)
            for index, engine in enumerate(engines):
                stats = engine.stats()
                row = {
                    "threads": threads,
                    "mix": mix,
                    "budget": arguments.budgets[index],
                    "encode_texts_s": len(texts) / encode.wall_s,
                    "engine_texts_s": len(texts) / whole[index].wall_s,
                    "clients_texts_s": len(texts) / clients[index].wall_s,
                    "gain": encode.wall_s / whole[index].wall_s,
                    "cpu_gain": encode.cpu_s / whole[index].cpu_s,
                    "cpu_gain_clients": encode.cpu_s / clients[index].cpu_s,
                    "tokens_s": sum(lengths) / whole[index].wall_s,
                    "texts_a_forward": stats.texts / stats.forwards,
                    "padding": 1 - stats.tokens / stats.padded_tokens,
                    "tflops": flops / whole[index].wall_s / 1e12,
                }
                found["rows"].append(row)
                print(
                    "{threads:2d} threads  {mix:23s}  budget {budget:7d}  texts/s: encode {encode_texts_s:6.0f}"
                    "  engine {engine_texts_s:6.0f}  64 clients {clients_texts_s:6.0f}"
                    "  gain {gain:4.2f}x, in CPU time {cpu_gain:4.2f}x and {cpu_gain_clients:4.2f}x"
                    "  padding {padding:4.2f}  {tflops:6.3f} TFLOP/s".format(**row),
                    flush=True,
                )
        await model.close()
        print(f"{threads:2d} threads  one text alone: {found['alone'][-1]}")
    return found


def main() -> None:
    """Run the sweep that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[1])
    parser.add_argument(
        "--budgets", type=lambda text: [int(part) for part in text.split(",")], default=[512, 1024, 2048]
    )
    parser.add_argument("--mixes", type=lambda text: text.split(";"), default=list(MIXES))
    parser.add_argument("--texts", type=int, default=128, help="in each measurement")
    parser.add_argument("--encode-batch", type=int, default=32, help="batch_size of the reference; this is its default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commit", help="the commit of a copy without git")
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    arguments = parser.parse_args()
    found = asyncio.run(sweep(arguments))
    on_gpu = found["device"].startswith("cuda")
    device = torch.cuda.get_device_name().lower().replace(" ", "-") if on_gpu else "cpu"
    path = arguments.results / f"engine-{device}-{found['dtype']}-{found['commit'][:8]}.json"
    print("\n".join(map(str, report.save(found, path))))


if __name__ == "__main__":
    main()
