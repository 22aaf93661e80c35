"""SQL statements that are compiled once for all logs of a test run, instead of once for each log.

To compile the statements of a new log takes longer than most tests need for the rest.
"""

from typing import Any

_MOST = 2_000


class CompiledStatements(dict[Any, Any]):
    """SQLAlchemy's cache of compiled statements, without the difference between two engines of one kind of database."""

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(_of_any_engine(key), default)

    def __setitem__(self, key: Any, compiled: Any) -> None:
        if len(self) >= _MOST:
            self.clear()
        super().__setitem__(_of_any_engine(key), compiled)


def _of_any_engine(key: Any) -> Any:
    dialect, *statement = key
    return dialect.name, *statement
