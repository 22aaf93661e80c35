"""The subcommands of `memserve` that embed texts and use memories, of a server or of a folder.

They print tables for people, and one JSON object a line with `--json`. What they need is imported when they run.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from memserve.failures import Failed, needs_server

if TYPE_CHECKING:
    from memserve.client import Client

FORMATS = {".ndjson": "ndjson", ".jsonl": "ndjson", ".npy": "npy", ".parquet": "parquet"}
_TEXTS = 16_384  # that are embedded and written at a time
_WIDTH = 160  # of tables that are not printed to a terminal

URL = click.option("--url", envvar="MEMSERVE_URL", show_envvar=True, help="The server. Default: http://127.0.0.1:8000.")
API_KEY = click.option("--api-key", envvar="MEMSERVE_API_KEY", show_envvar=True, help="Its key, if it asks for keys.")
USER = click.option("-u", "--user", required=True, help="The user's id.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
FILE = click.argument("file", default="-", type=click.Path(dir_okay=False, allow_dash=True))


Columns = dict[str, Callable[[Any], str]]
Pieces = Iterable[tuple[list[str], Any]]  # texts, and their vectors


class _Json(click.ParamType):
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The object. Reports a wrong value as click does."""
        try:
            found = json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is not JSON: {error}.", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{value!r} is not a JSON object.", param, ctx)
        return found


def with_client(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command its client, as the first argument, and the options that say of what."""

    @URL
    @API_KEY
    @click.option("--local", metavar="FOLDER", help="Use the memories in FOLDER, or `memory://`, without a server.")
    @wraps(command)
    def connected(url: str | None, api_key: str | None, local: str | None, **options: Any) -> None:
        with _client(url, api_key, local) as client:
            command(client, **options)

    return connected


@contextmanager
def _client(url: str | None, api_key: str | None, local: str | None) -> Iterator[Client]:
    """A client. Its errors, and those of files, are reported in one line."""
    from memserve.client import Client

    with _reported(), Client.local(local) if local is not None else Client(url, api_key) as client:
        yield client


@contextmanager
def _reported() -> Iterator[None]:
    """A context for the work of a command: reports the errors of a client, or of a file, in one line."""
    from memserve.errors import MemserveError, NotReached

    try:
        yield
    except ModuleNotFoundError as error:
        raise needs_server(error) from error
    except NotReached as error:
        raise Failed(f"{error} Start a server with `memserve serve`, or name one with --url.") from error
    except (MemserveError, OSError, ValueError) as error:
        raise Failed(str(error)) from error


def show(rows: Iterable[Any], columns: Columns, *, as_json: bool) -> None:
    """Print results.

    Args:
        rows: results of the client.
        columns: how each column of the table is made of a row.
    """
    if as_json:
        for row in rows:
            click.echo(json.dumps(row.model_dump(mode="json", exclude={"vector"}, exclude_defaults=True)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=name != "text")
    for row in rows:
        table.add_row(*(Text(of(row)) for of in columns.values()))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    console.print(table)


def _stdin() -> IO[Any]:
    return click.open_file("-", encoding="utf-8")


@click.command()
@click.argument("files", nargs=-1, type=click.File("r", encoding="utf-8"))
@click.option("-o", "--output", default="-", type=click.Path(dir_okay=False, allow_dash=True), help="Default: stdout.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["ndjson", "npy", "parquet"]),
    help="Default: as the name of the output ends, else ndjson.",
)
@click.option("--input-type", type=click.Choice(["query", "document"]), help="What the texts are.")
@click.option("--dimensions", type=click.IntRange(min=1), help="Keep so many dimensions.")
@with_client
def embed(client: Client, files: Sequence[Any], output: str, form: str | None, **options: Any) -> None:
    """Embed the lines of FILES, or of standard input.

    Each line that is not empty is a text. `ndjson` has a text and its embedding on each line; `parquet` has the same as
    columns, and needs the package pyarrow; `npy` is the array of shape (n, dim) alone.

    \b
    Examples:
      memserve embed texts.txt -o vectors.npy
      echo "a cup of tea" | memserve embed --dimensions 4
      memserve embed --local ./memories *.txt -o texts.parquet
    """
    form = form or FORMATS.get(Path(output).suffix, "ndjson")
    lines = (line.rstrip("\r\n") for file in files or [_stdin()] for line in file)
    texts = (line for line in lines if line.strip())

    def pieces() -> Iterator[tuple[list[str], Any]]:
        while piece := [*itertools.islice(texts, _TEXTS)]:
            yield piece, client.embed(piece, **options)

    with click.open_file(output, "wb") as file:
        _WRITERS[form](file, pieces())


def _write_ndjson(file: Any, pieces: Pieces) -> None:
    for texts, vectors in pieces:
        for text, vector in zip(texts, vectors.tolist(), strict=True):
            file.write(json.dumps({"text": text, "embedding": vector}, ensure_ascii=False).encode() + b"\n")


def _write_npy(file: Any, pieces: Pieces) -> None:
    import numpy as np

    found = [vectors for _, vectors in pieces]
    np.save(file, np.concatenate(found) if found else np.empty((0, 0), np.float32))


def _write_parquet(file: Any, pieces: Pieces) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise Failed('pyarrow is not installed; parquet needs it: pip install "memserve[parquet]"') from error
    writer = None
    for texts, vectors in pieces:
        dim = vectors.shape[1]
        embeddings = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), dim)
        table = pyarrow.table({"text": pyarrow.array(texts), "embedding": embeddings})
        writer = writer or parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


_WRITERS = {
    "ndjson": _write_ndjson,
    "npy": _write_npy,
    "parquet": _write_parquet,
}


@click.command()
@USER
@click.argument("texts", nargs=-1)
@click.option("--metadata", type=_Json(), help="Metadata of each memory, as a JSON object.")
@click.option("--thread", help="The conversation that the memories are a part of.")
@click.option("--skip-duplicates", is_flag=True, help="Add no memory whose text and metadata the user already has.")
@AS_JSON
@with_client
def add(client: Client, user: str, texts: Sequence[str], skip_duplicates: bool, as_json: bool, **fields: Any) -> None:
    """Add TEXTS to the memories of a user, or each line of standard input.

    \b
    Examples:
      memserve add -u anna "Anna plays the cello." "Her train leaves at six."
      memserve add -u anna --metadata '{"source": "notes"}' < notes.txt
    """
    lines = texts or [line.rstrip("\r\n") for line in _stdin() if line.strip()]
    given = {name: value for name, value in fields.items() if value is not None}
    on_duplicate = "skip" if skip_duplicates else None
    added = client.add(user, [{"text": text, **given} for text in lines], on_duplicate=on_duplicate)  # type: ignore[arg-type]
    show(added, {"id": lambda one: one.id, "status": lambda one: one.status}, as_json=as_json)


@click.command()
@USER
@click.argument("query")
@click.option("-k", "--top-k", type=click.IntRange(1, 1_000), help="How many are wanted. Default: 10.")
@click.option("--mode", type=click.Choice(["hybrid", "vector", "words"]), help="Default: hybrid.")
@click.option("--filter", type=_Json(), help="Only memories that match this filter, a JSON object.")
@click.option("--min-score", type=float, help="Only memories with at least this score.")
@AS_JSON
@with_client
def search(client: Client, user: str, query: str, as_json: bool, **options: Any) -> None:
    """Search the memories of a user. The best come first.

    \b
    Examples:
      memserve search -u anna "Which instrument does she play?"
      memserve search -u anna cello --mode words --json | jq -r .text
    """
    columns: Columns = {
        "score": lambda one: "" if one.score is None else f"{one.score:.3f}",
        "text": lambda one: one.text,
        "created": lambda one: f"{one.created_at:%Y-%m-%d}",
        "id": lambda one: one.id,
    }
    show(client.search(user, query, **options), columns, as_json=as_json)


@click.command(name="import")
@USER
@FILE
@AS_JSON
@with_client
def import_(client: Client, user: str, file: str, as_json: bool) -> None:
    """Add the memories in FILE to a user: NDJSON as `memserve export` writes it, by default from standard input.

    A line needs an `id` and a `text`; a line without a `vector` is embedded. Memories that the user has are unchanged.

    \b
    Example:
      memserve import -u anna anna.ndjson
    """
    done = client.import_(user, click.open_file("-", "rb") if file == "-" else file)
    columns: Columns = {"imported": lambda one: str(one.imported), "unchanged": lambda one: str(one.unchanged)}
    show([done], columns, as_json=as_json)


@click.command()
@USER
@FILE
@with_client
def export(client: Client, user: str, file: str) -> None:
    """Write the memories of a user to FILE as NDJSON, with vectors and history; by default to standard output.

    \b
    Example:
      memserve export -u anna anna.ndjson
    """
    with click.open_file(file, "wb") as written:
        written.writelines(client.export(user))


@click.command()
@click.option("--prefix", help="Only users whose id begins like this.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many.")
@AS_JSON
@with_client
def users(client: Client, limit: int | None, as_json: bool, **options: Any) -> None:
    """List the users that have memories, by their ids.

    \b
    Example:
      memserve users --prefix anna
    """
    columns: Columns = {
        "user": lambda one: one.user_id,
        "memories": lambda one: f"{one.memories:,}",
        "bytes": lambda one: f"{one.bytes:,}",
    }
    show(itertools.islice(client.users(**options), limit), columns, as_json=as_json)


@click.command()
@URL
@API_KEY
@click.option("--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many looks. Default: at Ctrl-C.")
@AS_JSON
def top(url: str | None, api_key: str | None, interval: float, count: int | None, as_json: bool) -> None:
    """Watch a server: its replicas, queues, batches, texts/s and latencies.

    The figures come from `GET /metrics`, which replicas update every few seconds. A server with keys asks for one with
    the scope `admin`.

    \b
    Examples:
      memserve top
      memserve top --count 1 --interval 10 --json
    """
    from memserve.client import DEFAULT_URL
    from memserve.http import HttpTransport
    from memserve.top import looks, table

    transport = HttpTransport(url or DEFAULT_URL, api_key, None)
    with _reported(), closing(transport):
        found = itertools.islice(looks(lambda: transport.text("/metrics", interval + 10), interval), count)
        if as_json:
            for one in found:
                click.echo(json.dumps(one.as_json()))
            return
        from rich.live import Live

        with Live("Waiting for the first figures ...", auto_refresh=False) as live, suppress(KeyboardInterrupt):
            for one in found:
                live.update(table(one, transport.name), refresh=True)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete the commands and options of memserve.

    \b
    Examples:
      eval "$(memserve completion bash)"     in ~/.bashrc
      memserve completion fish > ~/.config/fish/completions/memserve.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, "memserve", "_MEMSERVE_COMPLETE").source())


COMMANDS = (embed, add, search, import_, export, users, top, completion)
