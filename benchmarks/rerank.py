"""Compare the engine with `CrossEncoder.predict`, with a cross-encoder of the size of ms-marco-MiniLM-L6 on this CPU.

    python -m benchmarks.rerank       # or on the first GPU

The model has six layers of 384 dimensions and random weights, since no weights come in a package, and the tokenizer of
all-MiniLM-L6-v2. Both score the same 32 pairs of a query and a text of 20 to 200 words, in turns; each figure is the
median of the repeats. Then some callers each score 32 pairs at once. Prints a table, and writes JSON and a report to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from sentence_transformers import CrossEncoder

from benchmarks import machine, report
from benchmarks.engine_sweep import WORDS
from deployments.embedding.engine import EmbedRequest, Engine
from deployments.embedding.load import DEFAULT_MODEL, load_reranker, resolve
from deployments.embedding.local.spec import choose_device, choose_dtype

PAIRS = 32
CALLERS = 4
QUERY = "what did my sister say about the river and the old house"


def save_model(folder: Path) -> None:
    """A BERT classifier of the shape of ms-marco-MiniLM-L6-v2, with random weights and a tokenizer."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30_522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1_536,
        max_position_embeddings=512,
        num_labels=1,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(resolve(DEFAULT_MODEL), model_max_length=512).save_pretrained(folder)


def texts_of(seed: int) -> list[str]:
    """`PAIRS` texts of 20 to 200 words."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(20, 201))) for _ in range(PAIRS)]


async def timed(run: Callable[[], Awaitable[Any]]) -> tuple[float, float]:
    """Seconds of wall-clock time, and of CPU time of this process."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    await run()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


async def measure(folder: Path, device: str, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the result: `predict` and the engine in turns."""
    name = str(dtype).removeprefix("torch.")
    model = load_reranker(str(folder), device=device, dtype=name, num_threads=arguments.threads)
    engine = Engine(model)
    await engine.warm_up()
    reference = CrossEncoder(str(folder), device=device, model_kwargs={"dtype": dtype})
    requests = [EmbedRequest(texts_of(seed), QUERY) for seed in range(CALLERS)]
    pairs = [(QUERY, text) for text in requests[0].inputs]
    scores: dict[str, np.ndarray] = {}

    async def predict() -> None:
        scores["predict"] = reference.predict(pairs, batch_size=PAIRS, show_progress_bar=False)

    async def alone() -> None:
        scores["engine"] = (await engine.embed_one(requests[0])).vectors[:, 0]

    async def together() -> None:
        await engine.embed(requests)

    runs: dict[str, list[tuple[float, float]]] = {"predict": [], "engine": [], "callers": []}
    for repeat in range(arguments.repeats + 1):
        for way, run in (("predict", predict), ("engine", alone), ("callers", together)):
            taken = await timed(run)
            if repeat:  # the first is for warming up
                runs[way].append(taken)
    await engine.close()
    wall = {way: statistics.median(wall_s for wall_s, _ in taken) for way, taken in runs.items()}
    cpu = {way: statistics.median(cpu_s for _, cpu_s in taken) for way, taken in runs.items()}
    return {
        "dtype": name,
        "padded": model.pads,
        "predict_pairs_s": PAIRS / wall["predict"],
        "engine_pairs_s": PAIRS / wall["engine"],
        "gain": statistics.median(a[0] / b[0] for a, b in zip(runs["predict"], runs["engine"], strict=True)),
        "cpu_gain": cpu["predict"] / cpu["engine"],
        "callers_pairs_s": PAIRS * CALLERS / wall["callers"],
        "largest_difference": float(np.abs(scores["engine"] - scores["predict"]).max()),
    }


async def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything. Returns the result that is written."""
    device = choose_device("auto")
    found: dict[str, Any] = {"kind": "rerank", **machine.provenance(), "device": device, "threads": arguments.threads}
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        found["rows"] = []
        for dtype in dict.fromkeys((torch.float32, choose_dtype("auto", device))):
            row = await measure(Path(folder), device, dtype, arguments)
            found["rows"].append(row)
            print(
                "{dtype:8s}  pairs/s: predict {predict_pairs_s:6.0f}  engine {engine_pairs_s:6.0f}  gain {gain:4.2f}x,"
                " in CPU time {cpu_gain:4.2f}x  {callers} callers {callers_pairs_s:6.0f}"
                "  largest difference {largest_difference:.2g}".format(**row, callers=CALLERS),
                flush=True,
            )
    return found


def main() -> None:
    """Run the comparison that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of both, on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    arguments = parser.parse_args()
    found = asyncio.run(compare(arguments))
    path = arguments.results / f"rerank-{found['commit'][:8]}.json"
    print("\n".join(map(str, report.save(found, path))))


if __name__ == "__main__":
    main()
