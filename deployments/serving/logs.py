"""The logger `memserve`: what the code of this project logs reaches the log files of Serve's replicas.

In a replica only the logger `ray.serve` has handlers. `attach` sends the records of `memserve`, and of the loggers
below it, to the same handlers, and flushes them. In throughput-optimized mode Serve buffers up to 1,000 records, so
that a warning would reach the file late, or never if the replica is killed. Code that must not know Ray needs
`logging.getLogger("memserve.embedding")` alone. Whatever the level, no line holds a text, a query, a value of metadata,
a vector or a secret; ids may occur. Outside a replica, for instance in tests, these are ordinary loggers.
"""

import logging

_SERVE = logging.getLogger("ray.serve")
_MEMSERVE = logging.getLogger("memserve")


class _ToServe(logging.Handler):
    """Hands each record to the handlers that `ray.serve` has at that moment: Serve replaces them when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.obeys_serve = True  # whether the level of `ray.serve` decides, which Serve's logging_config sets

    def emit(self, record: logging.LogRecord) -> None:
        if not self.obeys_serve or _SERVE.isEnabledFor(record.levelno):
            _SERVE.handle(record)
            for handler in _SERVE.handlers:
                handler.flush()


_handler = _ToServe()
_TELLTALES = ("sqlalchemy", "httpx", "httpcore")
"""Loggers of packages that log rows, URLs or headers at DEBUG or INFO."""


def attach(level: str | None) -> None:
    """Send the records of `memserve` to Serve's log files. Each replica calls this first; a second call adds nothing.

    Args:
        level: of the setting `log_level`, see `set_level`.
    """
    if _handler not in _MEMSERVE.handlers:
        _MEMSERVE.addHandler(_handler)
    for name in _TELLTALES:
        logging.getLogger(name).setLevel(logging.WARNING)
    set_level(level)


def set_level(level: str | None) -> None:
    """Log records of this level and above; None follows the level of Serve's `logging_config`, also when it changes."""
    _handler.obeys_serve = level is None
    _MEMSERVE.setLevel(level or logging.DEBUG)
