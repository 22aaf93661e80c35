"""Find the fastest settings of a peer on this machine: measure all settings that its entry in the table lists.

    python -m benchmarks.peers.tune litserve                       # in bfloat16
    python -m benchmarks.peers.tune mem0 --dtype float32

Prints a row for each: medians of the rounds, by scenario. The row of the settings in use is marked.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.figures import spread
from benchmarks.peers.corpus import LARGE, QUERIES, Corpus
from benchmarks.peers.measure import Rounds, contenders
from benchmarks.peers.scenarios import SCENARIOS
from benchmarks.peers.table import BFLOAT16, FLOAT32, PEERS, hold_to_two_cores
from benchmarks.report import number, table
from deployments.embedding.load import DEFAULT_MODEL, resolve
from deployments.serving.processes import supervise

# The scenarios in which the settings of a peer are compared.
TUNED_FOR = ("64 x 1", "8 x 32", "add", "search")


def random_corpus(dim: int = 384) -> Corpus:
    """A corpus of random vectors, which is good enough to compare one store with another."""
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((LARGE + QUERIES, dim)).astype("f4")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Corpus([f"memory {n}" for n in range(LARGE)], vectors[:LARGE], vectors[LARGE:])


def run(options: argparse.Namespace) -> int:
    hold_to_two_cores()
    (peer,) = (peer for peer in PEERS if peer.key == options.peer)
    scenarios = [
        replace(scenario, engine=None)
        for scenario in SCENARIOS
        if scenario.key in TUNED_FOR and scenario.job in peer.jobs
    ]
    with (
        tempfile.TemporaryDirectory(prefix="tune-") as name,
        Rounds(
            resolve(DEFAULT_MODEL), Path(name), measure_s=options.measure_s, seed=options.seed, say=tqdm.write
        ) as rounds,
    ):
        random_corpus().write(Path(name))
        rounds.corpus = Path(name)
        everyone = []
        for n, settings in enumerate(peer.tried):
            tried = replace(peer, key=f"{peer.key}-{n}", best={options.dtype: settings})
            everyone += contenders([tried], scenarios, (options.dtype,))
        for contender in tqdm(everyone, desc="starting", unit="server"):
            rounds.start(contender)
        for turn in tqdm(range(options.rounds), desc="measuring", unit="round"):
            rounds.round(turn, scenarios, everyone)
        rows = []
        for n, settings in enumerate(peer.tried):
            found = [rounds.runs[scenario.key].get(f"{peer.key}-{n} {options.dtype}", []) for scenario in scenarios]
            rates = [number(spread([run["texts_per_s"] for run in runs]).median) if runs else "-" for runs in found]
            taken = "in use" if peer.best[options.dtype] == settings else ""
            rows.append([f"`{settings}`", *rates, taken])
        print(
            table([f"{peer.title}, {options.dtype}", *(scenario.key for scenario in scenarios), ""], rows), flush=True
        )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=[peer.key for peer in PEERS if peer.tried])
    parser.add_argument("--dtype", choices=[FLOAT32, BFLOAT16], default=BFLOAT16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure-s", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return supervise(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
