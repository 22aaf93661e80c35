"""The rounds: the servers of a part are started, then each scenario loads them in turn, round after round.

A change in the machine's speed affects all servers, because a ratio is taken within a round. A server that does not
start, or stops answering, stays in the result with its error.
"""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import ROOT
from benchmarks.peers.corpus import Corpus
from benchmarks.peers.engine import Engines
from benchmarks.peers.environments import CannotInstall, prepare, versions
from benchmarks.peers.filling import fill_chroma, fill_memserve, make_corpus
from benchmarks.peers.scenarios import ENGINE, OURS, OURS_DTYPE, Scenario
from benchmarks.peers.searches import CHROMA
from benchmarks.peers.servers import DidNotStart, Server
from benchmarks.peers.table import BASELINE, Launch, Peer, split
from benchmarks.server import free_port
from benchmarks.workload import seed_of

Run = dict[str, Any]
WARM_S = 1.0
TRIES = 3
DIRECT = "called directly"
PROBES: dict[str, tuple[str, dict[str, object]]] = {
    "embed": ("/v1/embeddings", {"input": "ready?", "encoding_format": "base64"}),
    "search": ("/v1/users/user-0/memories/search", {"query": "ready?"}),
    "vectors": ("/v1/users/user-0/memories/search", {"vector": [1.0, *[0.0] * 383]}),
    "add": ("/v1/users/ready/memories", {"text": "ready?"}),
    "chroma": (CHROMA, {"name": "ready", "get_or_create": True}),
}


@dataclass
class Contender:
    """A peer in one dtype, with its own server."""

    peer: Peer
    dtype: str
    jobs: frozenset[str]
    server: Server | None = None
    error: str | None = None
    users: dict[str, str] = field(default_factory=dict)  # its names for the users of the corpus, if they differ

    @property
    def name(self) -> str:
        return f"{self.peer.key} {self.dtype}"

    @property
    def probe(self) -> tuple[str, dict[str, object]]:
        kind = self.peer.key if self.peer.key in PROBES else next(job for job in PROBES if job in self.jobs)
        return PROBES[kind]


def contenders(peers: Iterable[Peer], scenarios: Iterable[Scenario], dtypes: Iterable[str]) -> list[Contender]:
    """The contenders. Each job of mem0 gets its own server, because added memories would slow down its searches."""
    wanted = {scenario.job for scenario in scenarios}
    found = []
    for peer in peers:
        # A peer that is given vectors has one dtype, which has no meaning.
        for dtype in [given for given in peer.best if given in dtypes] or peer.best:
            jobs = peer.jobs & wanted
            if peer.key in (OURS, BASELINE) and dtype != OURS_DTYPE:
                jobs &= {"embed"}
            parts = [frozenset({job}) for job in sorted(jobs)] if peer.environment == "mem0" else [frozenset(jobs)]
            found += [Contender(peer, dtype, part) for part in parts if part]
    return sorted(found, key=lambda one: (one.peer.key != OURS, one.dtype != OURS_DTYPE))  # the first makes the corpus


def parts(everyone: Sequence[Contender]) -> list[list[Contender]]:
    """Divide the contenders into parts whose servers run at the same time. Only these are compared.

    All together need more than 24 GiB of memory, and Ray ends replicas if more than 95 % of the memory is used.
    """
    apart = [one for one in everyone if one.dtype != OURS_DTYPE and one.jobs == {"embed"}]
    together = [one for one in everyone if one not in apart]
    return [part for part in (together, apart) if part]


class Rounds:
    """The results, and the running servers. A server that is started within a `with` ends with it."""

    def __init__(self, model: str, folder: Path, *, measure_s: float, seed: int, say: Callable[[str], None]) -> None:
        self._model, self._folder, self._measure_s, self._seed, self._say = model, folder, measure_s, seed, say
        self.corpus: Path | None = None  # written by the first memserve, unless it is set
        self._engines: Engines | None = None
        self._stack = ExitStack()
        self.runs: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
        self.errors: dict[str, dict[str, str]] = defaultdict(dict)
        self.versions: dict[str, dict[str, str]] = {}

    def __enter__(self) -> "Rounds":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._engines = None

    def start(self, contender: Contender) -> None:
        """Start the server of a contender, fill it if it is to be searched, and pause it."""
        peer = contender.peer
        folder = self._folder / f"{contender.name} {'-'.join(sorted(contender.jobs))}".replace(" ", "-")
        folder.mkdir()
        try:
            prepare(peer.environment)
            self.versions[peer.key] = versions(peer.environment, peer.packages)
            searches = bool(contender.jobs & {"search", "vectors"})
            variables, arguments = split(peer.best[contender.dtype])
            launch = Launch(self._model, contender.dtype, free_port(), folder, self.corpus if searches else None)
            contender.server = Server(
                [*peer.command(launch), *arguments],
                url=f"http://127.0.0.1:{launch.port}",
                probe=contender.probe,
                variables=variables,
                log=folder / "log",
            )
            self._stack.callback(contender.server.end)
            contender.server.wait_until_ready()
            if searches:
                self._fill(contender, contender.server.url)
            contender.server.pause()
            self._say(f"{contender.name} is ready")
        except (CannotInstall, DidNotStart, httpx.HTTPError, subprocess.CalledProcessError, OSError) as error:
            contender.error = f"{type(error).__name__}: {error}"
            self._say(f"{contender.name}: {contender.error}")

    def _fill(self, contender: Contender, url: str) -> None:
        if contender.peer.key == OURS:
            corpus = make_corpus(url)
            corpus.write(self._folder)
            self.corpus = self._folder
            fill_memserve(url, corpus)
        elif contender.peer.key == BASELINE and self.corpus:
            fill_memserve(url, Corpus.read(self.corpus))
        elif contender.peer.key == "chroma" and self.corpus:
            contender.users = fill_chroma(url, Corpus.read(self.corpus))

    def round(self, number: int, scenarios: Iterable[Scenario], everyone: list[Contender]) -> None:
        """Measure all scenarios once. Each round begins with another server."""
        shift = number % len(everyone)
        for scenario in scenarios:
            for contender in everyone[shift:] + everyone[:shift]:
                if scenario.job not in contender.jobs or contender.dtype not in scenario.dtypes:
                    continue
                try:
                    self._measure(number, scenario, contender)
                except (DidNotStart, httpx.HTTPError, subprocess.CalledProcessError) as error:
                    contender.error = f"{type(error).__name__} in round {number + 1}: {error}"
                if contender.error:
                    self.errors[scenario.key][contender.name] = contender.error
            if scenario.engine and any(contender.dtype == OURS_DTYPE for contender in everyone):
                seed = seed_of(self._seed, number, scenario.key)
                rate = self._bare().texts_per_s(scenario.engine, self._measure_s * scenario.stretch, seed)
                self._keep(number, scenario, ENGINE, {"texts_per_s": rate})

    def _measure(self, number: int, scenario: Scenario, contender: Contender) -> None:
        if contender.error or contender.server is None:
            return
        measure_s = self._measure_s * scenario.stretch
        seed = seed_of(self._seed, number, scenario.key)
        arguments: list[object] = ["--warm-s", WARM_S * scenario.stretch, "--measure-s", measure_s, "--seed", seed]
        if scenario.job == "vectors":
            shape = "chroma" if contender.peer.key == "chroma" else "memserve"
            arguments += ["--corpus", self.corpus, "--shape", shape, *scenario.load]
            arguments += ["--users", *(contender.users.get(user, user) for user in scenario.users)]
        else:
            arguments += ["--job", scenario.job, *scenario.load]
        program = "benchmarks.peers.searches" if scenario.job == "vectors" else "benchmarks.load"
        with contender.server.running():
            command = [sys.executable, "-m", program, "--url", contender.server.url, *map(str, arguments)]
            self._keep(number, scenario, contender.name, self._loaded(contender, contender.server, command))
            if contender.peer.environment == "mem0":
                path = f"{contender.server.url}/direct/{scenario.job}?measure_s={measure_s}&seed={seed}"
                rate = httpx.post(path, timeout=60 + measure_s, trust_env=False).raise_for_status().json()
                self._keep(number, scenario, f"{contender.name} {DIRECT}", {"texts_per_s": rate})

    def _loaded(self, contender: Contender, server: Server, command: list[str]) -> Run:
        """The load generator's result. It runs again if Ray replaced replicas because the server had been paused."""
        for _ in range(TRIES):
            replicas = server.replicas()
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            if replicas <= server.replicas():
                break
            self._say(f"{contender.name}: replicas were replaced during the measurement")
            server.wait_until_whole(len(replicas))
        run: Run = json.loads(done.stdout)
        return run

    def _bare(self) -> Engines:
        """memserve's engines, which are started for the first measurement."""
        if self._engines is None:
            self._engines = Engines(self._folder / "engines.log")
            self._stack.callback(self._engines.end)
            self._engines.texts_per_s("short", 0.1, self._seed)
        return self._engines

    def _keep(self, number: int, scenario: Scenario, name: str, run: Run) -> None:
        self.runs[scenario.key][name].append({"round": number, **run})
        self._say(
            f"round {number + 1}  {scenario.key:14}  {name:30} {run['texts_per_s']:8.1f}/s  {run.get('errors') or ''}"
        )
