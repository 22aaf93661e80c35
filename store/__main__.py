"""`python -m store`: another name for `memserve log`."""

from memserve.command import log

if __name__ == "__main__":
    log(prog_name="python -m store")
