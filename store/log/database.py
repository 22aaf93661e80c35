"""The log: one SQL database, SQLite or PostgreSQL, that holds all durable data.

Guarantees:
- If a `write()` block ends without an exception, its transaction is on disk (SQLite: WAL with synchronous FULL unless
  set otherwise; PostgreSQL: as the server commits) and visible to every reader that begins afterwards, in any process.
- A transaction that raised, or whose process died, leaves no trace.
- `read()` sees one state of the log from its first statement to its last.
- Writers of a SQLite log run one after another, from their first statement on (BEGIN IMMEDIATE), so no writer works on
  a state that another has changed since. On PostgreSQL they lock the rows of the users that they write.

What may be lost: the newest commits in a power cut if synchronous is NORMAL, and a `memory://` log when the machine
restarts.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sqlalchemy import URL, Connection, Engine, create_engine, event, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import NullPool

from store.errors import OUTCOME_UNKNOWN, InvalidInput, LogDamaged, LogUnavailable, ModelMismatch, StoreError
from store.log import migrations
from store.log.schema import insert_ignore, memories, meta, models

Synchronous = Literal["FULL", "NORMAL"]
_SIGNS_OF_DAMAGE = ("malformed", "not a database", "file is encrypted", "invalid page", "could not read block")
_SERVED_MODEL = select(meta.c.value).where(meta.c.name == "model")
_LOCKED_MODEL = _SERVED_MODEL.with_for_update(read=True)
_ADVICE = "Restore it from a backup, or see what is left of it: memserve log verify"
_PAGES = ("page_count", "freelist_count", "page_size", "auto_vacuum")
_INCREMENTAL = 2
_SHARED_MEMORY = Path("/dev/shm")
_OPENING_LOCK = 7305428194  # an arbitrary number that no other program should use
# A server whose machine or network is gone sends nothing. Without these settings a call, and with it the store's only
# thread, would wait for the operating system's TCP timeouts: a quarter of an hour, or two hours.
_NOTICE_A_LOST_SERVER = {
    "keepalives_idle": 10,  # seconds
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,  # milliseconds
}


class Pages(NamedTuple):
    """The number of pages of a SQLite file, how many of them are free, the bytes of each, and its `auto_vacuum`."""

    total: int
    free: int
    size: int
    auto_vacuum: int

    @property
    def can_be_cut(self) -> bool:
        """Whether `cut_free_pages` works. Logs that memserve 0.1 made lack the pages that it needs."""
        return self.auto_vacuum == _INCREMENTAL


class Log:
    """One database, its connections and its transactions. Must not be used by several threads at once."""

    def __init__(self, engine: Engine, path: Path | None, scratch: Path | None) -> None:
        self.engine = engine
        self.path = path  # None on PostgreSQL
        self.model = ""
        self.model_id = 0
        self.log_id = ""
        self._scratch = scratch
        self._snapshot = engine.execution_options(isolation_level="REPEATABLE READ") if path is None else engine

    @classmethod
    def open(
        cls,
        url: str,
        *,
        synchronous: Synchronous = "FULL",
        lock_timeout_s: float = 5.0,
        quick_check_bytes: int = 64 << 20,
        make: bool = True,
    ) -> Log:
        """Open the log at `url`. It is created if there is none, migrated if it is older, and checked for damage.

        Args:
            url: `sqlite:///PATH`, `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`, `memory://` (a temporary log of
                this process in memory) or `memory://NAME` (a temporary log that the processes of this machine share).
            lock_timeout_s: how long a write waits for another writer.
            quick_check_bytes: the whole of a SQLite file up to this size is checked before it is used.
            make: False if a missing log is an error in the URL, instead of a log to create.

        Raises:
            InvalidInput: the URL or `synchronous` cannot be used.
            LogUnavailable: the database cannot be reached or opened, or holds no log and `make` is false.
            LogDamaged: the file is damaged.
            SchemaMismatch: the database belongs to another program, or to a newer version of this one.
        """
        location = _locate(url)
        path = location.path
        if path is None:
            engine = _postgresql_engine(location.url, lock_timeout_s)
        else:
            if not make and not path.exists():
                raise LogUnavailable(f"There is no log at {path}.")
            engine = _sqlite_engine(path, synchronous, lock_timeout_s)
            check_file(path, quick_check_bytes)
            refuse_foreign_file(path, make=make)
        log = cls(engine, path, location.scratch)
        try:
            log._prepare(make=make)
        except BaseException:
            log.close()
            raise
        return log

    def _prepare(self, *, make: bool) -> None:
        """Create or migrate the log, and read its id."""
        with self.write() as connection:
            self._lock_opening(connection)
            _require_log(connection, make=make)
            migrations.migrate(connection)
            self.log_id = connection.execute(select(meta.c.value).where(meta.c.name == "log_id")).scalar() or ""
            if not self.log_id:
                self.log_id = uuid.uuid4().hex
                connection.execute(meta.insert(), [{"name": "log_id", "value": self.log_id}])

    def serve_model(self, model: str, dim: int) -> None:
        """Declare that vectors of `model` are read and written from now on.

        Raises:
            ModelMismatch: the log's memories have vectors of another model or another dimension.
        """
        with self.write() as connection:
            self._lock_opening(connection)
            found = {name: value for name, value in connection.execute(select(meta.c.name, meta.c.value))}
            declared = {"model": model, "dim": str(dim)}
            if "model" not in found:
                connection.execute(meta.insert(), [{"name": name, "value": value} for name, value in declared.items()])
            elif any(found.get(name) != value for name, value in declared.items()):
                if not _stays_empty(connection):
                    raise ModelMismatch(
                        f"The log's vectors were made by {found['model']} ({found['dim']} dimensions), but this server "
                        f"runs {model} ({dim}). To move the log to it: memserve log reembed --log LOG_URL "
                        f"--model {model} --url URL_OF_A_MEMSERVE_THAT_RUNS_IT",
                        code="model_mismatch",
                    )
                for name, value in declared.items():
                    connection.execute(meta.update().where(meta.c.name == name).values(value=value))
            self.model_id = model_id(connection, model)
        self.model = model

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A write transaction: committed when the block ends, rolled back if it raises.

        Raises:
            LogUnavailable: nothing was written, unless the code is `outcome_unknown`, which means that the connection
                was lost during the commit.
        """
        with _translated(), self.engine.connect() as connection:
            connection.info["write"] = True
            with connection.begin() as transaction:
                yield connection
                try:
                    transaction.commit()
                except DBAPIError as error:
                    if not error.connection_invalidated:
                        raise
                    message = "The connection to the log was lost during the commit: the write may have been made."
                    raise LogUnavailable(message, code=OUTCOME_UNKNOWN) from error

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction that sees one state of the log throughout."""
        with _translated(), self._snapshot.connect() as connection:
            connection.info["write"] = False
            with connection.begin():
                yield connection

    def lock_model(self, connection: Connection) -> None:
        """Inside a write: require that the log serves this process's model until the transaction ends.

        Raises:
            ModelMismatch: the log was switched to another model since this process opened it.
        """
        check_model(connection.execute(_LOCKED_MODEL).scalar(), self.model)

    def require_model(self, connection: Connection) -> None:
        """Inside a read: require that the log serves this process's model.

        Raises:
            ModelMismatch: as `lock_model`.
        """
        check_model(connection.execute(_SERVED_MODEL).scalar(), self.model)

    def _lock_opening(self, connection: Connection) -> None:
        """Inside a write: let one process at a time open the log. On SQLite every write transaction does so."""
        if self.path is None:
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_OPENING_LOCK})"))

    def ping(self) -> None:
        """Raise LogUnavailable unless the log can be read now."""
        with self.read() as connection:
            connection.execute(select(meta.c.value).where(meta.c.name == "schema_version")).scalar()

    def truncate_wal(self) -> bool:
        """Move SQLite's write-ahead log into the database and empty it, so that no file holds erased text.

        Returns False if another connection prevented it: try again later. On PostgreSQL there is nothing to do.
        """
        if self.path is None:
            return True
        with _translated():
            raw = self.engine.raw_connection()
            try:
                cursor = raw.cursor()
                (timeout_ms,) = cursor.execute("PRAGMA busy_timeout").fetchone()
                cursor.execute("PRAGMA busy_timeout=100")  # most readers finish sooner; else it is tried later
                try:
                    busy, _, _ = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                finally:  # the connection returns to the pool, and a write may use it next
                    cursor.execute(f"PRAGMA busy_timeout={timeout_ms}")
            finally:
                raw.close()
        return not busy

    def vacuum(self) -> None:
        """Rewrite the file without removed rows (SQLite), or mark their space as free (PostgreSQL).

        Raises:
            LogUnavailable: another process holds a lock.
        """
        with _translated():
            if self.path is None:
                with self.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
                    connection.execute(text("VACUUM"))
                return
            raw = self.engine.raw_connection()  # VACUUM must be outside a transaction, and SQLAlchemy would begin one
            try:
                raw.cursor().execute("PRAGMA auto_vacuum=INCREMENTAL").execute("VACUUM")
            finally:
                raw.close()

    def pages(self) -> Pages:
        """The pages of a SQLite file."""
        with self.read() as connection:
            numbers = [connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in _PAGES]
        return Pages(*numbers)

    def cut_free_pages(self, count: int) -> None:
        """Move pages from the end of a SQLite file into free ones, and make it at most `count` pages shorter.

        The space returns to the system when the write-ahead log is emptied.

        Raises:
            LogUnavailable: another process holds a lock.
        """
        with _translated():
            raw = self.engine.raw_connection()
            try:  # the driver's `execute` would stop after the first page
                raw.cursor().executescript(f"PRAGMA incremental_vacuum({count})")
            finally:
                raw.close()

    def wal_bytes(self) -> int:
        """The size of SQLite's write-ahead log; 0 on PostgreSQL."""
        if self.path is None:
            return 0
        try:
            return os.stat(f"{self.path}-wal").st_size
        except FileNotFoundError:
            return 0

    def close(self) -> None:
        """Close all connections, and remove a `memory://` log without a name."""
        self.engine.dispose()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _stays_empty(connection: Connection) -> bool:
    """Whether there is no memory, and none can be added until the transaction ends."""
    any_memory = select(memories.c.label).where(memories.c.deleted == 0).limit(1)
    if connection.execute(any_memory).first() is not None:
        return False
    connection.execute(_SERVED_MODEL.with_for_update())  # waits for transactions that are writing memories
    return connection.execute(any_memory).first() is None


def check_model(found: str | None, model: str) -> None:
    """Raise ModelMismatch unless the log serves the model of this process."""
    if found != model:
        raise ModelMismatch(
            f"The log was switched to {found}, but this server runs {model}: restart it with the new model.",
            code="model_switched",
        )


def model_id(connection: Connection, name: str) -> int:
    """The number of a model in this log. A new model gets one."""
    statement = select(models.c.model).where(models.c.name == name)
    found = connection.execute(statement).scalar()
    if found is None:
        insert_ignore(connection, models, [{"name": name}])
        found = connection.execute(statement).scalar_one()
    return int(found)


def discard(url: str) -> None:
    """Remove a shared `memory://NAME` log."""
    shutil.rmtree(_memory_folder(url.removeprefix("memory://")), ignore_errors=True)


class _Location(NamedTuple):
    """The database of a log: a SQLite file, or a PostgreSQL URL if `path` is None. `scratch` is removed on closing."""

    url: URL
    path: Path | None
    scratch: Path | None


def _locate(url: str) -> _Location:
    """The database that a log's URL names. A folder is created for a `memory://` log.

    Raises:
        InvalidInput: the URL cannot be used.
    """
    scratch: Path | None = None
    if url.startswith("memory://"):
        name = url.removeprefix("memory://")
        folder = _memory_folder(name)
        scratch, url = None if name else folder, f"sqlite:///{folder}/log.db"
    try:
        parsed = make_url(url)
    except Exception as error:
        raise InvalidInput(f"cannot be parsed: {error}", "url") from error
    match parsed.get_backend_name():
        case "postgresql":
            return _Location(parsed, None, None)
        case "sqlite" if parsed.database:
            return _Location(parsed, Path(parsed.database).absolute(), scratch)
        case "sqlite":
            raise InvalidInput("must have a path: sqlite:///PATH (a temporary log is memory://)", "url")
    raise InvalidInput("must begin with sqlite:, postgresql: or memory:", "url")


def _memory_folder(name: str) -> Path:
    """The folder of the shared log `memory://NAME`, or a new one if the name is empty."""
    root = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    if not name:
        return Path(tempfile.mkdtemp(prefix="memserve-", suffix=".tmp", dir=root))
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
        raise InvalidInput("must name a memory:// log with 1 to 64 letters, digits, '_', '.' or '-'", "url")
    folder = root / f"memserve-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _require_log(connection: Connection, *, make: bool) -> None:
    """Raise SchemaMismatch if the database is another program's, LogUnavailable if it has no log and must have one."""
    if migrations.version_of(connection) == 0 and not make:
        raise LogUnavailable("The database holds no log.")


def _sqlite_engine(path: Path, synchronous: Synchronous, lock_timeout_s: float) -> Engine:
    if synchronous not in ("FULL", "NORMAL"):
        raise InvalidInput("must be FULL or NORMAL", "synchronous")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LogUnavailable(f"The folder of the log cannot be created: {error}") from error
    engine = create_engine(
        f"sqlite:///{path}",
        connect_args={"timeout": lock_timeout_s, "check_same_thread": False},
        hide_parameters=True,  # of statements, in errors: they are texts
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        connection.create_function("unicode_lower", 1, _lower, deterministic=True)
        connection.isolation_level = None  # the driver begins no transactions: `_begin` does
        if not path.exists() or path.stat().st_size == 0:
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL").close()  # so that `cut_free_pages` works
        _enter_wal_mode(connection, lock_timeout_s)
        for pragma in (
            f"synchronous={synchronous}",
            "secure_delete=ON",  # the bytes of removed rows are overwritten
            "cell_size_check=ON",
            "cache_size=-16384",
            "journal_size_limit=67108864",
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.info.get("write") else "BEGIN")

    return engine


def _enter_wal_mode(connection: sqlite3.Connection, lock_timeout_s: float) -> None:
    """Switch the file to WAL. SQLite does not wait for locks here, and several processes may open a new log at once."""
    deadline = time.monotonic() + lock_timeout_s
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode=WAL").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def _postgresql_engine(url: URL, lock_timeout_s: float) -> Engine:
    settings = {
        "lock_timeout": round(lock_timeout_s * 1000),
        "idle_in_transaction_session_timeout": round(lock_timeout_s * 2000),  # a stopped process loses its locks
        "timezone": "UTC",
    }
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=2,
        hide_parameters=True,
        connect_args={
            "connect_timeout": max(1, round(lock_timeout_s)),
            **_NOTICE_A_LOST_SERVER,
            "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
        },
    )

    @event.listens_for(engine, "after_cursor_execute")
    def _arm_timeout(connection: Connection, *arguments: Any) -> None:
        # psycopg runs one statement for many rows as a pipeline, after which PostgreSQL 15 forgets the timeout.
        if arguments[-1]:
            connection.connection.cursor().execute("SELECT 1")

    return engine


def _lower(value: Any) -> str | None:
    return value.lower() if isinstance(value, str) else None


def check_file(path: Path, quick_check_bytes: int) -> None:
    """Raise LogDamaged if a SQLite file is damaged. Of a file above `quick_check_bytes` only the header is read."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return
    if size == 0:
        return
    try:
        connection = sqlite3.connect(path, timeout=5)
        try:
            check = "quick_check" if size <= quick_check_bytes else "schema_version"
            answer = connection.execute(f"PRAGMA {check}").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise _from_driver(error, error) from error
    except UnicodeDecodeError as error:
        raise LogDamaged(f"The log {path} is damaged: its schema is not UTF-8. {_ADVICE}") from error
    if check == "quick_check" and answer != "ok":
        raise LogDamaged(f"The log {path} is damaged: {answer}. {_ADVICE}")


def refuse_foreign_file(path: Path, *, make: bool) -> None:
    """Raise as `_require_log` does, before opening the file for the log changes its journal mode."""
    if not path.exists() or path.stat().st_size == 0:
        return
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool, hide_parameters=True)
    with _translated(), engine.connect() as connection:
        _require_log(connection, make=make)


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the driver's exceptions into the store's. This is the only place that does."""
    try:
        yield
    except StoreError:
        raise
    except DBAPIError as error:
        raise _from_driver(error.orig or error, error) from error
    except UnicodeDecodeError as error:
        raise LogDamaged(f"The log is damaged: a text is not UTF-8. {_ADVICE}") from error
    except PoolTimeout as error:
        raise LogUnavailable("All connections to the log are in use.") from error
    except sqlite3.Error as error:
        raise _from_driver(error, error) from error


def _from_driver(original: BaseException, error: Exception) -> StoreError:
    message = str(original).strip().splitlines()[0] if str(original).strip() else type(original).__name__
    if any(sign in message.lower() for sign in _SIGNS_OF_DAMAGE):
        return LogDamaged(f"The log is damaged: {message}. {_ADVICE}")
    # SQLite's driver raises OperationalError for an invalid statement (SQLITE_ERROR) as well.
    wrong_statement = getattr(original, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_ERROR
    lost = getattr(error, "connection_invalidated", False)
    if lost or (isinstance(error, OperationalError | sqlite3.OperationalError) and not wrong_statement):
        return LogUnavailable(f"The log is not available at the moment: {message}", code="log_unavailable")
    return StoreError(f"The log refused a statement: {message}")
