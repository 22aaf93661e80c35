"""HAProxy, with the lines that we add to Ray's haproxy.cfg: its own answers, and how it refuses too many requests."""

import asyncio
import contextlib
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import psutil
import pytest

from deployments.errors import HttpError, Overloaded, to_http
from deployments.serving.ray_internals import (
    FEW_OF_A_CALLER,
    MANY_REQUESTS,
    MAX_REQUESTS,
    REFUSES_AFTER_MS,
    local_variables,
)
from tests.serving.haproxy import Gateways, Proxy, check, render, running

GET = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"
BUSY_FOR_LONG = f"var(txn.busy_ms) -m int gt {REFUSES_AFTER_MS}"
CALM_FOR_LONG = f"var(txn.calm_ms) -m int gt {REFUSES_AFTER_MS}"
AT_ONCE = {BUSY_FOR_LONG: "var(txn.busy_ms) -m int ge 0", CALM_FOR_LONG: "var(txn.calm_ms) -m int gt 1000000"}
NEVER = {BUSY_FOR_LONG: "var(txn.busy_ms) -m int gt 1000000"}


def test_haproxy_accepts_the_file(tmp_path: Path) -> None:
    said = check(render(tmp_path))
    assert (said.returncode, "ALERT" in said.stderr) == (0, False)


@contextlib.asynccontextmanager
async def proxied(
    folder: Path, changes: Mapping[str, str] | None = None, gateways: int = 1
) -> AsyncIterator[tuple[Proxy, Gateways]]:
    """HAProxy in front of gateways."""
    async with Gateways().listening(gateways) as behind:
        with running(folder, behind.ports, changes) as proxy:
            yield proxy, behind


def error_of(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, str | None, dict[str, str]]:
    """Status, Retry-After and error of an answer, which must be JSON."""
    status, headers, body = answer
    assert headers["content-type"] == "application/json"
    error = json.loads(body)
    assert list(error) == ["error"]
    assert list(error["error"]) == list(HttpError(0, "", "", None, None, None).body()["error"])
    assert error["error"]["param"] is None
    return status, headers.get("retry-after"), {name: error["error"][name] for name in ("type", "code", "message")}


def listening(process: psutil.Process) -> set[str]:
    """The addresses on which a process listens."""
    return {one.laddr.ip for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("127.0.0.1", {"127.0.0.1"}),
        ("localhost", {"127.0.0.1"}),
        ("127.0.0.2", {"127.0.0.1", "127.0.0.2"}),
        ("::1", {"127.0.0.1", "::1"}),
        ("0.0.0.0", {"127.0.0.1", "0.0.0.0"}),
        ("", {"127.0.0.1", "0.0.0.0"}),
        ("::", {"127.0.0.1", "::"}),
    ],
)
async def test_only_the_port_of_the_server_listens_where_it_is_told_to(
    tmp_path: Path, host: str, addresses: set[str]
) -> None:
    """Gateways and HAProxy's own ports are on 127.0.0.1 whatever the address of the server is."""
    async with Gateways().listening(1) as gateway:
        with running(tmp_path, gateway.ports, bind=host) as proxy:
            assert listening(proxy.process) == addresses
            reader, writer = await asyncio.open_connection({"": "127.0.0.1"}.get(host, host), proxy.port)
            writer.write(GET)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            writer.close()
    assert (tmp_path / "admin.sock").stat().st_mode & 0o777 == 0o600


def test_without_our_script_haproxys_own_ports_are_open_to_all(tmp_path: Path) -> None:
    """If this fails, Ray has changed its haproxy.cfg, and haproxy.sh may not be needed."""
    with running(tmp_path, []) as proxy:
        assert listening(proxy.process) == {"127.0.0.1", "0.0.0.0"}


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("bind :", "bind 0.0.0.0:"),
        ("bind *:", "bind :::"),
        ("frontend http_frontend", "frontend another"),
        ("listen stats", "listen stats_of_haproxy"),
        ("mode 666", "mode 660"),
        ("listen stats", "listen another\n  bind :1\nlisten stats"),
    ],
)
def test_haproxy_does_not_start_if_its_file_is_not_as_expected(tmp_path: Path, line: str, changed: str) -> None:
    path = render(tmp_path)
    text = path.read_text()
    assert line in text
    path.write_text(text.replace(line, changed, 1))
    variables = local_variables("10.0.0.1", 8000, "/bin/true")
    command = [variables["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(path)]
    said = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr) == (1, f"memserve: haproxy.cfg is not as Ray 2.60 writes it: {path}\n")


async def test_requests_pass(tmp_path: Path) -> None:
    async with proxied(tmp_path) as (proxy, gateway):
        status, _, body = await proxy.ask(GET)
        assert (status, body, gateway.paths) == (200, b"ok", ["/v1/models"])


async def test_haproxys_log_holds_no_url_and_no_header(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as syslog:
        syslog.bind(("127.0.0.1", 0))
        target = f"log 127.0.0.1:{syslog.getsockname()[1]} local0"
        with running(tmp_path, [], {"log 127.0.0.1:514 local0": target}) as proxy:
            planted = b"GET /v1/users/u/memories?filter=PLANTED HTTP/1.1\r\nHost: x\r\nX-API-Key: PLANTED\r\n\r\n"
            assert (await proxy.ask(planted))[0] == 503
            syslog.settimeout(20)
            lines = [syslog.recv(8192)]
            while b" 503 " not in lines[-1]:
                lines.append(syslog.recv(8192))
    assert b" GET " in lines[-1]
    assert b"PLANTED" not in b"".join(lines)


async def test_no_gateway_is_503(tmp_path: Path) -> None:
    with running(tmp_path, []) as proxy:
        assert error_of(await proxy.ask(GET)) == (
            503,
            "1",
            {
                "type": "unavailable_error",
                "code": "unavailable",
                "message": "No gateway can be reached; try again later.",
            },
        )


@pytest.mark.parametrize("answer", [b"not HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-len"])
async def test_a_gateway_that_dies_while_it_answers_is_502(tmp_path: Path, answer: bytes) -> None:
    async with proxied(tmp_path) as (proxy, gateway):
        gateway.answer = answer
        assert error_of(await proxy.ask(GET)) == (
            502,
            None,
            {
                "type": "server_error",
                "code": "outcome_unknown",
                "message": "No gateway answered. A write may have been made.",
            },
        )


async def test_a_gateway_that_is_too_slow_is_504(tmp_path: Path) -> None:
    slow = {"timeout client 300s": "timeout client 300s\n    timeout server 50ms"}
    async with proxied(tmp_path, slow) as (proxy, gateway):
        gateway.hold()
        assert error_of(await proxy.ask(GET)) == (
            504,
            None,
            {
                "type": "timeout_error",
                "code": "outcome_unknown",
                "message": "No gateway answered in time. A write may be made.",
            },
        )


async def test_a_body_that_does_not_arrive_is_408(tmp_path: Path) -> None:
    async with proxied(tmp_path, {"timeout http-request 300s": "timeout http-request 50ms"}) as (proxy, _):
        body = b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhalf"
        assert error_of(await proxy.ask(body)) == (
            408,
            None,
            {"type": "timeout_error", "code": "request_timeout", "message": "The request did not arrive in time."},
        )


HALF_A_LARGE_BODY = b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n" + b"x" * 300_000


async def test_a_client_that_stops_within_a_large_body_loses_its_connection(tmp_path: Path) -> None:
    """If a body is larger than HAProxy's buffer, its beginning is sent to a gateway: the request is in progress."""
    async with proxied(tmp_path, {"timeout client 300s": "timeout client 200ms"}) as (proxy, gateway):
        gateway.hold()
        task = await proxy.send(HALF_A_LARGE_BODY)
        await gateway.arrived(1)
        status, _, _ = await asyncio.wait_for(task, 20)
        assert status == 400


async def test_a_client_that_does_not_read_its_answer_loses_its_connection(tmp_path: Path) -> None:
    async with proxied(tmp_path, {"timeout client 300s": "timeout client 200ms"}) as (proxy, gateway):
        size = 32 << 20
        gateway.answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.send(GET)
            await gateway.arrived(1)
            async with asyncio.timeout(20):
                while any(one.raddr == client.getsockname() for one in proxy.process.net_connections("tcp")):  # noqa: ASYNC110
                    await asyncio.sleep(0)


async def test_a_client_that_waits_for_its_answer_keeps_its_connection(tmp_path: Path) -> None:
    """The time within which a client must go on is not that of a slow answer."""
    async with proxied(tmp_path, {"timeout client 300s": "timeout client 100ms"}) as (proxy, gateway):
        gateway.hold()
        slow = await proxy.send(GET)
        await gateway.arrived(1)
        for _ in range(3):  # each takes as long as the time of a client
            stopped = await proxy.send(HALF_A_LARGE_BODY)
            await asyncio.wait_for(stopped, 20)
        assert not slow.done()
        gateway.let_go()
        assert (await asyncio.wait_for(slow, 20))[0] == 200


async def test_headers_that_are_too_large_are_431(tmp_path: Path) -> None:
    async with proxied(tmp_path) as (proxy, gateway):

        def sized(size: int) -> bytes:
            return GET[:-2] + b"x: " + b"a" * (size - len(GET) - 5 + 24) + b"\r\n\r\n"

        assert (await proxy.ask(sized(65_000)))[0] == 200
        for size in (66_000, 100_000, 129_000):
            assert error_of(await proxy.ask(sized(size))) == (
                431,
                None,
                {
                    "type": "invalid_request_error",
                    "code": "headers_too_large",
                    "message": "The headers are larger than 65536 bytes.",
                },
            )
        assert len(gateway.paths) == 1


@pytest.mark.parametrize("sent", [b"not HTTP\r\n\r\n", GET[:-2] + b"x: " + b"a" * 140_000 + b"\r\n\r\n"])
async def test_haproxy_2_8_answers_in_html_if_it_cannot_read_the_request(tmp_path: Path, sent: bytes) -> None:
    """If this fails, HAProxy is a newer one that uses our answer: then the exception leaves the documentation."""
    with running(tmp_path, []) as proxy:
        status, headers, _ = await proxy.ask(sent)
        assert (status, headers["content-type"]) == (400, "text/html")


REFUSED = (
    429,
    "1",
    {"type": "rate_limit_error", "code": "overloaded", "message": "Too many requests; try again later."},
)


def test_haproxy_refuses_as_a_gateway_does() -> None:
    ours = to_http(Overloaded("Too many requests; try again later."))
    assert (ours.status, "1", {"type": ours.type, "code": ours.code, "message": ours.message}) == REFUSED


def with_header(line: str) -> bytes:
    """GET with one more header."""
    return GET[:-2] + line.encode() + b"\r\n\r\n"


async def fill(proxy: Proxy, gateway: Gateways, count: int) -> "list[asyncio.Task[tuple[int, dict[str, str], bytes]]]":
    """Send requests until this many are held by the gateway."""
    tasks = [await proxy.send(GET) for _ in range(count - len(gateway.paths))]
    await gateway.arrived(count)
    return tasks


async def test_requests_are_refused_if_there_have_been_many_for_long(tmp_path: Path) -> None:
    async with proxied(tmp_path, AT_ONCE) as (proxy, gateway):
        gateway.hold()
        waiting = await fill(proxy, gateway, MANY_REQUESTS)
        refused = [await proxy.ask(GET) for _ in range(20)]
        assert [error_of(one) for one in refused] == [REFUSED] * 20
        gateway.let_go()
        assert {status for status, _, _ in await asyncio.gather(*waiting)} == {200}
        assert len(gateway.paths) == MANY_REQUESTS
        assert (await proxy.ask(GET))[0] == 200


@pytest.mark.parametrize("other", ["address", "authorization: Bearer of another caller", "x-api-key: another"])
async def test_a_caller_with_few_requests_is_refused_last(tmp_path: Path, other: str) -> None:
    async with proxied(tmp_path, AT_ONCE) as (proxy, gateway):
        gateway.hold()
        get, address = GET, "127.0.0.2"
        if other != "address":
            get, address = with_header(other), "127.0.0.1"
        waiting = await fill(proxy, gateway, MANY_REQUESTS)
        assert error_of(await proxy.ask(GET)) == REFUSED
        waiting += [await proxy.send(get, address) for _ in range(FEW_OF_A_CALLER)]
        await gateway.arrived(MANY_REQUESTS + FEW_OF_A_CALLER)
        assert error_of(await proxy.ask(get, address)) == REFUSED
        gateway.let_go()
        assert {status for status, _, _ in await asyncio.gather(*waiting)} == {200}


async def test_a_key_is_one_caller_however_its_header_is_written(tmp_path: Path) -> None:
    spelled = ["Bearer K", "bEaReR K", "Token K", "Bearer    K", "bearer K   "]
    ways = [*(f"authorization: {value}" for value in spelled), "x-api-key: K", "X-API-Key:  K "]
    async with proxied(tmp_path, AT_ONCE) as (proxy, gateway):
        gateway.hold()
        await fill(proxy, gateway, MANY_REQUESTS)
        for number in range(FEW_OF_A_CALLER):
            await proxy.send(with_header(ways[number % len(ways)]))
        await gateway.arrived(MANY_REQUESTS + FEW_OF_A_CALLER)
        for way in ways:
            assert error_of(await proxy.ask(with_header(way))) == REFUSED


async def test_too_many_callers_with_few_requests_are_refused_too(tmp_path: Path) -> None:
    async with proxied(tmp_path, AT_ONCE) as (proxy, gateway):
        gateway.hold()
        for number in range(MAX_REQUESTS):
            await proxy.send(GET, f"127.0.1.{number // FEW_OF_A_CALLER}")
        await gateway.arrived(MAX_REQUESTS)
        assert error_of(await proxy.ask(GET, "127.0.2.1")) == REFUSED


async def test_health_is_never_refused(tmp_path: Path) -> None:
    async with proxied(tmp_path, AT_ONCE) as (proxy, gateway):
        gateway.hold()
        await fill(proxy, gateway, MANY_REQUESTS)
        assert error_of(await proxy.ask(GET)) == REFUSED
        for path in (b"/health", b"/health/live", b"/health/ready", b"/ping"):
            assert (await proxy.ask(GET.replace(b"/v1/models", path)))[0] == 200


@pytest.mark.parametrize("path", [b"/healthy", b"/health/", b"/health/live/x", b"/pings"])
async def test_a_path_like_that_of_a_health_check_is_refused(tmp_path: Path, path: bytes) -> None:
    async with proxied(tmp_path, AT_ONCE) as (proxy, gateway):
        gateway.hold()
        await fill(proxy, gateway, MANY_REQUESTS)
        assert error_of(await proxy.ask(GET.replace(b"/v1/models", path))) == REFUSED


async def test_an_address_may_have_few_health_checks_in_progress(tmp_path: Path) -> None:
    async with proxied(tmp_path, NEVER) as (proxy, gateway):
        gateway.hold()
        gateway.holds_health = True
        paths = [b"/health", b"/health/live", b"/health/ready", b"/ping"]
        for number in range(FEW_OF_A_CALLER):
            path = paths[number % len(paths)]
            await proxy.send(with_header(f"authorization: Bearer {number}").replace(b"/v1/models", path))
        await gateway.arrived(FEW_OF_A_CALLER)
        for path in paths:
            assert error_of(await proxy.ask(GET.replace(b"/v1/models", path))) == REFUSED
        gateway.holds_health = False
        assert (await proxy.ask(GET.replace(b"/v1/models", b"/health"), "127.0.0.2"))[0] == 200
        gateway.let_go()
        assert (await proxy.ask(GET))[0] == 200


async def test_a_burst_is_admitted_up_to_the_hard_limit(tmp_path: Path) -> None:
    async with proxied(tmp_path, NEVER) as (proxy, gateway):
        gateway.hold()
        waiting = await fill(proxy, gateway, MAX_REQUESTS)
        assert error_of(await proxy.ask(GET)) == REFUSED
        gateway.let_go()
        assert {status for status, _, _ in await asyncio.gather(*waiting)} == {200}


@pytest.mark.parametrize(("pause_ms", "still"), [(1_000_000, "1"), (0, "0")])
async def test_it_refuses_until_there_have_been_few_for_long(tmp_path: Path, pause_ms: int, still: str) -> None:
    server = "default-server inter 5s check"
    changes = {
        BUSY_FOR_LONG: "var(txn.busy_ms) -m int gt 0",
        CALM_FOR_LONG: f"var(txn.calm_ms) -m int gt {pause_ms}",
        server: f"http-response set-header refuses %[var(proc.refuses)]\n    {server}",
    }
    async with proxied(tmp_path, changes) as (proxy, gateway):
        gateway.hold()
        waiting = await fill(proxy, gateway, MANY_REQUESTS)
        gateway.let_go()
        await asyncio.gather(*waiting)
        _, headers, _ = await proxy.ask(GET)
        assert headers["refuses"] == still


async def test_the_limit_is_for_each_gateway(tmp_path: Path) -> None:
    async with proxied(tmp_path, AT_ONCE, gateways=2) as (proxy, gateways):
        gateways.hold()
        waiting = await fill(proxy, gateways, 2 * MANY_REQUESTS + 1)  # HAProxy rounds down
        assert error_of(await proxy.ask(GET)) == REFUSED
        gateways.let_go()
        assert {status for status, _, _ in await asyncio.gather(*waiting)} == {200}
