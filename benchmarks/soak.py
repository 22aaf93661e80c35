"""The memory of every process under a long, mixed load.

    python -m benchmarks.soak                                       # 10 minutes of warm-up, 30 measured
    python -m benchmarks.soak --quick                               # 30 seconds of warm-up, 60 measured
    python -m benchmarks.soak --warm-up-s 120 --duration-s 300

Some clients, each with users of its own, send requests of every kind and of many sizes in random order: embeddings of
one short text to hundreds of long ones, adds, searches, lists, updates, exports, imports and deletions. A user that has
enough memories is erased, so the amount of live data stays about the same. Once a second the memory of each process of
the server is read: RSS, and USS, which counts only the pages that no other process shares.

The table gives each process's memory at the end of the warm-up and at the end of the load (medians of a twentieth of
the measured time), its highest value between, and the change. Writes benchmarks/results/soak.json, its report and its
plot.
"""

import argparse
import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import orjson
import psutil

from benchmarks import machine, report
from benchmarks.server import memserve, merged, parse_args, profile
from benchmarks.workload import seed_of, texts

SAMPLE_S = 1.0
CLIENTS = 4
USERS = 5  # of a client
ENOUGH = 400  # memories of a user before it is erased
SHARE = 20  # the values at the beginning and at the end are medians of this part of the measured time
POINTS = 400  # of a process in the JSON file
PAUSE_S = 0.2  # of a client that was refused with 429
TIMEOUT_S = 120.0
MIB = 1 << 20

Row = dict[str, Any]


class Plan(NamedTuple):
    """How long the server is warmed up and measured, in seconds."""

    warm_up_s: float
    duration_s: float


FULL = Plan(600, 1800)
QUICK = Plan(30, 60)


@dataclass
class Process:
    """The samples of one process: seconds since the load began, RSS and USS in bytes."""

    role: str
    pid: int
    seconds: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    uss: list[int] = field(default_factory=list)

    def figures(self, plan: Plan) -> Row:
        """The memory at the beginning, at the end and at most, and the points of the plot, in MiB."""
        at = np.array(self.seconds)
        edge = plan.duration_s / SHARE
        begins, ends = plan.warm_up_s, plan.warm_up_s + plan.duration_s
        row: Row = {"role": self.role, "pid": self.pid}
        for name, values in (("rss", np.array(self.rss) / MIB), ("uss", np.array(self.uss) / MIB)):
            first = values[(at >= begins) & (at < begins + edge)]
            last = values[(at > ends - edge) & (at <= ends)]
            measured = values[(at >= begins) & (at <= ends)]
            for key, part, of in (("first", first, np.median), ("last", last, np.median), ("most", measured, np.max)):
                row[f"{name}_{key}"] = float(of(part)) if len(part) else None
            step = max(1, len(values) // POINTS)
            row[name] = [round(float(value), 1) for value in values[::step]]
            row["seconds"] = [round(float(second), 1) for second in at[::step]]
        return row


def role_of(command: list[str]) -> str:
    """The role of a process, from its command line: of a replica the name of its deployment, else the program."""
    title = " ".join(command)
    replica = re.match(r"ray::ServeReplica:[^:]*:(\w+)", title)
    if replica:
        return replica[1]
    if title.startswith("ray::"):
        return title.removeprefix("ray::").split()[0].split(".")[0]
    for argument in command[1:4]:
        if argument.endswith(".py") or argument == "deployments":
            return Path(argument).stem
    return Path(command[0]).name if command else ""


class Sampler:
    """Reads the memory of all descendants of a process."""

    def __init__(self, root: psutil.Process) -> None:
        self._root = root
        self._began = time.monotonic()
        self.processes: dict[int, Process] = {}

    def sample(self) -> None:
        now = time.monotonic() - self._began
        for process in self._root.children(recursive=True):
            try:
                memory = process.memory_full_info()
                seen = self.processes.get(process.pid) or Process(role_of(process.cmdline()), process.pid)
            except psutil.Error:  # it has ended
                continue
            self.processes[process.pid] = seen
            seen.seconds.append(now)
            seen.rss.append(memory.rss)
            seen.uss.append(memory.uss)

    async def run(self) -> None:
        """Sample until this is cancelled."""
        while True:
            await asyncio.to_thread(self.sample)
            await asyncio.sleep(SAMPLE_S)


class Client:
    """Sends requests of every kind for its own users, one at a time."""

    def __init__(self, http: httpx.AsyncClient, number: int, seed: int) -> None:
        self._http = http
        self._rng = random.Random(seed_of(seed, number))
        self._number = number
        self._short, self._mixed = texts("short", self._rng), texts("mixed", self._rng)
        self._memories: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()  # by the kind of request and the status
        self._jobs: dict[Callable[[str], Awaitable[httpx.Response]], int] = {
            self.embed_one: 20,
            self.embed_some: 10,
            self.embed_many: 3,
            self.embed_long: 2,
            self.search: 20,
            self.add_one: 15,
            self.add_many: 8,
            self.update: 5,
            self.list: 5,
            self.export: 2,
            self.import_lines: 3,
            self.delete: 4,
            self.delete_where: 1,
        }

    async def run(self) -> None:
        """Send requests until this is cancelled."""
        while True:
            user = f"soak-{self._number}-{self._rng.randrange(USERS)}"
            (job,) = self._rng.choices(list(self._jobs), weights=list(self._jobs.values()))
            if self._memories[user] > ENOUGH:
                job, self._memories[user] = self.erase, 0
            answer = await job(user)
            self.answers[f"{job.__name__} {answer.status_code}"] += 1
            if answer.status_code == 429:
                await asyncio.sleep(PAUSE_S)

    async def _embed(self, inputs: list[str]) -> httpx.Response:
        body = {"input": inputs, "encoding_format": self._rng.choice(["float", "base64"])}
        return await self._http.post("/v1/embeddings", json=body)

    async def embed_one(self, _: str) -> httpx.Response:
        return await self._embed([next(self._short)])

    async def embed_some(self, _: str) -> httpx.Response:
        return await self._embed(list(islice(self._mixed, self._rng.randrange(2, 64))))

    async def embed_many(self, _: str) -> httpx.Response:
        return await self._embed(list(islice(self._short, self._rng.randrange(100, 400))))

    async def embed_long(self, _: str) -> httpx.Response:
        return await self._embed([" ".join(islice(self._mixed, self._rng.randrange(2, 200)))])

    async def search(self, user: str) -> httpx.Response:
        body: Row = {"query": next(self._short), "top_k": self._rng.choice([1, 10, 100])}
        if self._rng.random() < 0.3:
            body["filter"] = {"n": {"lt": self._rng.random()}}
        return await self._http.post(f"/v1/users/{user}/memories/search", json=body)

    def _new(self, text: str) -> Row:
        return {"id": f"m{self._rng.randrange(ENOUGH)}", "text": text, "metadata": {"n": self._rng.random()}}

    async def add_one(self, user: str) -> httpx.Response:
        self._memories[user] += 1
        return await self._http.post(
            f"/v1/users/{user}/memories", json={**self._new(next(self._short)), "upsert": True}
        )

    async def add_many(self, user: str) -> httpx.Response:
        new = [self._new(text) for text in islice(self._mixed, self._rng.randrange(2, 60))]
        self._memories[user] += len(new)
        memories = list({memory["id"]: memory for memory in new}.values())
        return await self._http.post(f"/v1/users/{user}/memories", json={"memories": memories, "upsert": True})

    async def update(self, user: str) -> httpx.Response:
        path = f"/v1/users/{user}/memories/m{self._rng.randrange(ENOUGH)}"
        return await self._http.patch(path, json={"text": next(self._short)})

    async def list(self, user: str) -> httpx.Response:
        return await self._http.get(f"/v1/users/{user}/memories", params={"limit": self._rng.choice([10, 1000])})

    async def export(self, user: str) -> httpx.Response:
        return await self._http.get(f"/v1/users/{user}/export")

    async def import_lines(self, user: str) -> httpx.Response:
        new = [self._new(text) for text in islice(self._short, self._rng.randrange(1, 40))]
        lines = [orjson.dumps({**memory, "id": f"i{self._rng.getrandbits(48)}"}) for memory in new]
        self._memories[user] += len(lines)
        return await self._http.post(f"/v1/users/{user}/import", content=b"\n".join(lines))

    async def delete(self, user: str) -> httpx.Response:
        return await self._http.delete(f"/v1/users/{user}/memories/m{self._rng.randrange(ENOUGH)}")

    async def delete_where(self, user: str) -> httpx.Response:
        body = {"filter": {"n": {"lt": self._rng.random() / 4}}}
        return await self._http.request("DELETE", f"/v1/users/{user}/memories", json=body)

    async def erase(self, user: str) -> httpx.Response:
        return await self._http.delete(f"/v1/users/{user}")


async def measure(url: str, plan: Plan, sampler: Sampler, seed: int) -> Counter[str]:
    """Load the server for the plan's time. Returns the number of answers by kind of request and status.

    Raises:
        httpx.HTTPError: a request was not answered.
    """
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False) as http:
        clients = [Client(http, number, seed) for number in range(CLIENTS)]
        tasks = [asyncio.create_task(client.run()) for client in clients]
        tasks.append(asyncio.create_task(sampler.run()))
        done, _ = await asyncio.wait(
            tasks, timeout=plan.warm_up_s + plan.duration_s, return_when=asyncio.FIRST_EXCEPTION
        )
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in done:
            task.result()
    return sum((client.answers for client in clients), Counter())


def change(first: float | None, last: float | None) -> str:
    """The change from one value to another, in per cent."""
    return "-" if not first or last is None else f"{last / first - 1:+.0%}"


def table(found: Row) -> str:
    """The memory of each process that lived throughout, and the answers, as two Markdown tables."""
    memory = [
        [
            row["role"],
            *(report.number(row[f"rss_{key}"]) for key in ("first", "last", "most")),
            change(row["rss_first"], row["rss_last"]),
            *(report.number(row[f"uss_{key}"]) for key in ("first", "last", "most")),
            change(row["uss_first"], row["uss_last"]),
        ]
        for row in found["processes"]
    ]
    kinds: dict[str, Counter[str]] = {}
    for key, number in found["answers"].items():
        kind, status = key.split()
        kinds.setdefault(kind, Counter())[status] += number
    answers = [
        [kind.replace("_", " "), f"{statuses.total():,}", ", ".join(f"{s}: {n:,}" for s, n in sorted(statuses.items()))]
        for kind, statuses in sorted(kinds.items())
    ]
    head = ["process", "RSS after warm-up, MiB", "at the end", "at most", "change"]
    head += ["USS after warm-up, MiB", "at the end", "at most", "change"]
    return "\n".join(
        [
            "## Memory\n",
            report.table(head, memory),
            "\n## Requests\n",
            report.table(["request", "answers", "by status"], answers),
        ]
    )


def draw(found: Row, path: Path) -> None:
    """Draw the RSS of each process over time, with the end of the warm-up as a line."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "memserve", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for row in found["processes"]:
        axis.plot([second / 60 for second in row["seconds"]], row["rss"], label=row["role"], linewidth=1)
    axis.axvline(found["warm_up_s"] / 60, color="grey", linestyle=":", label="end of the warm-up")
    axis.set(xlabel="minutes of load", ylabel="RSS, MiB", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--warm-up-s", type=float)
    parser.add_argument("--duration-s", type=float, help="of the measurement, after the warm-up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--args", type=parse_args, default={}, help="JSON settings that override the profile")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "soak.json")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    given = {"warm_up_s": options.warm_up_s, "duration_s": options.duration_s}
    plan = plan._replace(**{name: value for name, value in given.items() if value is not None})
    settings = merged(profile(), options.args)
    found: Row = {"kind": "soak", **machine.provenance()}
    with memserve(settings) as server:
        found |= {name: server.ready[name] for name in ("model", "device", "dtype")}
        sampler = Sampler(psutil.Process())
        answers = asyncio.run(measure(server.url, plan, sampler, options.seed))
    lasting = [one for one in sampler.processes.values() if one.seconds[0] <= plan.warm_up_s]
    figures = [one.figures(plan) for one in lasting]
    found |= {"settings": settings, **plan._asdict(), "answers": dict(answers)}
    found["processes"] = sorted(
        (row for row in figures if row["rss_last"] is not None), key=lambda row: -row["rss_last"]
    )
    print(table(found))
    print("\n".join(map(str, report.save(found, options.out))))


if __name__ == "__main__":
    main()
