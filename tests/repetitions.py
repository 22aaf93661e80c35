"""How often a test repeats what it checks: in full in `make test`, less often in `make unit`.

`make unit` deselects the slow tests. Some properties are tried with many inputs that are alike; of these it tries only
some, instead of leaving the property out.
"""

_run = {"quick": False}


def choose(*, quick: bool) -> None:
    """Called once, before the tests are imported."""
    _run["quick"] = quick


def repetitions(full: int, *, quick: int) -> int:
    """The number of repetitions in this run."""
    return quick if _run["quick"] else full
