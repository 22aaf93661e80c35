"""`python -m deployments [CONFIG]`: the server in the foreground, without the command `memserve` installed.

`memserve serve`, `memserve check` and `memserve env` do the same by the same functions.
"""

import argparse
import sys
from pathlib import Path

from deployments.serving import launch


def main(argv: list[str]) -> int:
    """Serve until a signal arrives, check a config file, or print variables. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deployments", description="Serve memserve on this machine.")
    parser.add_argument("config", nargs="?", default="serve_config.yaml", type=Path, help="a Serve config file")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="check the config file and start nothing")
    only.add_argument(
        "--environment", action="store_true", help="print the variables that a shell that starts Ray needs: `eval` them"
    )
    arguments = parser.parse_args(argv)
    if arguments.environment:
        return launch.print_environment()
    if arguments.check:
        return launch.check(arguments.config)
    return launch.serve(arguments.config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
