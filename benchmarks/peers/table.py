"""The peers: where each is installed, and how it is started with its best settings on two cores without a card.

Settings are written as in a shell: first variables, then arguments. `python -m benchmarks.peers.tune` has found `best`
to be the fastest of `tried`.
"""

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.machine import cores
from benchmarks.peers.environments import python_of
from benchmarks.server import merged, profile

Job = Literal["embed", "add", "search", "vectors"]
FLOAT32, BFLOAT16 = "float32", "bfloat16"
CORES = 2
BASELINE = "baseline"  # the key of another checkout of memserve


@dataclass(frozen=True)
class Launch:
    """The values that a server is started with."""

    model: str
    dtype: str
    port: int
    folder: Path
    corpus: Path | None


@dataclass(frozen=True)
class Peer:
    """A server to compare with. `command` starts it, without its settings; `jobs` are those that it can do."""

    key: str
    title: str
    jobs: frozenset[Job]
    command: Callable[[Launch], list[str]]
    environment: str | None = None
    packages: tuple[str, ...] = ()
    best: Mapping[str, str] = field(default_factory=lambda: {FLOAT32: "", BFLOAT16: ""})
    tried: tuple[str, ...] = ()


def split(settings: str) -> tuple[dict[str, str], list[str]]:
    """Variables and arguments of a line such as `OMP_NUM_THREADS=1 --batch-size 64`."""
    words = shlex.split(settings)
    count = next((n for n, word in enumerate(words) if word.startswith("-") or "=" not in word), len(words))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


def hold_to_two_cores() -> None:
    """Limit this process and its descendants to two cores, because the settings of the peers are for two."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])


def memserve(launch: Launch) -> list[str]:
    """memserve with the settings of `make bench`, but without the cache."""
    return [str(python_of(None)), "-m", "deployments", str(memserve_config(launch))]


def baseline(folder: Path) -> Peer:
    """Another checkout of memserve, started from its folder by this environment's interpreter."""

    def command(launch: Launch) -> list[str]:
        return ["env", "-C", str(folder), f"PYTHONPATH={folder}", *memserve(launch)]

    revision = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(revision, check=True, capture_output=True, text=True).stdout.strip()
    return Peer(BASELINE, f"memserve at {commit}", frozenset({"embed", "add", "search", "vectors"}), command)


def memserve_config(launch: Launch) -> Path:
    """The settings that `memserve` and `baseline` have in common, written to a file."""
    store = {"url": f"sqlite:///{launch.folder}/memserve.db", "synchronous": "FULL"}
    model = {"name": launch.model, "device": "cpu", "dtype": launch.dtype}
    args = merged(profile(cores(), 0), {"model": model, "cache": {"max_bytes": 0}, "store": store})
    config: dict[str, Any] = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": launch.port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {"name": "memserve", "route_prefix": "/", "import_path": "deployments.app:build_app", "args": args}
        ],
    }
    path = launch.folder / "serve_config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def module(name: str, environment: str | None) -> Callable[[Launch], list[str]]:
    """A command that starts benchmarks.peers.<name> in an environment."""

    def command(launch: Launch) -> list[str]:
        python = [str(python_of(environment)), "-m", f"benchmarks.peers.{name}"]
        corpus = ["--corpus", str(launch.corpus)] if launch.corpus else []
        return [*python, "--model", launch.model, "--dtype", launch.dtype, "--port", str(launch.port), *corpus]

    return command


def infinity(launch: Launch) -> list[str]:
    program = str(python_of("infinity").with_name("infinity_emb"))
    # Its BetterTransformer needs a version of optimum that is older than its transformers.
    engine = ["--device", "cpu", "--engine", "torch", "--no-bettertransformer", "--dtype", launch.dtype]
    where = ["--host", "127.0.0.1", "--port", str(launch.port), "--url-prefix", "/v1", "--log-level", "error"]
    return [program, "v2", "--model-id", launch.model, *engine, *where]


def chroma(launch: Launch) -> list[str]:
    program = str(python_of("chroma").with_name("chroma"))
    return [program, "run", "--host", "127.0.0.1", "--port", str(launch.port), "--path", str(launch.folder)]


PEERS = (
    Peer("memserve", "memserve", frozenset({"embed", "add", "search", "vectors"}), memserve),
    Peer(
        "plain-batch",
        "plain `@serve.batch(32, 10 ms)` in Ray Serve",
        frozenset({"embed"}),
        module("plain_batch", None),
        packages=("ray", "torch", "sentence-transformers"),
        best={FLOAT32: "--replicas 2 --threads 1", BFLOAT16: "--replicas 2 --threads 1"},
        tried=("--replicas 2 --threads 1", "--replicas 1 --threads 2", "--replicas 1 --threads 1"),
    ),
    Peer(
        "lock",
        "one model behind a lock in FastAPI",
        frozenset({"embed"}),
        module("lock", None),
        packages=("fastapi", "torch", "sentence-transformers"),
        best={FLOAT32: "--threads 2", BFLOAT16: "--threads 2"},
        tried=("--threads 1", "--threads 2"),
    ),
    Peer(
        "litserve",
        "LitServe",
        frozenset({"embed"}),
        module("litserve", "litserve"),
        environment="litserve",
        packages=("litserve", "torch", "sentence-transformers"),
        best={
            FLOAT32: "--workers 2 --threads 1 --batch-timeout-s 0.01 --max-batch-size 32",
            BFLOAT16: "--workers 2 --threads 1 --batch-timeout-s 0.01 --max-batch-size 32",
        },
        tried=(
            "--workers 2 --threads 1 --batch-timeout-s 0.01 --max-batch-size 32",
            "--workers 2 --threads 1 --batch-timeout-s 0.01 --max-batch-size 32 --fast-queue",
            "--workers 2 --threads 1 --batch-timeout-s 0.002 --max-batch-size 32",
            "--workers 2 --threads 1 --batch-timeout-s 0.03 --max-batch-size 64",
            "--workers 1 --threads 1 --batch-timeout-s 0.01 --max-batch-size 64",
            "--workers 1 --threads 2 --batch-timeout-s 0.01 --max-batch-size 64",
            "--workers 1 --threads 1 --batch-timeout-s 0.002 --max-batch-size 64 --fast-queue",
        ),
    ),
    Peer(
        "infinity",
        "Infinity",
        frozenset({"embed"}),
        infinity,
        environment="infinity",
        packages=("infinity-emb", "torch", "sentence-transformers", "transformers"),
        best={
            FLOAT32: "OMP_NUM_THREADS=1 --batch-size 64",
            BFLOAT16: "OMP_NUM_THREADS=1 --batch-size 64",
        },
        tried=(
            "OMP_NUM_THREADS=1 --batch-size 64",
            "OMP_NUM_THREADS=2 --batch-size 64",
            "OMP_NUM_THREADS=1 --batch-size 32",
            "OMP_NUM_THREADS=2 --batch-size 32",
        ),
    ),
    # On local Qdrant, the default, a search reads the payloads of all users, and has 1/40 of the rate that FAISS has.
    Peer(
        "mem0-qdrant",
        "mem0, `infer=False`, local Qdrant",
        frozenset({"add"}),
        module("mem0", "mem0"),
        environment="mem0",
        packages=("mem0ai", "qdrant-client", "torch", "sentence-transformers"),
        best={FLOAT32: "--threads 1 --store qdrant", BFLOAT16: "--threads 1 --store qdrant"},
    ),
    Peer(
        "mem0-faiss",
        "mem0, `infer=False`, FAISS",
        frozenset({"add", "search"}),
        module("mem0", "mem0"),
        environment="mem0",
        packages=("mem0ai", "faiss-cpu", "torch", "sentence-transformers"),
        best={FLOAT32: "--threads 1 --store faiss", BFLOAT16: "--threads 1 --store faiss"},
        tried=(
            "--threads 1 --store faiss",
            "--threads 2 --store faiss",
            "--threads 1 --store qdrant",
            "--threads 2 --store qdrant",
            "--threads 1 --store chroma",
        ),
    ),
    Peer(
        "chroma",
        "Chroma's own server",
        frozenset({"vectors"}),
        chroma,
        environment="chroma",
        packages=("chromadb",),
        best={FLOAT32: "ANONYMIZED_TELEMETRY=False RUST_LOG=error"},
    ),
    Peer(
        "qdrant",
        "Qdrant's local mode, in memory",
        frozenset({"vectors"}),
        module("qdrant", "qdrant"),
        environment="qdrant",
        packages=("qdrant-client",),
        best={FLOAT32: ""},
    ),
)
