"""The load generator's connections: they are kept if the server keeps them, and no answer goes to another request."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager

import pytest
import uvloop

from benchmarks.connections import Connections, Lost

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[tuple[str, list[int]]]:
    """A server that passes each body to `answer`. Yields its URL and the number of requests on each connection."""
    requests: list[int] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(0)
        number = len(requests) - 1
        while head := await reader.readuntil(b"\r\n\r\n"):
            requests[number] += 1
            assert head.startswith(b"POST /v1/embeddings HTTP/1.1\r\nhost: 127.0.0.1:")
            length = int(head.rsplit(b"content-length: ", 1)[1])
            await answer(await reader.readexactly(length), writer)

    async def talk_until_it_leaves(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(talk_until_it_leaves, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests


async def echo_status(body: bytes, writer: asyncio.StreamWriter) -> None:
    """Answer with the status that is in the body."""
    writer.write(b"HTTP/1.1 %s x\r\ncontent-length: 5\r\n\r\nhello" % body)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_connection_is_kept_for_the_next_request(run: Callable[[Coroutine[None, None, None]], None]) -> None:
    async def three() -> None:
        async with serving(echo_status) as (url, requests), Connections(url) as server:
            assert [await server.post("/v1/embeddings", body) for body in (b"200", b"429", b"503")] == [200, 429, 503]
            assert requests == [3]

    run(three())


async def test_concurrent_requests_use_separate_connections() -> None:
    async def slow(body: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05 if body == b"200" else 0.0)
        await echo_status(body, writer)

    async with serving(slow) as (url, requests), Connections(url) as server:
        bodies = [b"200", b"201", b"202"] * 5
        answers = await asyncio.gather(*(server.post("/v1/embeddings", body) for body in bodies))
        assert answers == [int(body) for body in bodies]
        assert len(requests) == 15
        await server.post("/v1/embeddings", b"200")
        assert len(requests) == 15


async def test_an_answer_in_chunks_is_read_to_its_end() -> None:
    async def chunks(body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 %s x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n" % body)
        await asyncio.sleep(0.01)
        writer.write(b"2\r\n!!\r\n0\r\n\r\n")

    async with serving(chunks) as (url, requests), Connections(url) as server:
        assert [await server.post("/v1/embeddings", body) for body in (b"200", b"201")] == [200, 201]
        assert requests == [2]


async def test_a_connection_that_the_server_closes_is_not_used_again() -> None:
    async def once(body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 %s x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % body)

    async def idle_no_longer(body: bytes, writer: asyncio.StreamWriter) -> None:
        await echo_status(body, writer)
        writer.close()

    for answer in (once, idle_no_longer):
        async with serving(answer) as (url, requests), Connections(url) as server:
            for _ in range(2):
                assert await server.post("/v1/embeddings", b"200") == 200
                await asyncio.sleep(0.05)  # until the end of the connection has arrived
            assert requests == [1, 1]


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 x\r\ncontent-length: 9\r\n\r\nhalf", b"SMTP ready\r\n"])
async def test_an_incomplete_answer_raises_lost(sent: bytes) -> None:
    async def half(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        if not sent.startswith(b"SMTP"):
            writer.close()

    async with serving(half) as (url, _), Connections(url) as server:
        with pytest.raises(Lost):
            await asyncio.wait_for(server.post("/v1/embeddings", b"200"), 5)


async def test_the_late_answer_of_an_abandoned_request_is_not_read_as_the_next_one() -> None:
    async def late(body: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2 if body == b"500" else 0.0)
        await echo_status(body, writer)

    async with serving(late) as (url, requests), Connections(url) as server:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(server.post("/v1/embeddings", b"500"), 0.05)
        assert await server.post("/v1/embeddings", b"200") == 200
        assert requests == [1, 1]
