"""Threads for blocking work: as many as jobs run at the same time, and the one that was used last is used first.

A ThreadPoolExecutor uses its threads in turn, and starts one more than it needs. Each thread has scratch memory of its
own (malloc's, oneDNN's), which is cold again by the time of its next turn.

The threads belong to one event loop.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

Answer = TypeVar("Answer")
Given = TypeVarTuple("Given")


class Threads:
    """Starts a thread if all others are busy. Each thread calls `begin(*given)` when it starts."""

    def __init__(self, name: str, begin: Callable[[*Given], object], *given: *Given) -> None:
        self._make = lambda number: ThreadPoolExecutor(1, f"{name}-{number}", begin, given)
        self._all: list[ThreadPoolExecutor] = []
        self._idle: list[ThreadPoolExecutor] = []

    async def run(self, job: Callable[[*Given], Answer], *given: *Given) -> Answer:
        """Run one job. Cancelling the call does not stop the job; its thread takes another job when it is done."""
        if not self._idle:
            self._all.append(self._make(len(self._all)))
            self._idle.append(self._all[-1])
        thread = self._idle.pop()
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, job, *given)
        finally:
            self._idle.append(thread)

    def close(self) -> None:
        """Let each thread end when its job is done."""
        for thread in self._all:
            thread.shutdown(wait=False)
