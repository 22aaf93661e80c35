"""The command `memserve`, and `python -m memserve`."""

from memserve.command import memserve


def main() -> None:
    """Run the command line and end the process with its exit status."""
    memserve(prog_name="memserve")


if __name__ == "__main__":
    main()
