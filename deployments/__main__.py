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
    default = "default: ./serve_config.yaml, or the one that comes with memserve"
    parser.add_argument("config", nargs="?", type=Path, help=f"a Serve config file; {default}")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="check the config file and start nothing")
    only.add_argument(
        "--environment", action="store_true", help="print the variables that a shell that starts Ray needs: `eval` them"
    )
    arguments = parser.parse_args(argv)
    if arguments.environment:
        return launch.print_environment()
    config = arguments.config or launch.default_config()
    return launch.check(config) if arguments.check else launch.serve(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
