"""What a search and an embedding of one short text cost beside the bulk work of other callers.

    python -m benchmarks.fairness                        # about 10 minutes on two cores
    python -m benchmarks.fairness --quick                # less than 2
    python -m benchmarks.fairness --baseline ../older    # this tree and another checkout, in turns

One client searches and another embeds one short text, one request at a time each: first alone, then while other callers
keep the server busy with bulk work. Each kind of bulk work also runs without these two, so that its throughput with and
without them can be compared. A bulk caller that is refused with 429 sends its request again after a second. No two
texts are equal, so the cache answers none of them.

A table gives the limit that p99 should not pass: three times p99 alone, and one forward, which is the median latency
of a request that fills one run of the model. Writes benchmarks/results/fairness.json, its report and its plot.
"""

import argparse
import asyncio
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import orjson

from benchmarks import machine, report
from benchmarks.connections import Connections
from benchmarks.figures import percentiles_ms, spread
from benchmarks.load import send
from benchmarks.server import Args, memserve, merged, parse_args, profile
from benchmarks.workload import Request, request_maker, seed_of, texts

CHARACTERS = 1_000  # of a text in a bulk embedding; with the words of the workload about 150 tokens
WORDS = "100"  # of a text in a bulk add or an import
CALLERS = 8
FORWARD_TEXTS = 7  # texts of CHARACTERS that fill one run of the model
FORWARDS = 9  # timed requests of so many texts
MEMORIES = 100  # of the user whose memories are searched
BEGIN_S = 0.3  # from the first bulk request to the first request of the single clients
REFUSED_PAUSE_S = 0.05  # of a single client
RETRY_S = 1.0  # of a bulk caller
SINGLE = ("search", "embed")
ALLOWED = 3  # times p99 alone

Row = dict[str, Any]


@dataclass
class Latencies:
    """Requests of a single client. Latencies are in seconds and of answered requests only."""

    answered_s: list[float] = field(default_factory=list)
    refused: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Latencies") -> None:
        self.answered_s += other.answered_s
        self.refused += other.refused
        self.errors += other.errors

    @property
    def sent(self) -> int:
        """The number of requests."""
        return len(self.answered_s) + self.refused + self.errors.total()

    def figures(self) -> Row:
        """Percentiles in milliseconds, the number of answers, of refusals (429) and of other errors by their status."""
        latencies = percentiles_ms(self.answered_s)
        return {**latencies, "requests": len(self.answered_s), "refused": self.refused, "errors": dict(self.errors)}


Single = dict[str, Latencies]


class Bulk(NamedTuple):
    """A kind of bulk work.

    `make` takes a source of randomness, a number of texts and the dimension of the vectors, and returns one request for
    each caller. `factor` multiplies the number of texts, so that each kind takes about as long.
    """

    key: str
    title: str
    make: Callable[[random.Random, int, int], list[Request]]
    factor: int = 1


def long_texts(rng: random.Random, number: int) -> list[str]:
    """Texts of CHARACTERS characters."""
    return [text[:CHARACTERS] for text in islice(texts(str(CHARACTERS // 4), rng), number)]


def embedding(rng: random.Random, number: int) -> Request:
    """A request for the vectors of long texts."""
    body = {"input": long_texts(rng, number), "encoding_format": "base64"}
    return Request("/v1/embeddings", orjson.dumps(body), number)


def bulk_embed(rng: random.Random, number: int, _: int) -> list[Request]:
    return [embedding(rng, number)]


def many_bulk_embeds(rng: random.Random, number: int, _: int) -> list[Request]:
    return [embedding(rng, number // CALLERS) for _ in range(CALLERS)]


def bulk_add(rng: random.Random, number: int, _: int) -> list[Request]:
    memories = [{"text": text} for text in islice(texts(WORDS, rng), number)]
    return [Request(f"{_user(rng)}/memories", orjson.dumps({"memories": memories}), number)]


def bulk_import(rng: random.Random, number: int, _: int) -> list[Request]:
    lines = [{"id": f"m{n}", "text": text} for n, text in enumerate(islice(texts(WORDS, rng), number))]
    return [Request(f"{_user(rng)}/import", b"\n".join(map(orjson.dumps, lines)), number)]


def bulk_import_of_vectors(rng: random.Random, number: int, dim: int) -> list[Request]:
    vectors = np.random.default_rng(rng.getrandbits(32)).standard_normal((number, dim), np.float32)
    found = zip(islice(texts(WORDS, rng), number), vectors, strict=True)
    lines = [
        orjson.dumps({"id": f"m{n}", "text": text, "vector": vector}, option=orjson.OPT_SERIALIZE_NUMPY)
        for n, (text, vector) in enumerate(found)
    ]
    return [Request(f"{_user(rng)}/import", b"\n".join(lines), number)]


def _user(rng: random.Random) -> str:
    """The path of a new user."""
    return f"/v1/users/bulk-{rng.getrandbits(48)}"


BULKS = (
    Bulk("embed", "one bulk embedding", bulk_embed),
    Bulk("add", "one bulk add", bulk_add),
    Bulk("import", "an import of texts", bulk_import),
    Bulk("vectors", "an import of vectors", bulk_import_of_vectors, 40),
    Bulk("callers", f"{CALLERS} bulk embeddings", many_bulk_embeds),
)
BY_KEY = {bulk.key: bulk for bulk in BULKS}


class Plan(NamedTuple):
    """How much is measured. `texts`: of a bulk embedding; `rounds`: in each, every tree is started and measured."""

    texts: int
    alone_s: float
    rounds: int
    bulks: Sequence[Bulk] = BULKS


FULL = Plan(texts=1_000, alone_s=20.0, rounds=1)
QUICK = Plan(texts=160, alone_s=4.0, rounds=1)


class Tree(NamedTuple):
    """A checkout of memserve."""

    name: str
    root: Path
    commit: str


def tree(name: str, root: Path) -> Tree:
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    return Tree(name, root, subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


async def single_client(server: Connections, job: str, until: Callable[[], bool], seed: int) -> Latencies:
    """Send requests of one short text, one at a time and at least one."""
    make = request_maker(job, 1, "short", random.Random(seed), users=1)
    found = Latencies()
    while not until() or found.sent == 0:
        request = make()
        sent = time.perf_counter()
        error = await send(server, request)
        if error is None:
            found.answered_s.append(time.perf_counter() - sent)
            continue
        if error == "429":
            found.refused += 1
        else:
            found.errors[error] += 1
        await asyncio.sleep(REFUSED_PAUSE_S)
    return found


async def single_clients(server: Connections, until: Callable[[], bool], seed: int) -> Single:
    """A single client for each job."""
    found = await asyncio.gather(*(single_client(server, job, until, seed_of(seed, job)) for job in SINGLE))
    return dict(zip(SINGLE, found, strict=True))


class Throughput(NamedTuple):
    """Texts a second of all bulk callers, from the first request to the last answer, and how often one was refused."""

    texts_per_s: float
    refused: int


async def run_bulk(server: Connections, requests: Sequence[Request]) -> Throughput:
    """Send the requests at once, each from a caller of its own, until all are answered with 2xx.

    Raises:
        RuntimeError: a request was answered with another error than 429.
    """
    refused = 0

    async def caller(request: Request) -> None:
        nonlocal refused
        while (error := await send(server, request)) is not None:
            if error != "429":
                raise RuntimeError(f"bulk work failed: {error}")
            refused += 1
            await asyncio.sleep(RETRY_S)

    began = time.perf_counter()
    await asyncio.gather(*map(caller, requests))
    took_s = time.perf_counter() - began
    return Throughput(sum(request.texts for request in requests) / took_s, refused)


async def beside(server: Connections, requests: Sequence[Request], seed: int) -> tuple[Throughput, Single]:
    """Run bulk work, with the single clients beside it until it ends."""
    bulk = asyncio.create_task(run_bulk(server, requests))
    await asyncio.wait([bulk], timeout=BEGIN_S)
    single = await single_clients(server, bulk.done, seed)
    return await bulk, single


async def one_forward_ms(server: Connections, seed: int) -> list[float]:
    """Latencies of a request that fills one run of the model, on an idle server."""
    rng = random.Random(seed)
    took = []
    for _ in range(FORWARDS):
        request = embedding(rng, FORWARD_TEXTS)
        sent = time.perf_counter()
        if error := await send(server, request):
            raise RuntimeError(f"an embedding failed: {error}")
        took.append((time.perf_counter() - sent) * 1e3)
    return took


@dataclass
class Measured:
    """The samples of one tree in all rounds."""

    tree: Tree
    forward_ms: list[float] = field(default_factory=list)
    single: dict[str, Single] = field(default_factory=dict)  # by the key of the bulk work; "" for alone
    bulk_alone: dict[str, list[Throughput]] = field(default_factory=dict)
    bulk_beside: dict[str, list[Throughput]] = field(default_factory=dict)

    def add_single(self, key: str, found: Single) -> None:
        so_far = self.single.setdefault(key, {job: Latencies() for job in SINGLE})
        for job, latencies in found.items():
            so_far[job].add(latencies)

    def figures(self) -> Row:
        """The tree's part of the result."""
        bulks = []
        for key, alone in self.bulk_alone.items():
            together = self.bulk_beside[key]
            rates = [spread([one.texts_per_s for one in runs]).median for runs in (alone, together)]
            refused = sum(one.refused for one in together)
            single = {job: latencies.figures() for job, latencies in self.single[key].items()}
            bulks.append(
                {"key": key, "alone_per_s": rates[0], "beside_per_s": rates[1], "refused": refused, "single": single}
            )
        return {
            "name": self.tree.name,
            "commit": self.tree.commit,
            "forward_ms": spread(self.forward_ms).median,
            "alone": {job: latencies.figures() for job, latencies in self.single[""].items()},
            "bulks": bulks,
        }


def prepare(url: str, seed: int) -> int:
    """Add the memories that are searched. Returns the dimension of the server's vectors."""
    memories = [{"text": text} for text in islice(texts("short", random.Random(seed)), MEMORIES)]
    with httpx.Client(base_url=url, timeout=60.0, trust_env=False) as client:
        client.post("/v1/users/user-0/memories", json={"memories": memories}).raise_for_status()
        answer = client.post("/v1/embeddings", json={"input": "how long is a vector"}).raise_for_status()
    return len(answer.json()["data"][0]["embedding"])


async def measure(url: str, dim: int, plan: Plan, measured: Measured, seed: int) -> None:
    """One round of one tree."""
    seeds = (seed_of(seed, n) for n in count())
    async with Connections(url) as server:
        await run_bulk(server, [embedding(random.Random(next(seeds)), 8 * FORWARD_TEXTS)])  # warms every embedder
        await single_clients(server, _after(1.0), next(seeds))
        measured.forward_ms += await one_forward_ms(server, next(seeds))
        measured.add_single("", await single_clients(server, _after(plan.alone_s), next(seeds)))
        for bulk in plan.bulks:
            number = plan.texts * bulk.factor
            alone, together = (bulk.make(random.Random(next(seeds)), number, dim) for _ in range(2))
            measured.bulk_alone.setdefault(bulk.key, []).append(await run_bulk(server, alone))
            throughput, single = await beside(server, together, next(seeds))
            measured.bulk_beside.setdefault(bulk.key, []).append(throughput)
            measured.add_single(bulk.key, single)


def _after(seconds: float) -> Callable[[], bool]:
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= end


def allowed_ms(found: Row, job: str) -> float:
    """The limit for p99 of a single request: three times its p99 alone, and one forward."""
    limit: float = ALLOWED * found["alone"][job]["p99_ms"] + found["forward_ms"]
    return limit


def table(found: Row) -> str:
    """The result as two Markdown tables: the single requests, and the bulk work beside them."""
    single: list[list[object]] = []
    for job in SINGLE:
        for one in found["trees"]:
            rows = [
                ("nothing", one["alone"][job]),
                *((BY_KEY[bulk["key"]].title, bulk["single"][job]) for bulk in one["bulks"]),
            ]
            limit = report.number(allowed_ms(one, job))
            single += [
                [
                    job,
                    title,
                    one["name"],
                    *(report.number(row[f"p{q}_ms"]) for q in (50, 99)),
                    limit,
                    f"{row['requests']:,}",
                    row["refused"],
                    report.errors([row]) or "none",
                ]
                for title, row in rows
            ]
    bulk = [
        [
            BY_KEY[row["key"]].title,
            one["name"],
            report.number(row["alone_per_s"]),
            report.number(row["beside_per_s"]),
            f"{row['beside_per_s'] / row['alone_per_s']:.0%}",
            row["refused"],
        ]
        for one in found["trees"]
        for row in one["bulks"]
    ]
    head = ["request", "beside", "tree", "p50 ms", "p99 ms", "limit of p99", "answered", "429", "other errors"]
    return "\n".join(
        [
            "## The single requests\n",
            report.table(head, single),
            "\n## The bulk work\n",
            report.table(["bulk work", "tree", "texts/s alone", "beside the requests", "share", "429"], bulk),
        ]
    )


def describe_trees(found: Row) -> str:
    """The commit and the duration of one forward of each tree."""
    lines = [
        f"- {one['name']}: commit {one['commit'][:12]}; one forward takes {report.number(one['forward_ms'])} ms"
        for one in found["trees"]
    ]
    return "\n".join(lines) + "\n"


def draw(found: Row, path: Path) -> None:
    """Draw p50 and p99 of each single request as bars, on a logarithmic scale, with the limit of p99 as a line."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "memserve", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    trees = found["trees"]
    names = ["nothing", *(BY_KEY[row["key"]].title for row in trees[0]["bulks"])]
    figure, axes = pyplot.subplots(1, len(SINGLE), figsize=(10, 4), sharey=True, layout="constrained")
    height = 0.8 / len(trees)
    for axis, job in zip(axes, SINGLE, strict=True):
        for place, one in enumerate(trees):
            rows = [one["alone"][job], *(row["single"][job] for row in one["bulks"])]
            at = [number + place * height for number in range(len(rows))]
            colour = f"C{place}"
            p99 = [row["p99_ms"] for row in rows]
            axis.barh(at, p99, height * 0.9, color=colour, alpha=0.4, label=f"{one['name']}, p99")
            p50 = [row["p50_ms"] for row in rows]
            axis.barh(at, p50, height * 0.9, color=colour, label=f"{one['name']}, p50")
            limit = allowed_ms(one, job)
            axis.axvline(limit, color=colour, linestyle=":", label=f"{one['name']}, limit of p99")
            for y, row in zip(at, rows, strict=True):
                if row["refused"]:
                    refused = row["refused"] / (row["refused"] + row["requests"])
                    in_bar = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 7, "color": "white"}
                    axis.text(0.01, y, f"{refused:.0%} refused", **in_bar)
        axis.set_xscale("log")
        axis.set_yticks([number + 0.4 - height / 2 for number in range(len(names))], names)
        axis.set(title=f"{job}, beside", xlabel="ms")
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, frameon=False, loc="outside lower center", ncols=len(handles))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def bulks(given: str) -> Sequence[Bulk]:
    """Kinds of bulk work from a command line, separated by commas."""
    return [BY_KEY[key] for key in given.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--baseline", type=Path, metavar="FOLDER", help="another checkout of memserve")
    parser.add_argument("--only", type=bulks, default=BULKS, help=f"of {','.join(BY_KEY)}")
    parser.add_argument("--texts", type=int, help="of a bulk embedding")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--args", type=parse_args, default={}, help="JSON settings that override the profile")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "fairness.json")
    options = parser.parse_args()
    plan = (QUICK if options.quick else FULL)._replace(bulks=options.only)
    given = {"texts": options.texts, "rounds": options.rounds}
    plan = plan._replace(**{name: value for name, value in given.items() if value is not None})
    settings: Args = merged(profile(), options.args)
    trees = [tree("after" if options.baseline else "memserve", machine.ROOT)]
    if options.baseline:
        trees.insert(0, tree("before", options.baseline.resolve()))
    measured = [Measured(one) for one in trees]
    found: Row = {"kind": "fairness", **machine.provenance()}
    for turn in range(plan.rounds):
        for one in measured:
            with memserve(settings, root=one.tree.root) as server:
                found |= {name: server.ready[name] for name in ("model", "device", "dtype")}
                dim = prepare(server.url, seed_of(options.seed, turn, "memories"))
                asyncio.run(measure(server.url, dim, plan, one, seed_of(options.seed, turn)))
    found |= {"settings": settings, "texts": plan.texts, "rounds": plan.rounds}
    found["trees"] = [one.figures() for one in measured]
    print(table(found))
    print("\n".join(map(str, report.save(found, options.out))))


if __name__ == "__main__":
    main()
