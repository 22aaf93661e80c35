"""Threads: as many as jobs run at once, the last used first, each set up when it starts."""

import asyncio
import threading

from deployments.embedding.local.threads import Threads


async def test_jobs_one_after_the_other_run_in_the_same_thread() -> None:
    begun: list[tuple[int, int]] = []
    threads = Threads("work", lambda number: begun.append((number, threading.get_ident())), 7)
    used = {await threads.run(threading.get_ident) for _ in range(50)}
    assert begun == [(7, *used)]
    threads.close()


async def test_concurrent_jobs_have_a_thread_each_and_later_jobs_reuse_them() -> None:
    threads = Threads("work", lambda: None)
    meet = threading.Barrier(3, timeout=10)

    def job() -> int:
        meet.wait()
        return threading.get_ident()

    first = await asyncio.gather(*(threads.run(job) for _ in range(3)))
    again = await asyncio.gather(*(threads.run(job) for _ in range(3)))
    assert len(set(first)) == 3
    assert set(again) == set(first)
    threads.close()


async def test_a_thread_is_reused_after_an_error_or_a_cancelled_call() -> None:
    threads = Threads("work", lambda: None)
    before = await threads.run(threading.get_ident)
    failed = await asyncio.gather(threads.run(int, "x"), return_exceptions=True)
    assert isinstance(failed[0], ValueError)
    go_on = threading.Event()
    cancelled = asyncio.create_task(threads.run(go_on.wait))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    after = asyncio.create_task(threads.run(threading.get_ident))
    await asyncio.sleep(0)
    go_on.set()
    assert await after == before
    threads.close()
