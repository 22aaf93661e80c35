"""Clients that are slow or stop do not hold up others: each keeps a connection, and no more."""

import asyncio
import time

import httpx

from tests.cluster.elastic import Elastic

RUDE = 60  # clients of each kind
ANSWERED_WITHIN_S = 5.0  # on two cores that other processes use too; a request takes milliseconds
HEAD = "POST /v1/embeddings HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def a_byte_a_second(connection: Connection) -> None:
    for character in HEAD.format(1000):
        connection[1].write(character.encode())
        await asyncio.sleep(1)


async def half_a_small_body(connection: Connection) -> None:
    connection[1].write(HEAD.format(1000).encode() + b'{"input": "' + b"x" * 400)
    await asyncio.Event().wait()


async def half_a_large_body(connection: Connection) -> None:
    connection[1].write(HEAD.format(2_000_000).encode() + b'{"input": "' + b"x" * 400_000)
    await asyncio.Event().wait()


async def not_reading(connection: Connection) -> None:
    connection[1].transport.pause_reading()  # type: ignore[attr-defined]
    connection[1].write(b"GET /v1/users/rude/export HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
    await asyncio.Event().wait()


async def test_slow_and_rude_clients_do_not_hold_up_others(elastic: Elastic) -> None:
    rude: list[asyncio.Task[None]] = []
    connections: list[Connection] = []
    async with httpx.AsyncClient(base_url=elastic.url, timeout=60.0, trust_env=False) as http:
        memories = [{"text": f"memory {n} " + "x" * 2_000} for n in range(1_000)]
        assert (await http.post("/v1/users/rude/memories", json={"memories": memories})).status_code == 201
        try:
            for kind in (a_byte_a_second, half_a_small_body, half_a_large_body, not_reading):
                for _ in range(RUDE):
                    connections.append(await asyncio.open_connection("127.0.0.1", elastic.port))
                    rude.append(asyncio.create_task(kind(connections[-1])))
            await asyncio.sleep(2)  # so that all of them have begun
            for n in range(20):
                started = time.monotonic()
                embedded = await http.post("/v1/embeddings", json={"input": f"tea {n}"})
                added = await http.post("/v1/users/polite/memories", json={"text": f"tea {n}"})
                found = await http.post("/v1/users/polite/memories/search", json={"query": f"tea {n}", "top_k": 1})
                assert (embedded.status_code, added.status_code, found.status_code) == (200, 201, 200)
                assert found.json()["results"][0]["text"] == f"tea {n}"
                assert time.monotonic() - started < ANSWERED_WITHIN_S
            assert not any(task.done() for task in rude)
        finally:
            for task in rude:
                task.cancel()
            for _, writer in connections:
                writer.transport.abort()
    with elastic.client() as client:
        assert client.get("/health/ready").status_code == 200
