"""Background work: the log and the indexes take turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from store import Append, IndexOptions, NewMemory, Search, Store
from tests.store.conftest import DIM, Clock

T = "default"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/log.db"


def test_a_graph_is_built_while_there_is_always_something_to_remove_from_the_log(
    open_store: Callable[..., Store], clock: Clock, rng: np.random.Generator
) -> None:
    store = open_store(index=IndexOptions(switch=50), snapshot_dir=None)
    vectors = rng.normal(size=(60, DIM)).astype(np.float32)
    store.append([Append(T, "ann", tuple(NewMemory(str(n), "x", v) for n, v in enumerate(vectors)), issued_at=clock())])
    store.search([Search(T, "ann", vectors[0], 1)])
    for _ in range(20):
        clock.advance(1.1)  # by now another search for expired memories is due, and one for free space
        store.background_step()
    assert store.user(T, "ann").index == "hnsw"
