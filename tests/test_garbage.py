"""Python does not look through a growing heap again and again."""

import gc
from collections.abc import Iterator

import pytest

from deployments.garbage import collect_old_seldom


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = gc.get_threshold()
    gc.freeze()  # as Serve does when a replica has started
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def collections() -> list[int]:
    return [generation["collections"] for generation in gc.get_stats()]


def test_objects_that_stay_are_seldom_looked_through() -> None:
    collect_old_seldom()
    before = collections()
    kept = [[number] for number in range(200_000)]
    young, middle, old = (after - then for after, then in zip(collections(), before, strict=True))
    assert old == 0
    assert young > 100 and middle > 10
    del kept


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
