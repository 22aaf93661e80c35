"""`make bench`: throughput and latency of one memserve server over HTTP, with the client on the same cores.

    python -m benchmarks.suite             # about 9 minutes on two cores
    python -m benchmarks.suite --quick     # about 2

Closed loop: embed, add, search and mixed jobs with one short text per request and 1, 4, 16, 64 and 256 clients; 32
texts per request with 1, 4, 16 and 64 clients (one gateway does not admit 256 x 32 texts); texts of medium and mixed
lengths with enough clients to keep the server busy. Open loop: embed, add, search and mixed jobs at fractions of the
closed loop's best rate. Each repeat measures all cells in a different order, so that a change in the machine's speed
affects all of them.

Writes benchmarks/results/<machine>-<commit>.json, a Markdown report next to it, and its plots.
"""

import argparse
import asyncio
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import machine, report
from benchmarks.connections import Connections
from benchmarks.figures import spread
from benchmarks.load import send
from benchmarks.server import Args, load, memserve, merged, parse_args, profile
from benchmarks.workload import filling, seed_of

PROCESSES_START_S = 0.8  # how long the load generator takes to start; an estimate for the progress bar


@dataclass(frozen=True)
class Cell:
    """One closed-loop measurement."""

    job: str
    size: int
    length: str
    clients: int


@dataclass(frozen=True)
class Open:
    """One open-loop measurement, at a fraction (`share`) of the closed loop's best rate for this job."""

    job: str
    share: float


@dataclass(frozen=True)
class Plan:
    """What is measured, how often, and for how long."""

    cells: tuple[Cell, ...]
    opens: tuple[Open, ...]
    repeats: int
    open_repeats: int
    warm_s: float
    measure_s: float
    open_measure_s: float
    memories_a_user: int

    @property
    def seconds(self) -> float:
        """The approximate duration of all measurements."""
        fixed = self.warm_s + PROCESSES_START_S
        closed = self.repeats * len(self.cells) * (fixed + self.measure_s)
        return closed + self.open_repeats * len(self.opens) * (fixed + self.open_measure_s)


def cells(clients: Iterable[int], clients_of_32: Iterable[int], busy: int, busy_of_32: int) -> tuple[Cell, ...]:
    """The cells of a plan. Not all combinations are measured."""
    single = [Cell(job, 1, "short", n) for job in ("embed", "add", "search", "mixed") for n in clients]
    many = [Cell(job, 32, "short", n) for job in ("embed", "add") for n in clients_of_32]
    long = [Cell(job, 1, length, busy) for job in ("embed", "add") for length in ("medium", "mixed")]
    many_long = [Cell("embed", 32, length, busy_of_32) for length in ("medium", "mixed")]
    return (*single, *many, *long, *many_long)


def opens(jobs: Iterable[str], shares: Iterable[float]) -> tuple[Open, ...]:
    return tuple(Open(job, share) for job in jobs for share in shares)


JOBS = ("embed", "add", "search", "mixed")
FULL = Plan(
    cells((1, 4, 16, 64, 256), (1, 4, 16, 64), 64, 16),
    opens(JOBS, (0.2, 0.4, 0.6, 0.8, 0.95)),
    repeats=3,
    open_repeats=2,
    warm_s=0.7,
    measure_s=2.2,
    open_measure_s=3.0,
    memories_a_user=10,
)
QUICK = Plan(
    cells((1, 16, 64), (4, 16), 64, 16),
    opens(("embed", "add"), (0.4, 0.8)),
    repeats=1,
    open_repeats=1,
    warm_s=0.5,
    measure_s=1.5,
    open_measure_s=2.5,
    memories_a_user=2,
)


async def fill(url: str, memories_a_user: int, seed: int) -> None:
    """Give every user memories to search."""
    waiting = iter(list(filling(memories_a_user, random.Random(seed))))

    async def client(server: Connections) -> None:
        for request in waiting:
            if (error := await send(server, request)) is not None:
                raise SystemExit(f"filling failed: {error}")

    async with Connections(url) as server:
        await asyncio.gather(*(client(server) for _ in range(8)))


def arguments_of(cell: Cell, plan: Plan, processes: int) -> list[object]:
    """The load generator's arguments for a cell."""
    arguments = ["--job", cell.job, "--clients", cell.clients, "--size", cell.size, "--length", cell.length]
    return [*arguments, "--measure-s", plan.measure_s, "--processes", min(processes, cell.clients)]


def most(closed: Iterable[dict[str, Any]], job: str) -> float:
    """The highest rate of a job with one short text per request: the best median of all numbers of clients."""
    return max(
        spread([run["requests_per_s"] for run in row["runs"]]).median
        for row in closed
        if row["job"] == job and row["size"] == 1 and row["length"] == "short"
    )


def measure(url: str, plan: Plan, seed: int, processes: int) -> dict[str, Any]:
    """Run a plan against a server. Returns `{"closed": [...], "open": [...]}`; each item is a cell and its runs."""
    asyncio.run(fill(url, plan.memories_a_user, seed))
    closed = [{**asdict(cell), "runs": []} for cell in plan.cells]
    open_loop: list[dict[str, Any]] = [{**asdict(one), "runs": []} for one in plan.opens]
    fixed = plan.warm_s + PROCESSES_START_S
    form = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=plan.seconds, bar_format=form, desc="bench") as bar:
        for turn in range(plan.repeats):
            order = random.Random(seed + turn).sample(range(len(plan.cells)), len(plan.cells))
            for position in order:
                cell = plan.cells[position]
                bar.set_postfix_str(f"{turn + 1}/{plan.repeats} {cell.job} {cell.size} {cell.length} x{cell.clients}")
                extra = ["--warm-s", plan.warm_s, "--seed", seed_of(seed, turn, cell)]
                closed[position]["runs"].append(load(url, *arguments_of(cell, plan, processes), *extra))
                bar.update(fixed + plan.measure_s)
        for turn in range(plan.open_repeats):
            order = random.Random(seed + turn).sample(range(len(plan.opens)), len(plan.opens))
            for position in order:
                row = open_loop[position]
                rate = row["rate"] = round(row["share"] * most(closed, row["job"]), 2)
                bar.set_postfix_str(f"{turn + 1}/{plan.open_repeats} {row['job']}, {rate:.0f} a second")
                extra = ["--warm-s", plan.warm_s, "--measure-s", plan.open_measure_s]
                extra += ["--seed", seed_of(seed, turn, row["job"], rate), "--processes", processes]
                row["runs"].append(load(url, "--job", row["job"], "--rate", rate, *extra))
                bar.update(fixed + plan.open_measure_s)
    return {"closed": closed, "open": open_loop}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, help="repeats of the closed loop; default: 3, with --quick 1")
    parser.add_argument("--processes", type=int, default=max(1, machine.cores() // 4), help="load generator processes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--args", type=parse_args, default={}, help="JSON settings that override this machine's profile"
    )
    parser.add_argument("--model", help="a model other than the default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="the commit, if this copy is not a git repository")
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    if options.repeats:
        plan = replace(plan, repeats=options.repeats)
    found: dict[str, Any] = {"kind": "suite", "quick": options.quick, **machine.provenance(options.commit)}
    model: Args = {"model": {"device": options.device, **({"name": options.model} if options.model else {})}}
    settings = merged(profile(), model, options.args)
    with memserve(settings) as server:
        found |= {name: server.ready[name] for name in ("model", "device", "dtype")}
        found |= {"settings": settings, "seed": options.seed, "load_processes": options.processes}
        timing = {name: value for name, value in asdict(plan).items() if name not in ("cells", "opens")}
        found |= {"plan": timing, **measure(server.url, plan, options.seed, options.processes)}
    name = machine.stem(found) + ("-quick" if options.quick else "")
    print("\n".join(map(str, report.save(found, options.results / f"{name}.json"))))


if __name__ == "__main__":
    main()
