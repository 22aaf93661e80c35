"""Answers in one write, bodies that are not read ahead, headers of any encoding, upgrades, and what is not HTTP."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from ray.serve._private.direct_ingress_http_util import ASGIDIReceiveProxy
from ray.serve._private.http_util import parse_disconnect_disabled_header
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from deployments.api.http import RawPath
from deployments.requests.receive import RECEIVE
from deployments.serving.protocol import GatewayProtocol, install

REQUEST = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
LAST_REQUEST = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


class Wire(asyncio.Transport):
    """A connection that keeps each write, and None for its close. `reads` is whether it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = True
        self.writes: list[bytes | None] = []
        self._changed = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition on `writes`."""
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))
        self._changed.set()

    def close(self) -> None:
        self.writes.append(None)
        self._changed.set()

    def is_closing(self) -> bool:
        return None in self.writes

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True


async def turns_until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until a condition holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)


async def serve(app: ASGIApp, ask: Callable[[GatewayProtocol, Wire], Awaitable[None]]) -> list[bytes | None]:
    """The writes to the connection while `ask` talks to a server of `app`."""
    config = uvicorn.Config(app, log_config=None)
    config.load()
    assert config.http_protocol_class is GatewayProtocol
    wire = Wire()
    protocol = GatewayProtocol(config, ServerState(), {})
    protocol.connection_made(wire)
    await ask(protocol, wire)
    return wire.writes


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", {**uvicorn.config.HTTP_PROTOCOLS})
    install()


async def test_each_answer_is_one_write() -> None:
    async def ask(protocol: GatewayProtocol, wire: Wire) -> None:
        for asked in (1, 2, 3):
            protocol.data_received(REQUEST)
            await wire.until(lambda asked=asked: len(wire.writes) >= asked)

    writes = await serve(Response(b"x" * 100_000), ask)
    assert len(writes) == 3
    for write in writes:
        assert write is not None
        head, _, body = write.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n") and body == b"x" * 100_000


async def test_pipelined_requests_are_answered_in_order() -> None:
    async def ask(protocol: GatewayProtocol, wire: Wire) -> None:
        protocol.data_received(REQUEST + REQUEST)
        await wire.until(lambda: len(wire.writes) >= 2)

    first, second = await serve(Response(b"answer"), ask)
    assert first is not None and first.endswith(b"\r\n\r\nanswer")
    assert second is not None and second.endswith(b"\r\n\r\nanswer")


async def test_a_streamed_answer_is_sent_before_it_ends() -> None:
    go_on = asyncio.Event()

    async def chunks() -> Any:
        yield b"first"
        await go_on.wait()
        yield b"second"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await StreamingResponse(chunks())(scope, receive, send)

    async def ask(protocol: GatewayProtocol, wire: Wire) -> None:
        protocol.data_received(REQUEST)
        await wire.until(lambda: b"first" in b"".join(filter(None, wire.writes)))
        go_on.set()
        await wire.until(lambda: b"0\r\n\r\n" in b"".join(filter(None, wire.writes)))

    assert b"second" in b"".join(filter(None, await serve(app, ask)))


async def test_the_last_answer_of_a_connection_is_sent_before_it_is_closed() -> None:
    async def ask(protocol: GatewayProtocol, wire: Wire) -> None:
        protocol.data_received(LAST_REQUEST)
        await wire.until(wire.is_closing)

    answer, closed = await serve(Response(b"answer"), ask)
    assert answer is not None and answer.endswith(b"\r\n\r\nanswer")
    assert closed is None


async def test_nothing_is_written_to_a_closed_connection() -> None:
    async def ask(protocol: GatewayProtocol, wire: Wire) -> None:
        protocol.transport.write(b"held")
        wire.close()
        await asyncio.sleep(0)

    assert await serve(Response(b"answer"), ask) == [None]


@pytest.mark.parametrize(
    ("path", "left"),
    [
        ("/v1/users/ann/import", True),
        ("/v1/users/a%2Fb/import?x=1", True),
        ("/v1/users/import", False),
        ("/v1/users/import/memories", False),
        ("/v1/users/ann/memories/import", False),
        ("/v1/embeddings?/v1/users/ann/import", False),
    ],
)
async def test_serve_does_not_watch_for_the_disconnect_of_an_import(path: str, left: bool) -> None:
    told: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        told.append(parse_disconnect_disabled_header(dict(scope["headers"])))
        await Response()(scope, receive, send)

    async def ask(protocol: GatewayProtocol, wire: Wire) -> None:
        protocol.data_received(b"POST " + path.encode() + b" HTTP/1.1\r\nx-request-disconnect-disabled: ?0\r\n\r\n")
        await wire.until(lambda: len(wire.writes) > 0)

    await serve(app, ask)
    assert told == [left]


def chunk(body: bytes) -> bytes:
    return f"{len(body):x}\r\n".encode() + body + b"\r\n"


async def test_a_body_waits_in_the_connection_until_the_application_reads_it() -> None:
    """Serve's own reader stands between the connection and the application, as in a gateway."""
    may_read, has_read, cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()
    body = bytearray()

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        await may_read.wait()
        more = True
        while more:
            message = await receive()
            body.extend(message["body"])
            more = message["more_body"]
        has_read.set()
        await asyncio.Event().wait()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reader = ASGIDIReceiveProxy(scope, receive, asyncio.get_running_loop())
        watch = reader.fetch_until_disconnect_task()
        working = asyncio.create_task(RawPath(work)(scope, reader, send))
        await asyncio.wait([watch, working], return_when=asyncio.FIRST_COMPLETED)
        assert watch.done() and not working.done()
        working.cancel()
        cancelled.set()

    async def ask(protocol: GatewayProtocol, wire: Wire) -> None:
        protocol.data_received(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")
        sent = 0

        async def send_what_is_read() -> None:
            nonlocal sent
            while wire.reads and sent < 100:
                protocol.data_received(chunk(b"%02d" % sent * 20_000))
                sent += 1
                for _ in range(10):
                    await asyncio.sleep(0)

        await send_what_is_read()
        assert sent == 2
        may_read.set()
        await turns_until(lambda: wire.reads)
        await send_what_is_read()
        protocol.data_received(chunk(b""))
        async with asyncio.timeout(10):
            await has_read.wait()
        assert bytes(body) == b"".join(b"%02d" % number * 20_000 for number in range(100))
        assert wire.reads
        assert not cancelled.is_set()
        protocol.connection_lost(None)
        async with asyncio.timeout(10):
            await cancelled.wait()

    await serve(app, ask)


async def test_a_connection_is_read_on_after_a_large_body_that_came_at_once() -> None:
    """A connection that is not read does not tell that its client has gone."""
    has_read, may_answer = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert await scope[RECEIVE]() == {"type": "http.request", "body": b"x" * 100_000, "more_body": False}
        has_read.set()
        await may_answer.wait()
        await Response()(scope, receive, send)

    async def ask(protocol: GatewayProtocol, wire: Wire) -> None:
        protocol.data_received(b"POST / HTTP/1.1\r\ncontent-length: 100000\r\n\r\n")
        for _ in range(10):
            await asyncio.sleep(0)  # the application waits for the body
        protocol.data_received(b"x" * 100_000)
        assert not wire.reads
        async with asyncio.timeout(10):
            await has_read.wait()
        assert wire.reads
        may_answer.set()
        await wire.until(lambda: len(wire.writes) > 0)

    await serve(app, ask)


@pytest.mark.parametrize("body", [b"", b"x" * 1000])
async def test_a_client_that_gives_up_is_noticed_before_its_body_is_read(body: bytes) -> None:
    watching, noticed = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        watching.set()
        assert await receive() == {"type": "http.disconnect"}
        noticed.set()

    async def ask(protocol: GatewayProtocol, wire: Wire) -> None:
        protocol.data_received(b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await watching.wait()
        assert not noticed.is_set()
        protocol.connection_lost(None)
        async with asyncio.timeout(10):
            await noticed.wait()

    await serve(app, ask)


async def test_headers_that_serve_decodes_are_utf_8() -> None:
    told: list[list[tuple[bytes, bytes]]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        told.append(list(scope["headers"]))
        await Response()(scope, receive, send)

    async def ask(protocol: GatewayProtocol, wire: Wire) -> None:
        latin, utf8 = "ü".encode("latin-1"), "ü".encode()
        protocol.data_received(b"GET / HTTP/1.1\r\nx-session-id: " + latin + b"\r\nother: " + utf8 + b"\r\n\r\n")
        await wire.until(lambda: len(wire.writes) > 0)

    await serve(app, ask)
    assert told == [[(b"x-session-id", "ü".encode()), (b"other", "ü".encode())]]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (b"my-request.1", True),
        (b"x" * 128, True),
        (b"x" * 129, False),
        (b"two words", False),
        (b"\xff", False),
        (b"", False),
    ],
)
async def test_a_request_id_that_is_not_valid_is_left_out(given: bytes, kept: bool) -> None:
    told: list[dict[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        told.append(dict(scope["headers"]))
        await Response()(scope, receive, send)

    async def ask(protocol: GatewayProtocol, wire: Wire) -> None:
        protocol.data_received(b"GET / HTTP/1.1\r\nX-Request-ID: " + given + b"\r\nother: one\r\n\r\n")
        await wire.until(lambda: len(wire.writes) > 0)

    await serve(app, ask)
    assert told == [{b"other": b"one"} | ({b"x-request-id": given} if kept else {})]


@pytest.mark.parametrize(
    "line", [b"X-Request-Timeout-Seconds: 0.001", b"x-request-timeout-seconds:0", b"x-request-disconnect-disabled: ?1"]
)
async def test_a_client_cannot_tell_serve_how_to_treat_its_request(line: bytes) -> None:
    told: list[list[tuple[bytes, bytes]]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        told.append(list(scope["headers"]))
        await Response()(scope, receive, send)

    async def ask(protocol: GatewayProtocol, wire: Wire) -> None:
        protocol.data_received(b"GET / HTTP/1.1\r\n" + line + b"\r\nx-request-timeout-ms: 5\r\n\r\n")
        await wire.until(lambda: len(wire.writes) > 0)

    await serve(app, ask)
    assert told == [[(b"x-request-timeout-ms", b"5")]]


@pytest.mark.parametrize("upgrade", ["websocket", "h2c", "WebSocket"])
@pytest.mark.parametrize("body", [b"", b'{"input": "a"}'])
async def test_a_request_to_upgrade_is_answered_as_any_other(upgrade: str, body: bytes) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        message = await scope[RECEIVE]()
        await Response(b"read " + message["body"])(scope, receive, send)

    async def ask(protocol: GatewayProtocol, wire: Wire) -> None:
        head = f"POST / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: {upgrade}\r\ncontent-length: {len(body)}\r\n\r\n"
        whole = head.encode() + body
        for asked, parts in enumerate(([whole], [whole[:30], whole[30:]], [head.encode(), body], [LAST_REQUEST]), 1):
            for part in parts:
                protocol.data_received(part)
            await wire.until(lambda asked=asked: len(wire.writes) >= asked)

    *answers, last, closed = await serve(app, ask)
    assert len(answers) == 3 and last is not None and closed is None
    for answer in answers:
        assert answer is not None and answer.endswith(b"\r\n\r\nread " + body)
    assert last.endswith(b"\r\n\r\nread ")


async def test_many_pipelined_requests_to_upgrade_are_answered() -> None:
    request = b"GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"

    async def ask(protocol: GatewayProtocol, wire: Wire) -> None:
        protocol.data_received(request * 1_500)
        await wire.until(lambda: len(wire.writes) >= 1_500)

    answers = await serve(Response(b"answer"), ask)
    assert len(answers) == 1_500 and set(answers) == {answers[0]}


@pytest.mark.parametrize(
    "request_", [b"FOO / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n\r\n"]
)
async def test_a_request_that_is_not_http_is_refused_in_the_shape_of_every_error(request_: bytes) -> None:
    async def ask(protocol: GatewayProtocol, wire: Wire) -> None:
        protocol.data_received(request_)
        await wire.until(wire.is_closing)

    answer, closed = await serve(Response(b"answer"), ask)
    assert answer is not None and closed is None
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n")
    assert json.loads(content)["error"] == {
        "message": "The request is not valid HTTP.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_http",
    }
