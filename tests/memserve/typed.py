"""What type checkers know of the clients: `make check` fails if one of these types is another one. It is not run."""

from collections.abc import AsyncIterator, Iterator
from typing import Any, assert_type

import numpy as np

import memserve


def blocking(client: memserve.Client) -> None:
    """Calls of `Client` return their results."""
    assert_type(client.embed(["tea"]), np.ndarray[tuple[Any, ...], np.dtype[Any]])
    assert_type(client.add("anna", ["Tea."]), list[memserve.Added])
    assert_type(client.search("anna", "Tea.", top_k=3), list[memserve.Memory])
    assert_type(client.list("anna"), Iterator[memserve.Memory])
    assert_type(client.export("anna"), Iterator[bytes])
    assert_type(client.delete("anna", "a"), None)
    client.get("anna")  # type: ignore[call-arg]
    client.get("anna", 1)  # type: ignore[arg-type]
    client.search("anna", top_k="3")  # type: ignore[arg-type]
    client.nothing()  # type: ignore[attr-defined]


async def awaiting(client: memserve.AsyncClient) -> None:
    """Calls of `AsyncClient` are awaited."""
    assert_type(await client.search("anna", "Tea."), list[memserve.Memory])
    assert_type(client.list("anna"), AsyncIterator[memserve.Memory])
    await client.get("anna", 1)  # type: ignore[arg-type]


async def agentmem() -> None:
    """AgentMem's interface."""
    assert_type(memserve.Memory.builder().build().search("Tea."), list[memserve.Memory])
    assert_type(await (await memserve.Memory.builder().build_async()).add("Tea."), memserve.Added)
