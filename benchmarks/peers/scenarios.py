"""What is measured, and what each figure is held against."""

from dataclasses import dataclass

from benchmarks.peers.table import Job


@dataclass(frozen=True)
class Scenario:
    """One table. `load` goes to the load generator; slow answers want a longer window (`stretch`)."""

    key: str
    title: str
    job: Job
    load: tuple[str, ...] = ()
    users: tuple[str, ...] = ()  # whose memories are searched by vector
    engine: str | None = None  # the length of the texts that memserve's bare engine gets beside it
    stretch: float = 1.0
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


SMALL = tuple(f"user-{n}" for n in range(10))
SCENARIOS = (
    Scenario("64 x 1", "64 clients, one short text a request", "embed", ("--clients", "64")),
    Scenario("1 x 1", "1 client, one short text a request", "embed", ("--clients", "1"), stretch=0.6),
    Scenario(
        "8 x 32", "8 clients, 32 short texts a request", "embed", ("--clients", "8", "--size", "32"), engine="short"
    ),
    Scenario(
        "8 x 32 mixed",
        "8 clients, 32 texts of 4 to 200 words a request",
        "embed",
        ("--clients", "8", "--size", "32", "--length", "mixed"),
        engine="mixed",
        stretch=2.0,
        dtypes=("bfloat16",),
    ),
    Scenario("add", "64 clients, one short memory added a request", "add", ("--clients", "64")),
    Scenario(
        "search", "64 clients, a search by text in 1,000 memories", "search", ("--clients", "64", "--users", "10")
    ),
    Scenario(
        "vectors 1,000", "64 clients, a search by vector in 1,000 memories", "vectors", ("--clients", "64"), SMALL
    ),
    Scenario(
        "vectors 20,000",
        "64 clients, a search by vector in 20,000 memories",
        "vectors",
        ("--clients", "64"),
        ("large-0",),
    ),
)


@dataclass(frozen=True)
class Target:
    """memserve's figure over another's in the same round; the other: a peer (or what its
    key begins with), `engine`, or memserve itself elsewhere."""

    scenario: str
    over: str
    at_least: float
    of: str | None = None  # the other's scenario, where it is not the same


OURS = "memserve"
OURS_DTYPE = "bfloat16"
ENGINE = "engine"
TARGETS = (
    Target("64 x 1", "plain-batch", 5.0),
    Target("64 x 1", "infinity", 3.0),
    Target("64 x 1", "litserve", 3.0),
    Target("64 x 1", "lock", 10.0),
    Target("8 x 32", ENGINE, 0.85),
    Target("8 x 32", "infinity", 2.0),
    Target("add", OURS, 0.8, of="64 x 1"),
    Target("add", "mem0", 8.0),
    Target("search", "mem0", 8.0),
)
