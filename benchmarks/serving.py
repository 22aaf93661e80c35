"""memserve beside the baselines over HTTP, on the same cores, in one run: ratios, with what they were measured on.

    python -m benchmarks.serving            # three servers at once, loaded in turn; prints a table, writes JSON

The servers stay up together and are loaded one after the other, round after round, so that a change in what the machine
gives touches all of them alike. The bare engine (no HTTP, no Ray) takes its turn in a process of its own.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).resolve().parent.parent
PORTS = {"memserve": 8000, "plain @serve.batch(32, 10 ms)": 8100, "one model behind a lock": 8200}
SCENARIOS = {
    "64 clients, 1 short text": ["--clients", "64"],
    "1 client, 1 short text": ["--clients", "1"],
    "8 clients, 32 short texts": ["--clients", "8", "--size", "32"],
}
ENGINE = "bare engine, two processes"


def start(stack: ExitStack, command: list[str], port: int) -> None:
    """Start a server and wait until it embeds."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", *command], env=environment, stdout=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.post(f"http://127.0.0.1:{port}/v1/embeddings", json={"input": "ready?"}, timeout=10).is_success:
                return
        except httpx.TransportError:
            pass  # nothing listens there yet
        time.sleep(0.5)
    raise SystemExit(f"{command} did not start on port {port}")


def load(port: int, arguments: list[str], measure_s: float, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.load", "--url", f"http://127.0.0.1:{port}", *arguments]
    command += ["--measure-s", str(measure_s), "--warm-s", "1", "--seed", str(seed)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)
    return result


def engine_texts_per_s(measure_s: float, seed: int) -> float:
    """Two processes of one thread, each with its own engine, two requests of 32 short texts at a time."""
    command = [sys.executable, "-m", "benchmarks.serving", "--engine", "--measure-s", str(measure_s)]
    processes = [
        subprocess.Popen([*command, "--seed", str(seed + n)], stdout=subprocess.PIPE, cwd=ROOT) for n in range(2)
    ]
    return sum(float(process.communicate()[0].split()[-1]) for process in processes)


async def run_engine(measure_s: float, seed: int) -> float:
    from benchmarks.load import texts
    from deployments.embedding.engine import EmbedRequest, Engine
    from deployments.embedding.load import load_model

    source = texts("short", random.Random(seed))
    engine = Engine(load_model(num_threads=1))
    await engine.warm_up()
    done = 0
    end = time.perf_counter() + measure_s

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await engine.embed([EmbedRequest([next(source) for _ in range(32)])])
            done += 32

    await asyncio.gather(client(), client())
    return done / measure_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure-s", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", action="store_true", help="only the bare engine, for this script's own use")
    options = parser.parse_args()
    if options.engine:
        print(asyncio.run(run_engine(options.measure_s, options.seed)))
        return
    figures: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in SCENARIOS}
    engine: list[float] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        arguments = config["applications"][0]["args"]
        arguments["cache"] = {"max_bytes": 0}
        arguments["embedder"] = {"min_replicas": 2, "max_replicas": 2, "num_cpus": 0.75}
        arguments["store"] = {"url": f"sqlite:///{folder}/memserve.db"}
        (folder / "serve_config.yaml").write_text(yaml.safe_dump(config))
        names = list(PORTS)
        start(stack, ["deployments", str(folder / "serve_config.yaml")], PORTS[names[0]])
        start(stack, ["benchmarks.peers", "plain-batch", "--port", str(PORTS[names[1]])], PORTS[names[1]])
        start(stack, ["benchmarks.peers", "lock", "--port", str(PORTS[names[2]])], PORTS[names[2]])
        for turn in range(options.rounds):
            for scenario, extra in SCENARIOS.items():
                for name, port in PORTS.items():
                    result = load(port, extra, options.measure_s, options.seed + turn)
                    figures[scenario].setdefault(name, []).append(result)
            engine.append(engine_texts_per_s(options.measure_s, options.seed + turn))
            print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
    report(figures, engine)


def cpu() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def report(figures: dict[str, dict[str, list[dict[str, float]]]], engine: list[float]) -> None:
    def median(runs: list[dict[str, float]], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    print("| scenario | server | texts/s | times | p50 ms | p99 ms |\n|---|---|---|---|---|---|")
    for scenario, servers in figures.items():
        ours = servers["memserve"]
        for name, runs in servers.items():
            ratio = statistics.median(
                a["texts_per_s"] / b["texts_per_s"] for a, b in zip(ours, runs, strict=True) if b["texts_per_s"]
            )
            row = (median(runs, "texts_per_s"), ratio, median(runs, "p50_ms"), median(runs, "p99_ms"))
            print(f"| {scenario} | {name} | {row[0]:.0f} | {row[1]:.2f} | {row[2]:.1f} | {row[3]:.1f} |")
    print(f"| 32 short texts | {ENGINE} | {statistics.median(engine):.0f} | | | |")
    git = subprocess.run(["git", "rev-parse", "HEAD"], check=False, capture_output=True, text=True, cwd=ROOT)
    commit = git.stdout.strip()
    content = {
        "commit": commit or "unknown",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "model": "all-MiniLM-L6-v2",
        "dtype": "bfloat16",
        "versions": {name: version(name) for name in ("ray", "torch", "sentence-transformers", "tokenizers")},
        "rounds": figures,
        "engine_texts_per_s": engine,
    }
    path = ROOT / "benchmarks" / "results" / f"serving-{content['commit'][:8]}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
