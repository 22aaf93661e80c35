"""`make bench-peers`: memserve and other servers, each with its best settings, on the same cores in one run.

    python -m benchmarks.peers                        # about 25 minutes on two cores, after the first installs
    python -m benchmarks.peers --quick                # about 8 minutes: bfloat16 only, three short rounds
    python -m benchmarks.peers --only infinity,lock   # memserve and these
    python -m benchmarks.peers --only baseline --baseline ../older    # memserve and another checkout of it

Each peer has its own environment under .venv-peers/, which is made on the first run. Writes
benchmarks/results/peers-<commit>.json and a Markdown report next to it. All servers and their processes end with it.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tqdm import tqdm

from benchmarks import machine, report
from benchmarks.peers.measure import Rounds, contenders, parts
from benchmarks.peers.scenarios import OURS, OURS_DTYPE, SCENARIOS
from benchmarks.peers.table import BASELINE, PEERS, Peer, baseline, hold_to_two_cores
from deployments.embedding.load import DEFAULT_MODEL, resolve
from deployments.serving.processes import supervise


def chosen(text: str, noun: str, known: list[str], mark: str) -> set[str]:
    """The names in a list from the command line. Each must be known."""
    given = {part.strip() for part in text.split(mark)}
    if unknown := given - set(known):
        there = f"{mark} ".join(known)
        raise argparse.ArgumentTypeError(f"unknown {noun}: {f'{mark} '.join(sorted(unknown))}; known are {there}")
    return given


def keys(text: str) -> set[str]:
    return chosen(text, "peer", [*(peer.key for peer in PEERS), BASELINE], ",")


def scenario_keys(text: str) -> set[str]:
    return chosen(text, "scenario", [scenario.key for scenario in SCENARIOS], ";")  # their names contain commas


def checkout(text: str) -> Path:
    """The folder of a checkout of memserve."""
    folder = Path(text).resolve()
    if not (folder / "deployments" / "__main__.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a checkout of memserve")
    return folder


class _Stopped(BaseException):
    """SIGTERM arrived."""


def run(options: argparse.Namespace) -> int:
    """Measure and write. SIGTERM, which Ctrl-C becomes, ends the servers and then removes the temporary folder."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        return measured(options)
    except _Stopped:
        return 130


def _stop(_: int, __: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Stopped


def peers_of(only: set[str] | None, checkout: Path | None) -> list[Peer]:
    """memserve, the peers that `only` names (None: all), and the baseline if there is a checkout."""
    everyone = [*PEERS, *([baseline(checkout)] if checkout else [])]
    return [peer for peer in everyone if only is None or peer.key in (OURS, BASELINE) or peer.key in only]


def measured(options: argparse.Namespace) -> int:
    hold_to_two_cores()
    started = machine.provenance(options.commit)
    peers = peers_of(options.only, options.baseline)
    jobs = set().union(*(peer.jobs for peer in peers if peer.key != OURS)) or peers[0].jobs
    scenarios = [
        scenario
        for scenario in SCENARIOS
        if scenario.job in jobs and (options.scenarios is None or scenario.key in options.scenarios)
    ]
    dtypes = (OURS_DTYPE,) if options.quick else ("float32", OURS_DTYPE)
    everyone = contenders(peers, scenarios, dtypes)
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        rounds = Rounds(
            resolve(DEFAULT_MODEL), Path(folder), measure_s=options.measure_s, seed=options.seed, say=tqdm.write
        )
        for standing in parts(everyone):
            with rounds:
                for contender in tqdm(standing, desc="starting", unit="server"):
                    rounds.start(contender)
                if everyone[0].error:
                    return 1
                for number in tqdm(range(options.rounds), desc="measuring", unit="round"):
                    rounds.round(number, scenarios, standing)
        found: dict[str, Any] = {
            "kind": "peers",
            **started,
            "command": " ".join(["python -m benchmarks.peers", *sys.argv[1:]]),
            "model": DEFAULT_MODEL,
            "device": "cpu",
            "dtype": OURS_DTYPE,
            "plan": {"rounds": options.rounds, "measure_s": options.measure_s, "seed": options.seed},
            "peers": {peer.key: {"title": peer.title, "versions": rounds.versions.get(peer.key, {})} for peer in peers},
            "runs": rounds.runs,
            "errors": rounds.errors,
        }
        write(found, options.out)
    return 0


def write(found: dict[str, Any], folder: Path) -> None:
    name = f"peers-{found['commit'][:8]}{'-dirty' if found['dirty'] else ''}"
    written = report.save(found, folder / f"{name}.json")
    print(written[1].read_text(), flush=True)
    print(*written, sep="\n", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=keys, help="measure memserve and only these peers, separated by commas")
    parser.add_argument("--baseline", type=checkout, help="another checkout of memserve, measured in the same rounds")
    parser.add_argument("--scenarios", type=scenario_keys, help="measure these scenarios; separate them by semicolons")
    parser.add_argument("--quick", action="store_true", help="bfloat16 only, three rounds of 1.5 s")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--measure-s", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    parser.add_argument("--commit", help="the commit of a copy without git")
    options = parser.parse_args()
    if BASELINE in (options.only or ()) and not options.baseline:
        parser.error("--only baseline needs --baseline FOLDER")
    options.rounds = options.rounds or (3 if options.quick else 5)
    options.measure_s = options.measure_s or (1.5 if options.quick else 3.0)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return supervise(lambda: run(options))
