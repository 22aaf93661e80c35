"""Replicas that follow an open-loop load up and down: one plot with a common time axis, and how long a step hurts.

    python -m benchmarks.scaling               # about 4 minutes on two cores
    python -m benchmarks.scaling --draw benchmarks/results/FILE.json

The default serve_config.yaml, with shorter delays and with targets that two cores can exceed. First one embedder's
capacity is measured; then the load stands at a share of it, steps above it, and steps down again. Requests embed four
texts, add two memories or search by one text, in equal parts, and others search by a vector; texts have 24 to 40 words,
so that the embedder is the limit and not the client on the same cores. Latency counts from when a request was due.

Every search asks for all memories of its user, and must hold each that was acknowledged before it was sent; at the end
every user is listed, and must have each acknowledged memory once. The figure is the time from the step up until the
99th percentile of a second is back under the target, for five seconds in a row.

Writes benchmarks/results/scaling-<machine>-<commit>.json and .svg.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import orjson
import psutil
import uvloop

from benchmarks import machine
from benchmarks.figures import percentiles_ms
from benchmarks.load import HEADERS, arrivals
from benchmarks.server import memserve, merged, parse_args
from benchmarks.workload import seed_of, texts

USERS = 200
DIM = 384
DEPLOYMENTS = ("Embedder", "Store", "Gateway")
KINDS = ("embed", "add", "search")  # the requests that bring texts, in equal parts
EMBED_TEXTS = 4
ADD_TEXTS = 2
SETTINGS = {
    "embedder": {"upscale_delay_s": 2.0, "downscale_delay_s": 15.0},
    "store": {"upscale_delay_s": 2.0, "downscale_delay_s": 15.0, "target_busy": 0.33},
    "gateway": {"upscale_delay_s": 2.0, "downscale_delay_s": 15.0, "target_ongoing_requests": 16.0},
}
CALM_WITHIN_S = 90.0
CALM_S = 5.0
STEADY_S = 5


class Phase(NamedTuple):
    """Constant load. `share`: of what one embedder bears; `by_vector`: searches a second that bring no text."""

    name: str
    seconds: float
    share: float
    by_vector: float


PHASES = (Phase("low", 20, 0.4, 10), Phase("high", 75, 1.25, 60), Phase("low again", 60, 0.3, 5))
CLIENTS = 16  # that measure what one embedder bears
BEAR_S = 4.0


@dataclass
class Seen:
    """One request. Times are of the monotonic clock, which the machine's processes share."""

    kind: str
    due: float
    done: float
    error: str = ""


@dataclass
class Outcome:
    """What the client saw. `missing`: acknowledged memories that a search or the last lists lacked, or had twice."""

    requests: list[Seen] = field(default_factory=list)
    acknowledged: int = 0
    missing: list[str] = field(default_factory=list)


class Client:
    """Sends requests, and holds every answer against what was acknowledged before."""

    def __init__(self, session: aiohttp.ClientSession, name: str, seed: int) -> None:
        self._session = session
        self._name = name
        self._rng = random.Random(seed)
        self._texts = texts("medium", self._rng)
        self._vectors = np.random.default_rng(seed).normal(size=(64, DIM)).astype(np.float32).tolist()
        self._acknowledged: defaultdict[str, set[str]] = defaultdict(set)
        self._in_doubt: set[str] = set()
        self.outcome = Outcome()

    async def send(self, kind: str, due: float) -> None:
        """One request that was due at a moment."""
        user = f"{self._name}-{self._rng.randrange(USERS)}"
        seen = Seen(kind, due, math.inf)
        self.outcome.requests.append(seen)
        try:
            seen.error = await getattr(self, f"_{kind}")(user)
        except (aiohttp.ClientError, TimeoutError) as error:
            seen.error = type(error).__name__
        seen.done = time.monotonic()

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        async with self._session.post(path, data=orjson.dumps(body), headers=HEADERS) as answer:
            return answer.status, await answer.read()

    async def _embed(self, _: str) -> str:
        given = list(islice(self._texts, EMBED_TEXTS))
        status, _body = await self._post("/v1/embeddings", {"input": given, "encoding_format": "base64"})
        return "" if status == 200 else str(status)

    async def _add(self, user: str) -> str:
        ids = {f"memory-{len(self.outcome.requests)}-{n}" for n in range(ADD_TEXTS)}
        self._in_doubt |= ids
        memories = [{"id": id, "text": next(self._texts)} for id in ids]
        status, _ = await self._post(f"/v1/users/{user}/memories", {"memories": memories})
        if status != 201:
            return str(status)
        self._in_doubt -= ids
        self._acknowledged[user] |= ids
        self.outcome.acknowledged += len(ids)
        return ""

    async def _search(self, user: str) -> str:
        return await self._find(user, {"query": next(self._texts)})

    async def _by_vector(self, user: str) -> str:
        return await self._find(user, {"vector": self._rng.choice(self._vectors)})

    async def _find(self, user: str, query: dict[str, Any]) -> str:
        expected = set(self._acknowledged[user])  # those before this was sent
        status, body = await self._post(f"/v1/users/{user}/memories/search", {**query, "top_k": 1000})
        if status != 200:
            return str(status)
        self._compare(user, expected, [memory["id"] for memory in orjson.loads(body)["results"]])
        return ""

    def _compare(self, user: str, expected: set[str], found: Sequence[str]) -> None:
        twice = [id for id, times in Counter(found).items() if times > 1]
        self.outcome.missing += [f"{user} {id}" for id in [*expected.difference(found), *twice]]

    async def list_all(self) -> None:
        """Hold what each user has now against what was acknowledged."""
        for user, expected in self._acknowledged.items():
            async with self._session.get(f"/v1/users/{user}/memories?limit=1000") as answer:
                found = [memory["id"] for memory in orjson.loads(await answer.read())["memories"]]
            self._compare(user, expected, found)
            self.outcome.missing += [f"{user} {id} unasked" for id in set(found) - expected - self._in_doubt]


async def offer(url: str, phases: Sequence[Phase], per_s: float, started: float, seed: int) -> Outcome:
    """Send the phases' requests when they are due, whatever has been answered. `per_s`: what one embedder bears."""
    due: list[tuple[float, str]] = []
    begin = 0.0
    for number, phase in enumerate(phases):
        rates = dict.fromkeys(KINDS, phase.share * per_s / len(KINDS)) | {"by_vector": phase.by_vector}
        for kind, rate in rates.items():
            moments = arrivals(rate, phase.seconds, seed_of(seed, number, kind))
            due += [(begin + float(moment), kind) for moment in moments]
        begin += phase.seconds
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        client = Client(session, "user", seed)
        tasks = []
        for moment, kind in sorted(due):
            if (wait_s := started + moment - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(client.send(kind, started + moment)))
        await asyncio.gather(*tasks)
        await client.list_all()
    return client.outcome


async def bear(url: str, seed: int) -> float:
    """Requests that bring texts, answered a second, where some clients wait for their answers."""
    async with aiohttp.ClientSession(url) as session:
        client = Client(session, "calibration", seed_of(seed, "calibration"))
        end = time.monotonic() + BEAR_S

        async def loop() -> None:
            kinds = random.Random(seed)
            while time.monotonic() < end:
                await client.send(kinds.choice(KINDS), time.monotonic())

        await asyncio.gather(*(loop() for _ in range(CLIENTS)))
    return sum(not seen.error for seen in client.outcome.requests if seen.done <= end) / BEAR_S


def run_bear(url: str, seed: int) -> float:
    return uvloop.run(bear(url, seed))


def run_client(url: str, phases: Sequence[Phase], per_s: float, started: float, seed: int) -> Outcome:
    return uvloop.run(offer(url, phases, per_s, started, seed))


# The server's side, seen by a driver.


def ray_address(folder: Path) -> str:
    """Where the server's Ray listens: read from the command line of the raylet that works in its folder."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "raylet" and process.cwd() == str(folder):
                flags = dict(part.lstrip("-").split("=", 1) for part in process.cmdline() if "=" in part)
                return str(flags["gcs-address"])
    raise SystemExit("no raylet works in the server's folder")


@dataclass
class Sample:
    """The server at one moment: replicas that run, and what the policies count (means of the last seconds)."""

    at: float
    replicas: dict[str, int]
    waiting_tokens: float
    ongoing: dict[str, float]


class Observer:
    """A driver that asks Serve's controller."""

    def __init__(self, address: str) -> None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        import ray
        from ray.serve.context import _get_global_client

        self._ray = ray
        ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="ERROR")
        self._controller = _get_global_client()._controller

    def look(self) -> Sample:
        from ray import serve
        from ray.serve._private.common import DeploymentID

        found = serve.status().applications["memserve"].deployments
        replicas = {name: int(found[name].replica_states.get("RUNNING", 0)) for name in DEPLOYMENTS}
        ids = {name: DeploymentID(name, "memserve") for name in DEPLOYMENTS}
        asked = [self._controller._get_total_num_requests_for_deployment_for_testing.remote(ids[n]) for n in ids]
        ongoing = dict(zip(ids, self._ray.get(asked), strict=True))
        asked = [
            self._controller._get_metrics_for_deployment_for_testing.remote(ids[n]) for n in ("Embedder", "Gateway")
        ]
        waiting = sum(_newest(of.get("waiting_tokens", [])) for of in self._ray.get(asked) if of)
        return Sample(time.monotonic(), replicas, waiting, ongoing)

    def wait_until_calm(self) -> None:
        """Until one replica of each has been enough for some seconds."""
        deadline, calm_since = time.monotonic() + CALM_WITHIN_S, time.monotonic()
        while time.monotonic() < deadline:
            if set(self.look().replicas.values()) != {1}:
                calm_since = time.monotonic()
            elif time.monotonic() - calm_since > CALM_S:
                return
            time.sleep(0.5)
        raise SystemExit("the replicas did not come down to one of each")

    def close(self) -> None:
        self._ray.shutdown()


def _newest(of_replicas: Sequence[Any]) -> float:
    """The sum of the replicas' last values."""
    return float(sum(series[-1].value for series in of_replicas if len(series)))


def watch(observer: Observer, client: "Future[Outcome]") -> list[Sample]:
    """A sample a second, as long as the client works, and then until one replica of each is left."""
    samples: list[Sample] = []
    deadline = math.inf
    while time.monotonic() < deadline:
        began = time.monotonic()
        samples.append(observer.look())
        if client.done():
            deadline = min(deadline, began + CALM_WITHIN_S)
            if set(samples[-1].replicas.values()) == {1}:
                break
        time.sleep(max(0.0, 1.0 - (time.monotonic() - began)))
    return samples


# The figures.


def by_second(requests: Sequence[Seen], started: float, seconds: int) -> list[dict[str, float]]:
    """Of each second: requests due, answered well, failed; latencies of those due."""
    due: list[list[Seen]] = [[] for _ in range(seconds)]
    good = Counter(int(seen.done - started) for seen in requests if not seen.error and math.isfinite(seen.done))
    for seen in requests:
        if 0 <= (second := int(seen.due - started)) < seconds:
            due[second].append(seen)
    rows = []
    for second, those in enumerate(due):
        latencies = [seen.done - seen.due for seen in those if not seen.error]
        errors = sum(1 for seen in those if seen.error)
        rows.append(
            {
                "second": second,
                "offered": len(those),
                "goodput": good[second],
                "errors": errors,
                **percentiles_ms(latencies),
            }
        )
    return rows


def recovered_s(rows: Sequence[dict[str, float]], step: float, until: float, target_ms: float) -> float | None:
    """Seconds from the step until p99 has come back under the target for `STEADY_S`; None where it does not.

    0 where it is never above.
    """
    during = [row for row in rows if step <= row["second"] < until]
    late = [row["p99_ms"] > target_ms for row in during]
    if True not in late:
        return 0.0
    for first in range(late.index(True), len(during) - STEADY_S + 1):
        if not any(late[first : first + STEADY_S]):
            return during[first]["second"] - step
    return None


def extent(samples: Sequence[dict[str, Any]], name: str) -> str:
    """`1 -> 2 -> 1`: at first, at most, at last."""
    counts = [sample["replicas"][name] for sample in samples]
    return f"{counts[0]} -> {max(counts)} -> {counts[-1]}"


def draw(found: dict[str, Any], path: Path) -> None:
    """All on one time axis."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "memserve", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    rows, samples = found["seconds"], found["samples"]
    at = [row["second"] for row in rows]
    sampled = [sample["at"] for sample in samples]
    figure, (load, latency, queue, replicas) = pyplot.subplots(4, 1, sharex=True, figsize=(9, 9))
    load.plot(at, [row["offered"] for row in rows], label="offered", linewidth=1)
    load.plot(at, [row["goodput"] for row in rows], label="answered", linewidth=1)
    load.plot(at, [row["errors"] for row in rows], label="failed", linewidth=1, color="tab:red")
    load.set(ylabel="requests/s")
    for key in ("p50_ms", "p99_ms"):
        latency.plot(at, [row[key] for row in rows], label=key.removesuffix("_ms"), linewidth=1)
    latency.axhline(found["target_ms"], color="grey", linestyle=":", label="target")
    latency.set(ylabel="ms", yscale="log")
    queue.plot(sampled, [sample["waiting_tokens"] for sample in samples], label="tokens that wait", linewidth=1)
    queue.set(ylabel="tokens")
    for name, style in zip(DEPLOYMENTS, ("-", "--", ":"), strict=True):
        counts = [sample["replicas"][name] for sample in samples]
        replicas.step(sampled, counts, where="post", linestyle=style, label=name)
    replicas.set(ylabel="replicas", xlabel="seconds", yticks=range(5))
    begin = 0.0
    for phase in found["phases"]:
        for axis in (load, latency, queue, replicas):
            axis.axvline(begin, color="grey", linewidth=0.5)
        load.text(begin, 1.02, f" {phase['name']}", transform=load.get_xaxis_transform(), fontsize=8)
        begin += phase["seconds"]
    for axis in (load, latency, queue, replicas):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def table(found: dict[str, Any]) -> str:
    """What there is to say, in a few lines."""
    back = found["recovered_s"]
    samples = found["samples"]
    lines = [
        "| what | |\n|---|---|",
        f"| one embedder bears | {found['per_embedder_per_s']:.0f} requests/s |",
        f"| back under {found['target_ms']:g} ms after the step up | {'never' if back is None else f'{back:.0f} s'} |",
        *(f"| {name} | {extent(samples, name)} |" for name in DEPLOYMENTS),
        f"| requests, failed | {found['requests']:,}, {found['errors'] or 'none'} |",
        f"| memories acknowledged, not found | {found['acknowledged']:,}, {len(found['missing']) or 'none'} |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-s", type=float, help="requests a second that one embedder bears; default: measured")
    parser.add_argument("--target-ms", type=float, default=500.0, help="of the 99th percentile")
    parser.add_argument("--high", type=float, default=PHASES[1].share, help="the load after the step, in embedders")
    parser.add_argument("--stretch", type=float, default=1.0, help="of all phases")
    parser.add_argument("--args", type=parse_args, default={}, help="settings over those of the scenario, as JSON")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--commit", help="of a copy without git")
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    parser.add_argument("--draw", type=Path, help="only draw again what was measured")
    options = parser.parse_args()
    if options.draw:
        found = json.loads(options.draw.read_text())
        draw(found, options.draw.with_suffix(".svg"))
        print(table(found))
        return
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
            per_s = pool.submit(run_bear, server.url, options.seed).result()
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
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"scaling-{machine.stem(found)}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, path.with_suffix(".svg"))
    print(table(found))
    print(f"{path}\n{path.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
