"""Threads for blocking work: as many as there are jobs at once, and the one that was used last comes first.

A ThreadPoolExecutor hands its threads out in turn, and starts one more than it needs: each has scratch memory of its
own (malloc's, oneDNN's), which is then cold when its turn comes. Belongs to one event loop.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

Answer = TypeVar("Answer")
Given = TypeVarTuple("Given")


class Threads:
    """Makes a thread where all are at work. `begin(*given)` is called in each as it starts."""

    def __init__(self, name: str, begin: Callable[[*Given], object], *given: *Given) -> None:
        self._make = lambda number: ThreadPoolExecutor(1, f"{name}-{number}", begin, given)
        self._all: list[ThreadPoolExecutor] = []
        self._idle: list[ThreadPoolExecutor] = []

    async def run(self, job: Callable[[*Given], Answer], *given: *Given) -> Answer:
        """Do one job. Who is cancelled does not stop it: its thread takes the next when it is done."""
        if not self._idle:
            self._all.append(self._make(len(self._all)))
            self._idle.append(self._all[-1])
        thread = self._idle.pop()
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, job, *given)
        finally:
            self._idle.append(thread)

    def close(self) -> None:
        """Let the threads end when they are done."""
        for thread in self._all:
            thread.shutdown(wait=False)
