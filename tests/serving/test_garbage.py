"""Python does not look through a growing heap again and again."""

import gc
from collections.abc import Iterator

import pytest

from deployments.serving.garbage import collect_old_seldom

PYTHONS_OWN = (700, 10, 10)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*PYTHONS_OWN)  # whatever a gateway of another test has left in this process
    gc.freeze()  # as Serve does when a replica has started
    gc.collect()  # so that what stays alive is a part of what was there: nothing
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def collections_while_objects_stay() -> list[int]:
    """Of each generation."""
    before = gc.get_stats()
    kept = [[number] for number in range(200_000)]
    after = gc.get_stats()
    assert len(kept) == 200_000
    return [now["collections"] - then["collections"] for now, then in zip(after, before, strict=True)]


def test_objects_that_stay_are_seldom_looked_through() -> None:
    young, middle, old = collections_while_objects_stay()
    assert young > 100 and middle > 10 and old > 0  # as Python has it
    collect_old_seldom()
    young, middle, old = collections_while_objects_stay()
    assert young > 100 and middle > 10 and old == 0


def test_cycles_that_die_young_are_freed() -> None:
    collect_old_seldom()

    class Node:
        alive = 0

        def __init__(self) -> None:
            self.me = self
            Node.alive += 1

        def __del__(self) -> None:
            Node.alive -= 1

    for _ in range(50_000):
        Node()
    assert Node.alive < 5_000
