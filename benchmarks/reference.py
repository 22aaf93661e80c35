"""The scenarios of AgentMem's published comparison on memserve. Each is one command.

    python -m benchmarks.reference                 # all, interleaved, in about 5 minutes; writes JSON and a report
    python -m benchmarks.reference sequential      # one, and the scenario that its ratio is taken to

AgentMem's figures come from its own tests (performance_comparison_test.rs, embedding_queue_test.rs; 2025). They call a
library in the same process, with `memory://` storage, FastEmbed with bge-small-en-v1.5 and texts of three words; their
concurrent batches are one batch of the 100 texts that 20 callers would have sent. memserve's figures are taken over
HTTP, with every add committed to disk before it is answered (SQLite, `synchronous` FULL), texts of 4 to 12 words and
the client on the same cores. The absolute figures therefore compare two set-ups on two machines. The ratios show what
each design gains over its own baseline.

The column "in process" is nearer to theirs: the same calls on AgentMem's interface (`memserve.Memory.builder()`) in one
process, with `memory://` and a queue of 32 texts, or without it. There is one model, so it has no row for several.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import in_process, machine, report
from benchmarks.load import Load, parser_of_loads
from benchmarks.server import Args, Server, load, memserve, merged, parse_args, profile, replicas
from benchmarks.workload import seed_of

# The servers run at the same time and are loaded in turn; an idle server costs next to nothing.
ONE: Args = {"embedder": replicas(1)}
SERVERS: dict[str, Args] = {
    "one": ONE,
    # Each request makes its own handle call, forward pass and transaction.
    "one, no queue": merged(
        ONE,
        {
            "queue": {"enabled": False},
            "gateway": {
                "embed_call_tokens": 1,
                "embed_calls_in_flight": 64,
                "append_call_memories": 1,
                "append_calls_in_flight": 64,
            },
        },
    ),
    "several": {},
}


@dataclass(frozen=True)
class Scenario:
    """One row. `base` is the scenario that its ratio is taken to; `theirs` are AgentMem's figures."""

    name: str
    title: str
    server: str
    load: str
    base: str | None = None
    theirs: str | None = None
    their_ratio: str | None = None

    @property
    def in_process(self) -> bool:
        """Whether one process can run it."""
        return self.server != "several"

    @property
    def queued(self) -> bool:
        """Whether it uses the queue."""
        return self.server != "one, no queue"


SCENARIOS = (
    Scenario("sequential", "single adds, one after the other", "one", "--job add --clients 1", None, "19.08"),
    Scenario(
        "batch", "one batch of 50", "one", "--job add --clients 1 --size 50", "sequential", "251 to 430", "13.16x"
    ),
    Scenario(
        "unqueued", "20 concurrent single adds, no queue", "one, no queue", "--job add --clients 20", None, "43 to 109"
    ),
    Scenario("queued", "the same with the queue", "one", "--job add --clients 20", "unqueued", "217.62", "2.00x"),
    Scenario(
        "batches",
        "concurrent batches: 4 of 100",
        "one",
        "--job add --clients 4 --size 100",
        "unqueued",
        "361 to 371",
        "8.31x",
    ),
    Scenario("one-instance", "64 concurrent single adds, one model", "one", "--job add --clients 64"),
    Scenario(
        "instances",
        "the same with several models",
        "several",
        "--job add --clients 64",
        "one-instance",
        "2,000 to 4,000 (planned)",
    ),
    Scenario("uncached", "20 concurrent embeds, all texts new", "one", "--job embed --clients 20"),
    Scenario("cached", "the same, 100 texts repeated", "one", "--job embed --clients 20 --distinct 100", "uncached"),
)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def chosen(names: Iterable[str]) -> list[Scenario]:
    """The named scenarios and the bases of their ratios, in the order of the table; all if no name is given."""
    wanted = set(names) or set(BY_NAME)
    wanted |= {base for name in wanted if (base := BY_NAME[name].base)}
    return [scenario for scenario in SCENARIOS if scenario.name in wanted]


def ratios(runs: Mapping[str, Sequence[dict[str, Any]]], scenario: Scenario) -> list[float]:
    """The texts/s of each run of a scenario, by those of its base in the same round; none without a base."""
    if scenario.base is None:
        return []
    both = zip(runs[scenario.name], runs[scenario.base], strict=True)
    return [ours["texts_per_s"] / base["texts_per_s"] for ours, base in both if base["texts_per_s"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", nargs="*", choices=[[], *BY_NAME], help="default: all of them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure-s", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", help="a model other than the default")
    parser.add_argument("--args", type=parse_args, default={}, help="settings over this machine's profile, as JSON")
    parser.add_argument("--commit", help="the commit of a copy without git")
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    options = parser.parse_args()
    scenarios = chosen(options.scenario)
    found: dict[str, Any] = {"kind": "reference", **machine.provenance(options.commit)}
    model: Args = {"model": {"name": options.model}} if options.model else {}
    runs: dict[str, list[dict[str, Any]]] = {scenario.name: [] for scenario in scenarios}
    inside: dict[str, list[dict[str, Any]]] = {scenario.name: [] for scenario in scenarios}
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name in tqdm({scenario.server: None for scenario in scenarios}, desc="starting", unit="server"):
            servers[name] = stack.enter_context(memserve(profile(), SERVERS[name], model, options.args))
            found |= {key: servers[name].ready[key] for key in ("model", "device", "dtype")}
        stores = stack.enter_context(in_process.Stores(options.model or "all-MiniLM-L6-v2"))
        with tqdm(total=options.rounds * len(scenarios), desc="reference") as bar:
            for turn in range(options.rounds):
                for scenario in scenarios:
                    bar.set_postfix_str(scenario.name)
                    extra = ["--warm-s", 1, "--measure-s", options.measure_s]
                    extra += ["--seed", seed_of(options.seed, turn, scenario.name)]
                    url = servers[scenario.server].url
                    runs[scenario.name].append(load(url, *scenario.load.split(), *extra))
                    if scenario.in_process:
                        given = parser_of_loads().parse_args([*scenario.load.split(), *map(str, extra)])
                        inside[scenario.name].append(stores.measure(Load(**vars(given)), queued=scenario.queued))
                    bar.update()
    found["scenarios"] = [
        {
            **vars(scenario),
            "runs": runs[scenario.name],
            "ratios": ratios(runs, scenario),
            "in_process": inside[scenario.name],
            "ratios_in_process": ratios(inside, scenario) if scenario.in_process else [],
        }
        for scenario in scenarios
    ]
    print(report.reference_table(found))
    if not options.scenario:
        path = options.results / f"reference-{machine.stem(found)}.json"
        print("\n".join(map(str, report.save(found, path))))


if __name__ == "__main__":
    main()
