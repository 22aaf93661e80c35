"""Python does not search a growing heap again and again."""

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from deployments.serving.garbage import collect_old_seldom


@pytest.fixture(scope="module")
def fresh_process() -> Iterator[ProcessPoolExecutor]:
    """A process for each call: how often Python collects depends on all that a process has done before."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        yield pool


def collections_while_objects_survive() -> list[int]:
    """The number of collections of each generation while 200,000 objects are made that stay alive."""
    before = gc.get_stats()
    kept = [[number] for number in range(200_000)]
    after = gc.get_stats()
    assert len(kept) == 200_000
    return [now["collections"] - then["collections"] for now, then in zip(after, before, strict=True)]


def in_a_replica(*calls: Callable[[], list[int] | None]) -> list[list[int] | None]:
    """Make calls in a process whose objects were frozen, as Serve freezes a replica's when it has started."""
    gc.freeze()
    gc.collect()  # nothing is left that counts as alive
    return [call() for call in calls]


def test_objects_that_survive_are_seldom_searched(fresh_process: ProcessPoolExecutor) -> None:
    calls = (collections_while_objects_survive, collect_old_seldom, collections_while_objects_survive)
    before, _, after = fresh_process.submit(in_a_replica, *calls).result()
    assert before is not None and after is not None
    young, middle, old = before
    assert young > 100 and middle > 10 and old > 0  # Python's own thresholds
    young, middle, old = after
    assert young > 100 and middle > 10 and old == 0


class Node:
    """An object that only the collector of cycles can free."""

    alive = 0

    def __init__(self) -> None:
        self.me = self
        Node.alive += 1

    def __del__(self) -> None:
        Node.alive -= 1


def alive_of_many_cycles() -> list[int]:
    for _ in range(50_000):
        Node()
    return [Node.alive]


def test_cycles_that_die_young_are_freed(fresh_process: ProcessPoolExecutor) -> None:
    _, alive = fresh_process.submit(in_a_replica, collect_old_seldom, alive_of_many_cycles).result()
    assert alive is not None and alive[0] < 5_000
