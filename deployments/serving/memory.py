"""Bounds the memory that the processes of a server keep although they have freed it, or may make again.

The C library keeps freed memory in up to eight heaps per core, and returns only what lies at the end of a heap. oneDNN,
which computes the forward on a CPU, keeps the last 1,024 kernels that it has made, one for each layer and number of
tokens of a batch. Both made replicas grow for an hour: an embedder by 40 MiB for 150 texts of new lengths, and by 15
with these variables. The processor's time is the same.
"""

import ctypes
import functools
import threading

VARIABLES = {
    "MALLOC_ARENA_MAX": "2",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}
"""Variable -> value: read when a process starts, so they must be set before Ray starts."""

_INTERVAL_S = 30.0


@functools.cache
def return_freed_memory_regularly() -> threading.Thread | None:
    """Start a thread that returns this process's freed memory to the system twice a minute.

    A second call does nothing. Returns the thread, or None if the C library is not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return None

    def work() -> None:
        pause = threading.Event()
        while not pause.wait(_INTERVAL_S):
            trim(0)  # without the interpreter's lock

    thread = threading.Thread(target=work, name="freed-memory", daemon=True)
    thread.start()
    return thread
