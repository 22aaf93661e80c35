"""The errors of the command line: one line on standard error, and an exit status."""

from typing import IO, Any

import click


class Failed(click.ClickException):
    """An error that is reported in one line, after the name of the command."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self._command = click.get_current_context().command_path

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line to standard error."""
        click.echo(f"{self._command}: {self.message}", file=file, err=file is None)


def needs_server(error: ModuleNotFoundError, failed: type[Failed] = Failed) -> Failed:
    """The error of a subcommand that needs a package of the server."""
    return failed(f'{error.name} is not installed; this command needs the server: pip install "memserve[server]"')
