"""An application in this process, for the tests of the gateway and its routes; and what makes the tests fast."""

import gc
import logging
import os
import shutil

# Each of the two processes of `make unit` has one core: with more threads than that they would wait for each other.
# Read when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests import repetitions

if TYPE_CHECKING:
    from tests.local_app import LocalApp

MEMORY = Path("/dev/shm")


def pytest_configure(config: pytest.Config) -> None:
    repetitions.choose(quick="not slow" in config.option.markexpr)
    # The logs of the tests need not survive the machine. In memory no commit waits for a disk.
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 << 30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # the tests run in other processes; the imports below would take seconds in this one
    from hypothesis import settings

    from store.log import database
    from tests.compiled import CompiledStatements

    # Tests must not fail because the machine is busy.
    settings.register_profile("memserve", deadline=None, max_examples=repetitions.repetitions(100, quick=50))
    settings.load_profile("memserve")
    compiled = {"compiled_cache": CompiledStatements()}
    database.create_engine = partial(database.create_engine, execution_options=compiled)
    gc.disable()  # imports make objects that stay: looking for garbage among them is a sixth of the time to collect


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """Take away what replicas that a test starts in this process add to the logger `memserve`."""
    memserve = logging.getLogger("memserve")
    handlers, level = list(memserve.handlers), memserve.level
    yield
    memserve.handlers[:] = handlers
    memserve.setLevel(level)


@pytest.fixture
async def app(tmp_path: Path) -> "AsyncIterator[LocalApp]":
    from tests.local_app import LocalApp

    app = await LocalApp.start(tmp_path)
    yield app
    await app.stop()


@pytest.fixture
def api(app: "LocalApp") -> httpx.AsyncClient:
    return app.http
