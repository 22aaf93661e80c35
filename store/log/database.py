"""The log: one SQL database, SQLite or PostgreSQL, that holds the truth.

Guarantees:
- A transaction that `write()` left without an exception is on disk (SQLite: WAL with synchronous FULL unless set
  otherwise; PostgreSQL: its own commit) and visible to every reader that begins afterwards, in any process.
- One that raised, or whose process died, left no trace.
- `read()` sees one state of the log from its first statement to its last.
- Writers of a SQLite log take turns from their first statement on (BEGIN IMMEDIATE), so none of them ever works on a
  state that another has changed; on PostgreSQL the rows of the users they write are locked.

What may be lost: with synchronous NORMAL the newest commits at a power cut, and a `memory://` log when the machine
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
from typing import Any, Literal

from sqlalchemy import URL, Connection, Engine, create_engine, event, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import NullPool

from store.errors import OUTCOME_UNKNOWN, InvalidInput, LogDamaged, LogUnavailable, ModelMismatch, StoreError
from store.log import migrations
from store.log.schema import insert_ignore, memories, meta, models

Synchronous = Literal["FULL", "NORMAL"]
_DAMAGE = ("malformed", "not a database", "file is encrypted", "invalid page", "could not read block")
_SERVED = select(meta.c.value).where(meta.c.name == "model")
_MODEL = _SERVED.with_for_update(read=True)
_ADVICE = "Restore it, or see what is left: python -m store verify"
_SHARED_MEMORY = Path("/dev/shm")
# A server whose machine or network is gone says nothing: without these a call waits for as long as the system's TCP
# does, a quarter of an hour or two hours, and the store's one thread with it.
_NOTICE_A_LOST_SERVER = {
    "keepalives_idle": 10,  # seconds
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,  # milliseconds
}


class Log:
    """One database, its connections and its transactions. Not for several threads at once."""

    def __init__(self, engine: Engine, path: Path | None, scratch: Path | None, model: str) -> None:
        self.engine = engine
        self.path = path
        self.model = model
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
        """Open the log at `url`, create or migrate it where needed, and look it over.

        Args:
            url: `sqlite:///PATH`, `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`, `memory://` (a throw-away log of
                this process in memory) or `memory://NAME` (one that the processes of this machine share).
            lock_timeout_s: how long a write waits for another writer.
            quick_check_bytes: a SQLite file up to this size is checked whole before it is served.
            make: False where a log that is not there is a mistake in its URL.

        Raises:
            LogUnavailable: the database cannot be reached or opened, or holds no log and none is to be made.
            LogDamaged: the file is damaged.
            SchemaMismatch: it is no memory log, or a newer one.
        """
        scratch: Path | None = None
        if url.startswith("memory://"):
            scratch, url = _scratch_log(url.removeprefix("memory://"))
        try:
            parsed = make_url(url)
        except Exception as error:
            raise InvalidInput(f"The log's URL cannot be read: {error}", "url") from error
        if parsed.get_backend_name() == "sqlite":
            if not parsed.database:
                raise InvalidInput("A SQLite log needs a path: sqlite:///PATH; memory:// is a throw-away log.", "url")
            path = Path(parsed.database).absolute()
            if not make and not path.exists():
                raise LogUnavailable(f"There is no log at {path}.")
            engine = _sqlite_engine(path, synchronous, lock_timeout_s)
            log = cls(engine, path, scratch if scratch and scratch.name.endswith(".tmp") else None, "")
            _look_over(path, quick_check_bytes)
            _look_whose(path, make=make)
        elif parsed.get_backend_name() == "postgresql":
            engine = _postgresql_engine(parsed, lock_timeout_s)
            log = cls(engine, None, None, "")
        else:
            raise InvalidInput("The log's URL begins with sqlite:, postgresql: or memory:.", "url")
        try:
            with log.write() as connection:
                log._alone(connection)
                _check_there(connection, make=make)
                migrations.migrate(connection)
                log.log_id = connection.execute(select(meta.c.value).where(meta.c.name == "log_id")).scalar() or ""
                if not log.log_id:
                    log.log_id = uuid.uuid4().hex
                    connection.execute(meta.insert(), [{"name": "log_id", "value": log.log_id}])
        except BaseException:
            log.close()
            raise
        return log

    def serve_model(self, model: str, dim: int) -> None:
        """Declare that vectors of `model` are read and written from here on.

        Raises:
            ModelMismatch: the log's memories have vectors of another model, or of another dimension.
        """
        with self.write() as connection:
            self._alone(connection)
            found = {name: value for name, value in connection.execute(select(meta.c.name, meta.c.value))}
            if (found.get("model"), found.get("dim")) == (model, str(dim)):
                pass
            elif "model" not in found:
                served = {"model": model, "dim": str(dim)}
                connection.execute(meta.insert(), [{"name": name, "value": value} for name, value in served.items()])
            elif _stays_empty(connection):
                for name, value in (("model", model), ("dim", str(dim))):
                    connection.execute(meta.update().where(meta.c.name == name).values(value=value))
            else:
                raise ModelMismatch(
                    f"The log's vectors were made by {found['model']} ({found['dim']} dimensions), this server runs "
                    f"{model} ({dim}). To move the log to it: python -m store reembed --log LOG_URL --model {model} "
                    f"--url URL_OF_A_MEMSERVE_THAT_RUNS_IT",
                    code="model_mismatch",
                )
            self.model_id = model_id(connection, model)
        self.model = model

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A write transaction: committed when the block ends, undone when it raises.

        Raises:
            LogUnavailable: nothing was written, unless its code is `outcome_unknown`: the database was lost while it
                committed.
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
                    message = "The log was lost while it committed, and whether this was written is not known."
                    raise LogUnavailable(message, code=OUTCOME_UNKNOWN) from error

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction that sees one state of the log throughout."""
        with _translated(), self._snapshot.connect() as connection:
            connection.info["write"] = False
            with connection.begin():
                yield connection

    def current_model(self, connection: Connection) -> None:
        """Inside a write: keep the log from being switched to another model until the transaction ends.

        Raises:
            ModelMismatch: it was switched since this process opened it.
        """
        check_model(connection.execute(_MODEL).scalar(), self.model)

    def same_model(self, connection: Connection) -> None:
        """Inside a read: as `current_model`, without keeping anybody out."""
        check_model(connection.execute(_SERVED).scalar(), self.model)

    def _alone(self, connection: Connection) -> None:
        """Inside a write: one process at a time opens the log."""
        if self.path is None:
            connection.execute(text("SELECT pg_advisory_xact_lock(7305428194)"))

    def ping(self) -> None:
        """Raise LogUnavailable unless the log can be read now."""
        with self.read() as connection:
            connection.execute(select(meta.c.value).where(meta.c.name == "schema_version")).scalar()

    def truncate_wal(self) -> bool:
        """Move SQLite's write-ahead log into the database and empty it, so that no file holds erased text.

        False where another connection was in the way: try again. PostgreSQL keeps its own house.
        """
        if self.path is None:
            return True
        with _translated():
            raw = self.engine.raw_connection()
            try:
                cursor = raw.cursor()
                (patience,) = cursor.execute("PRAGMA busy_timeout").fetchone()
                cursor.execute("PRAGMA busy_timeout=100")  # readers are in the way for moments, or it can wait
                try:
                    busy, _, _ = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                finally:  # the connection goes back to where writes take theirs from
                    cursor.execute(f"PRAGMA busy_timeout={patience}")
            finally:
                raw.close()
        return not busy

    def vacuum(self) -> None:
        """Write the database's files anew, without what was removed (SQLite), or mark its space as free (PostgreSQL).

        Raises:
            LogUnavailable: another process is in the way.
        """
        with _translated():
            if self.path is None:
                with self.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
                    connection.execute(text("VACUUM"))
                return
            raw = self.engine.raw_connection()  # in no transaction, where SQLAlchemy would begin one
            try:
                raw.cursor().execute("VACUUM")
            finally:
                raw.close()

    def wal_bytes(self) -> int:
        """Size of SQLite's write-ahead log; 0 on PostgreSQL."""
        if self.path is None:
            return 0
        try:
            return os.stat(f"{self.path}-wal").st_size
        except FileNotFoundError:
            return 0

    def close(self) -> None:
        """Close every connection; a private `memory://` log is removed."""
        self.engine.dispose()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _stays_empty(connection: Connection) -> bool:
    """Whether there is no memory, and none can come until the transaction ends."""
    there = select(memories.c.label).where(memories.c.deleted == 0).limit(1)
    if connection.execute(there).first() is not None:
        return False
    connection.execute(_SERVED.with_for_update())  # waits for whoever writes, and what it wrote is there then
    return connection.execute(there).first() is None


def check_model(found: str | None, model: str) -> None:
    """Raise ModelMismatch where the log serves another model than this process."""
    if found != model:
        raise ModelMismatch(
            f"The log was switched to {found} while this server runs {model}: restart it with that model.",
            code="model_switched",
        )


def model_id(connection: Connection, name: str) -> int:
    """The number of a model in this log, which is given to it where it is new."""
    statement = select(models.c.model).where(models.c.name == name)
    found = connection.execute(statement).scalar()
    if found is None:
        insert_ignore(connection, models, [{"name": name}])
        found = connection.execute(statement).scalar_one()
    return int(found)


def discard(url: str) -> None:
    """Remove a shared `memory://NAME` log."""
    shutil.rmtree(_scratch_log(url.removeprefix("memory://"))[0], ignore_errors=True)


def _scratch_log(name: str) -> tuple[Path, str]:
    root = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    if name:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
            raise InvalidInput("The name of a memory:// log is made of letters, digits, '_', '.' and '-'.", "url")
        folder = root / f"memserve-{os.getuid()}-{name}"
        folder.mkdir(mode=0o700, exist_ok=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix="memserve-", suffix=".tmp", dir=root))
    return folder, f"sqlite:///{folder}/log.db"


def _check_there(connection: Connection, *, make: bool) -> None:
    """Raise LogUnavailable where there is no log and none is to be made, SchemaMismatch where none can be."""
    if migrations.version_of(connection) == 0 and not make:
        raise LogUnavailable("The database holds no log.")


def _sqlite_engine(path: Path, synchronous: Synchronous, lock_timeout_s: float) -> Engine:
    if synchronous not in ("FULL", "NORMAL"):
        raise InvalidInput("synchronous is FULL or NORMAL.", "synchronous")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LogUnavailable(f"The folder of the log cannot be made: {error}") from error
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": lock_timeout_s, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        connection.create_function("unicode_lower", 1, _lower, deterministic=True)
        connection.isolation_level = None  # transactions begin where we say so, not where the driver guesses
        _enter_wal_mode(connection, lock_timeout_s)
        for pragma in (
            f"synchronous={synchronous}",
            "secure_delete=ON",  # erased bytes are overwritten, not only forgotten
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
    """The one change that SQLite does not wait for a lock to make: several processes may open a fresh log at once."""
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
        "idle_in_transaction_session_timeout": round(lock_timeout_s * 2000),  # a stopped process lets go of its locks
        "timezone": "UTC",
    }
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=2,
        connect_args={
            "connect_timeout": max(1, round(lock_timeout_s)),
            **_NOTICE_A_LOST_SERVER,
            "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
        },
    )

    @event.listens_for(engine, "after_cursor_execute")
    def _arm_timeout(connection: Connection, *arguments: Any) -> None:
        if arguments[-1]:  # PostgreSQL (15) forgets the timeout after a pipeline, which is how psycopg runs many
            connection.connection.cursor().execute("SELECT 1")

    return engine


def _lower(value: Any) -> str | None:
    return value.lower() if isinstance(value, str) else None


def _look_over(path: Path, quick_check_bytes: int) -> None:
    """Notice a damaged SQLite file before it is served: the whole of a small one, the frame of a large one."""
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


def _look_whose(path: Path, *, make: bool) -> None:
    """Notice another program's SQLite file before anything is changed in it, as its journal mode would be."""
    if not path.exists() or path.stat().st_size == 0:
        return
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
    with _translated(), engine.connect() as connection:
        _check_there(connection, make=make)


@contextmanager
def _translated() -> Iterator[None]:
    """The one boundary where the driver's exceptions become the store's."""
    try:
        yield
    except StoreError:
        raise
    except DBAPIError as error:
        raise _from_driver(error.orig or error, error) from error
    except UnicodeDecodeError as error:
        raise LogDamaged(f"The log is damaged: a text is not UTF-8. {_ADVICE}") from error
    except PoolTimeout as error:
        raise LogUnavailable("No connection to the log is free.") from error
    except sqlite3.Error as error:
        raise _from_driver(error, error) from error


def _from_driver(original: BaseException, error: Exception) -> StoreError:
    message = str(original).strip().splitlines()[0] if str(original).strip() else type(original).__name__
    if any(sign in message.lower() for sign in _DAMAGE):
        return LogDamaged(f"The log is damaged: {message}. {_ADVICE}")
    # SQLite calls a mistake in a statement operational too: that is 1, SQLITE_ERROR
    mistake = getattr(original, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_ERROR
    lost = getattr(error, "connection_invalidated", False)
    if lost or (isinstance(error, OperationalError | sqlite3.OperationalError) and not mistake):
        return LogUnavailable(f"The log cannot be used at the moment: {message}", code="log_unavailable")
    return StoreError(f"The log refused a statement: {message}")
