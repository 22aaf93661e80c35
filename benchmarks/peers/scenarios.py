"""The scenarios in which memserve is compared with other servers."""

from dataclasses import dataclass

from benchmarks.peers.table import Job


@dataclass(frozen=True)
class Scenario:
    """One comparison, reported as one table.

    Attributes:
        load: arguments of the load generator.
        stretch: a factor on the time to warm up and to measure. Slow answers need more time.
    """

    key: str
    title: str
    job: Job
    load: tuple[str, ...] = ()
    users: tuple[str, ...] = ()  # the users whose memories are searched by vector
    engine: str | None = None  # if set, memserve's bare engine is measured as well, with texts of this length
    stretch: float = 1.0
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


SMALL = tuple(f"user-{n}" for n in range(10))
SCENARIOS = (
    Scenario("64 x 1", "64 clients, one short text per request", "embed", ("--clients", "64")),
    Scenario("1 x 1", "1 client, one short text per request", "embed", ("--clients", "1"), stretch=0.6),
    Scenario(
        "8 x 32", "8 clients, 32 short texts per request", "embed", ("--clients", "8", "--size", "32"), engine="short"
    ),
    Scenario(
        "8 x 32 mixed",
        "8 clients, 32 texts of 4 to 200 words per request",
        "embed",
        ("--clients", "8", "--size", "32", "--length", "mixed"),
        engine="mixed",
        stretch=2.0,
        dtypes=("bfloat16",),
    ),
    Scenario("add", "64 clients, one short memory added per request", "add", ("--clients", "64")),
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


OURS = "memserve"
OURS_DTYPE = "bfloat16"
ENGINE = "engine"
