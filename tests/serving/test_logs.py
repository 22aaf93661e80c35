"""Records of `memserve` reach the handlers of Serve's logger, at the requested level."""

import logging
import logging.handlers
from collections.abc import Iterator

import pytest

from deployments.serving import logs

SERVE = logging.getLogger("ray.serve")


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.name} {record.levelname} {record.getMessage()}")


@pytest.fixture
def serve_file() -> Iterator[Kept]:
    """The handler of a replica's log file, as Serve adds it to its own logger."""
    kept, memserve = Kept(), logging.getLogger("memserve")
    before = SERVE.handlers, SERVE.level, SERVE.propagate, memserve.handlers, memserve.level
    SERVE.handlers, SERVE.propagate, memserve.handlers = [kept], False, []
    SERVE.setLevel("WARNING")
    yield kept
    SERVE.handlers, _, SERVE.propagate, memserve.handlers, _ = before
    SERVE.setLevel(before[1])
    memserve.setLevel(before[4])


def log_at_each_level() -> None:
    logger = logging.getLogger("memserve.embedding")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logger.log(level, "said")


def test_a_record_reaches_serves_file_once(serve_file: Kept) -> None:
    logging.getLogger("memserve.store").error("before")
    assert serve_file.messages == []
    logs.attach("INFO")
    logs.attach("INFO")
    log_at_each_level()
    assert serve_file.messages == [f"memserve.embedding {level} said" for level in ("INFO", "WARNING", "ERROR")]


def test_without_a_level_serves_own_decides_whenever_it_changes(serve_file: Kept) -> None:
    logs.attach(None)
    log_at_each_level()
    assert serve_file.messages == [f"memserve.embedding {level} said" for level in ("WARNING", "ERROR")]
    SERVE.setLevel("ERROR")
    log_at_each_level()
    assert serve_file.messages[2:] == ["memserve.embedding ERROR said"]
    logs.set_level("ERROR")
    SERVE.setLevel("DEBUG")
    log_at_each_level()
    assert serve_file.messages[3:] == ["memserve.embedding ERROR said"]


def test_handlers_that_serve_replaces_are_replaced_here(serve_file: Kept) -> None:
    logs.attach("INFO")
    SERVE.handlers = [other := Kept()]
    logging.getLogger("memserve").info("said")
    assert (serve_file.messages, other.messages) == ([], ["memserve INFO said"])


def test_a_record_is_not_left_in_serves_buffer(serve_file: Kept) -> None:
    SERVE.handlers = [logging.handlers.MemoryHandler(1000, target=serve_file)]
    logs.attach("INFO")
    logging.getLogger("memserve").info("said")
    assert serve_file.messages == ["memserve INFO said"]
