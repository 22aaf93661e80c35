"""The command line `memserve`. The subcommands for memories and embeddings are in client_commands.py.

Every error is one line on standard error. What a subcommand needs is imported when it runs, so that `memserve --help`
answers at once, and works without the server installed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from memserve import __version__, client_commands
from memserve.failures import Failed, needs_server

DEFAULT_TENANT = "default"

CONFIG = click.argument("config", required=False, type=click.Path(path_type=Path))
LOG = click.option(
    "--log", "url", required=True, metavar="URL", help="The log: sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME."
)
TENANT = click.option("--tenant", default=DEFAULT_TENANT, show_default=True, help="The tenant of the user.")
USER = click.option("--user", required=True, help="The user's id.")
FILE = click.argument("file", default="-", type=click.Path(dir_okay=False, allow_dash=True))


_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class _Period(click.ParamType):
    """A period of time: 30m, 12h, 90d or 8w."""

    name = "period"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """The period. Reports a wrong value as click does."""
        found = re.fullmatch(r"([1-9]\d{0,3})([mhdw])", value)
        if found is None:
            self.fail(f"{value!r} is not a period such as 12h, 90d or 8w.", param, ctx)
        return timedelta(**{_UNITS[found[2]]: int(found[1])})


class LogFailed(Failed):
    """An error of `memserve log`, where 1 says that `verify` has found a problem."""

    exit_code = 2


@contextmanager
def _needs_server(failed: type[Failed] = Failed) -> Iterator[None]:
    """A context for the imports of a subcommand. If the server is not installed, the error says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise needs_server(error, failed) from error


@contextmanager
def _reported() -> Iterator[None]:
    """A context for the work of `memserve log`. Reports an error of the log, a file or a server in one line."""
    import httpx

    from store import StoreError

    try:
        yield
    except (StoreError, OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        raise LogFailed(str(error)) from error


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="memserve")
def memserve() -> None:
    """An embedding server with a memory for each user.

    \b
    Examples:
      memserve serve                    serve ./serve_config.yaml on this machine
      memserve check my_config.yaml     check a config file and start nothing
      memserve keys create --tenant me  make a key for a server that asks for keys
      memserve add -u anna "I ski."     add a memory to a user
      memserve search -u anna winter    search the memories of a user
      memserve log stats --log sqlite:///data/memserve.db
    """


for _command in client_commands.COMMANDS:
    memserve.add_command(_command)


@memserve.command()
@CONFIG
def serve(config: Path | None) -> None:
    """Serve CONFIG on this machine until Ctrl-C.

    CONFIG is a Serve config file. By default it is ./serve_config.yaml, or if there is none, the one that comes with
    memserve. Prints one line when the server answers. When the server ends, every process that it started has ended
    too.

    \b
    Exit status: 0 after Ctrl-C or SIGTERM, 1 if it cannot start.

    \b
    Examples:
      memserve serve
      MEMSERVE_MODEL__NAME=BAAI/bge-small-en-v1.5 memserve serve my_config.yaml
    """
    with _needs_server():
        from deployments.serving import launch
    click.get_current_context().exit(launch.serve(config or launch.default_config()))


@memserve.command()
@CONFIG
def check(config: Path | None) -> None:
    """Check CONFIG, the model and the installed Ray, and start nothing.

    CONFIG is a Serve config file, by default that of `memserve serve`. Checks `args:` and each `user_config:`.

    \b
    Exit status: 0 if CONFIG is valid, 1 if not.

    \b
    Example:
      memserve check my_config.yaml && serve deploy my_config.yaml
    """
    with _needs_server():
        from deployments.serving import launch
    click.get_current_context().exit(launch.check(config or launch.default_config()))


@memserve.command()
def env() -> None:
    """Print the variables that a shell that starts Ray needs.

    `memserve serve` sets them itself. A cluster that is started by other means needs them on every node.

    \b
    Example:
      eval "$(memserve env)" && ray start --head
    """
    with _needs_server():
        from deployments.serving import launch
    click.get_current_context().exit(launch.print_environment())


@memserve.group(context_settings={"help_option_names": ["-h", "--help"]})
def keys() -> None:
    """Make, list and revoke the keys that a server with `auth.mode: keys` asks for.

    The commands work on the log itself, whether a server runs or not.

    \b
    Exit status: 0 done; 1 it could not be done.
    """


@contextmanager
def _log_of_keys(url: str | None) -> Iterator[str]:
    """A context for the work of `memserve keys`, with the URL of the log: as given, or that of `memserve serve`."""
    with _needs_server():
        from deployments.serving import launch, plan
        from store import StoreError
    try:
        yield plan.configured_log(launch.default_config()) if url is None else url
    except plan.CannotStart as error:
        raise Failed(f"{error}; name the log by --log") from error
    except (StoreError, OSError) as error:
        raise Failed(str(error)) from error


LOG_OF_KEYS = click.option(
    "--log",
    "url",
    default=None,
    metavar="URL",
    help="The log: sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME. Default: that of ./serve_config.yaml, or of "
    "the variable MEMSERVE_STORE__URL.",
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@keys.command(name="create")
@LOG_OF_KEYS
@click.option("--tenant", required=True, help="The tenant that the key belongs to.")
@click.option("--user", default=None, help="The only user that the key reaches. Default: all users of the tenant.")
@click.option("--scopes", default="read,write", show_default=True, help="One or more of read, write and admin.")
@click.option(
    "--expires", type=_Period(), default=None, help="The period after which the key is refused, as 12h or 90d."
)
@click.option("--label", default=None, help="Shown in lists.")
@click.option("--requests-per-minute", type=int, default=None, help="Default: the limit of the settings.")
@click.option("--tokens-per-minute", type=int, default=None, help="Default: the limit of the settings.")
@AS_JSON
def create_key(url: str | None, scopes: str, **options: Any) -> None:
    """Make a key. It is printed once, on standard output; the log holds its hash.

    The log is created if it does not exist.

    \b
    Examples:
      memserve keys create --tenant acme
      KEY=$(memserve keys create --tenant acme --user anna --expires 90d --label "Anna's phone")
    """
    with _log_of_keys(url) as log_url:
        from store import key_commands

        made = key_commands.create(log_url, scopes=[scope.strip() for scope in scopes.split(",")], **options)  # type: ignore[misc]
    click.echo(f"{made}. The key is shown once.", err=True)


@keys.command(name="list")
@LOG_OF_KEYS
@click.option("--tenant", default=None, help="Default: all tenants.")
@AS_JSON
def list_keys(url: str | None, tenant: str | None, as_json: bool) -> None:
    """List keys, the newest first, those that were revoked or have expired included.

    \b
    Example:
      memserve keys list --tenant acme
    """
    with _log_of_keys(url) as log_url:
        from store import key_commands

        key_commands.show(log_url, tenant, as_json=as_json)


@keys.command(name="revoke")
@LOG_OF_KEYS
@click.argument("id")
def revoke_key(url: str | None, id: str) -> None:
    """Revoke the key with this ID. A server refuses it within 5 seconds.

    \b
    Example:
      memserve keys revoke 5b1c8f02a3d94e67
    """
    with _log_of_keys(url) as log_url:
        from store import key_commands

        key_commands.revoke(log_url, id)


@memserve.group(context_settings={"help_option_names": ["-h", "--help"]})
def log() -> None:
    """Inspect, move and maintain a log: the database that holds the memories.

    A server may use the log meanwhile, except for `compact`.

    \b
    Exit status: 0 done; 1 `verify` found a problem; 2 it could not be done.
    """


@log.command()
@LOG
def stats(url: str) -> None:
    """Print the contents of a log in numbers, as JSON.

    \b
    Example:
      memserve log stats --log sqlite:///data/memserve.db
    """
    with _needs_server(LogFailed):
        from store import commands
    with _reported():
        commands.stats(url)


@log.command()
@LOG
def verify(url: str) -> None:
    """Check every memory: hashes, vectors and counts; and the structure of a SQLite file.

    Prints one line for each problem. Exit status 1 if there is any.

    \b
    Example:
      memserve log verify --log sqlite:///data/memserve.db
    """
    with _needs_server(LogFailed):
        from store import commands
    with _reported():
        problems = commands.verify(url)
    click.get_current_context().exit(1 if problems else 0)


@log.command()
@LOG
@TENANT
@USER
@FILE
def export(url: str, tenant: str, user: str, file: str) -> None:
    """Write a user's memories to FILE as NDJSON, by default to standard output.

    \b
    Example:
      memserve log export --log sqlite:///data/memserve.db --user anna anna.ndjson
    """
    with _needs_server(LogFailed):
        from store import commands
    with _reported():
        commands.export(url, tenant, user, lambda: click.open_file(file, "wb"))


@log.command(name="import")
@LOG
@TENANT
@USER
@FILE
def import_(url: str, tenant: str, user: str, file: str) -> None:
    """Add the memories in FILE, NDJSON as `export` writes it, to a user; by default from standard input.

    The log is created if it does not exist. Memories that the user already has are left unchanged.

    \b
    Example:
      memserve log import --log sqlite:///data/memserve.db --user anna anna.ndjson
    """
    with _needs_server(LogFailed):
        from store import commands
    with _reported():
        commands.import_(url, tenant, user, lambda: click.open_file(file, "rb"))


@log.command()
@LOG
def compact(url: str) -> None:
    """Give the space of erased memories back. No other process may write meanwhile.

    \b
    Example:
      memserve log compact --log sqlite:///data/memserve.db
    """
    with _needs_server(LogFailed):
        from store import commands
    with _reported():
        commands.compact(url)


@log.command()
@LOG
@click.option("--model", required=True, help="The new model's name, as its server is set to.")
@click.option("--url", "server", required=True, metavar="URL", help="A memserve that runs the new model.")
@click.option("--api-key", default=None, help="The API key of that server.")
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1), help="Texts in one request.")
def reembed(url: str, model: str, server: str, api_key: str | None, batch: int) -> None:
    """Move a log to another model. Its servers may run meanwhile, and are restarted with the new model afterwards.

    \b
    Example:
      memserve log reembed --log sqlite:///data/memserve.db --model BAAI/bge-small-en-v1.5 --url http://127.0.0.1:8100
    """
    with _needs_server(LogFailed):
        from store import commands
    with _reported():
        commands.reembed(url, model, server, api_key=api_key, batch=batch)
