"""No process outlives the server: however the server ends, all processes that it started end too.

Two processes guarantee this. The supervisor only waits, and ends what is left when the server process is gone, even if
that was killed by `kill -9`. The kernel signals the server process when the supervisor dies. Both are subreapers
(prctl(2)), so that a daemon that detached itself, as HAProxy does on a reload, remains their descendant.
"""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
TERMINATE_WITHIN_S = 5.0


def supervise(serve: Callable[[], int]) -> int:
    """Run `serve` in a process of its own, pass signals on to it, and end all processes that it leaves behind.

    Returns:
        its exit status; 1 if a signal ended it.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    supervisor = os.getpid()
    child = os.fork()
    if child == 0:
        os.setsid()  # the terminal's Ctrl-C reaches the supervisor alone
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != supervisor:
            os._exit(1)
        status = 1
        try:
            status = serve()
        except BaseException:  # noqa: BLE001 - the last frame of this process: nobody else can report the error
            traceback.print_exc()
        finally:
            end_descendants()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def pass_on(_: int, __: FrameType | None) -> None:
        if psutil.pid_exists(child):
            os.kill(child, signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    _, result = os.waitpid(child, 0)
    end_descendants()
    return os.waitstatus_to_exitcode(result) if os.WIFEXITED(result) else 1


def end_descendants() -> None:
    """End every process below this one: send SIGTERM, wait for 5 seconds, then send SIGKILL."""
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            _signal(process, signal.SIGTERM)
        _, alive = psutil.wait_procs(descendants, timeout=TERMINATE_WITHIN_S)
        for process in alive:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=TERMINATE_WITHIN_S)


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
