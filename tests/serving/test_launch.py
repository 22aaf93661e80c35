"""The checks before a start, on a machine that others use too; tests/cluster/test_launch.py starts servers."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from deployments.serving import launch, plan, ray_internals
from deployments.serving.ray_internals import HAPROXY_PORTS


@pytest.fixture
def ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> range:
    """The blocks of ports, all of them free and unclaimed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(plan, "_are_free", lambda _: True)
    return plan.GATEWAY_PORTS


def test_a_run_of_ports_is_claimed_once(ports: range) -> None:
    assert [plan._claim_gateway_ports() for _ in range(3)] == list(ports[:3])


def test_a_claim_of_another_user_is_passed_over(ports: range, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ = os.open
    theirs = {f"{tempfile.gettempdir()}/memserve-ports-{first}.lock" for first in ports[:2]}

    def refuse(path: str, *options: Any) -> int:
        if path in theirs:
            raise PermissionError(13, "Permission denied", path)
        return open_(path, *options)

    monkeypatch.setattr(os, "open", refuse)
    assert plan._claim_gateway_ports() == ports[2]
    theirs |= {f"{tempfile.gettempdir()}/memserve-ports-{first}.lock" for first in ports}
    with pytest.raises(plan.CannotStart):
        plan._claim_gateway_ports()


def test_haproxys_ports_move_into_the_claimed_run(ports: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to ports that are free at the moment: Ray may take those before HAProxy starts."""
    names = list(HAPROXY_PORTS)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    first = plan._environment()
    assert [first[name] for name in names] == ["8404", "9101"]
    monkeypatch.setattr(plan, "_are_free", lambda asked: not {8404, 9101} & set(asked))
    second = plan._environment()
    assert [second[name] for name in names] == [str(ports[1] + 98), str(ports[1] + 97)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"applications: \xff", "not YAML: 'utf-8' codec can't decode byte 0xff"),
        (b"applications: [{args: {1: 2}}]", "1: unknown setting"),
        (
            b"applications: [{args: {model: {provider: fake}}, deployments: [{name: Store, user_config: 5}]}]",
            "user_config of Store: must be a mapping",
        ),
        (
            b"{applications: [{args: {model: {provider: fake}}}], http_options: {host: 5}}",
            "http_options.host: 5 is not an address",
        ),
        (
            b'{applications: [{args: {model: {provider: fake}}}], http_options: {host: "a\\0b"}}',
            "http_options.host: 'a\\x00b' is not an address",
        ),
        (
            b"applications: [{args: {model: {provider: fake}}, deployments: "
            b"[{name: Store, user_config: &a {store: *a}}]}]",
            "user_config of Store: is nested without end",
        ),
    ],
)
def test_an_invalid_config_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes, message: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_bytes(text)
    assert launch.serve(config) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"memserve: {config}: {message}")


def config_of(tmp_path: Path, http: str, args: str = "") -> Path:
    config = tmp_path / "config.yaml"
    log = f"sqlite:///{tmp_path}/log.db"
    application = f"{{args: {{model: {{provider: fake}}, store: {{url: '{log}'}}{args}}}}}"
    config.write_text(f"{{applications: [{application}], http_options: {http}}}")
    return config


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "8.8.8.8", "::ffff:8.8.8.8"])
@pytest.mark.parametrize("start", [launch.serve, launch.check])
def test_an_address_that_others_reach_is_refused_with_the_ways_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], start: Callable[[Path], int], host: str
) -> None:
    config = config_of(tmp_path, f"{{host: '{host}'}}")
    assert start(config) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"memserve: {config}: http_options.host: other machines may reach {host!r}, and memserve asks nobody for a "
        "key. Set auth.mode: keys, or listen on 127.0.0.1; or set auth.mode: open if only a server that authenticates "
        "its callers reaches the port"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost", "::1"])
def test_a_loopback_address_is_accepted(tmp_path: Path, host: str) -> None:
    assert launch.check(config_of(tmp_path, f"{{host: '{host}'}}")) == 0


def test_an_open_server_may_have_any_address(tmp_path: Path) -> None:
    assert launch.check(config_of(tmp_path, "{host: 0.0.0.0}", ", auth: {mode: open}")) == 0


def test_the_address_is_a_loopback_address_if_the_config_names_none(tmp_path: Path, ports: range) -> None:
    """Serve would listen on all addresses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = plan.make_plan(config_of(tmp_path, f"{{port: {port}}}"))
    assert (made.host, made.port, made.config["http_options"]) == (
        "127.0.0.1",
        port,
        {"host": "127.0.0.1", "port": port},
    )


@pytest.mark.parametrize(
    ("host", "bind", "url"),
    [
        ("127.0.0.1", "127.0.0.1", "http://127.0.0.1"),
        ("localhost", "localhost", "http://localhost"),
        ("::1", "[::1]", "http://[::1]"),
        ("0.0.0.0", "*", "http://127.0.0.1"),
        ("", "*", "http://127.0.0.1"),
    ],
)
def test_serve_and_the_gateways_are_on_loopback_whatever_the_address_is(
    tmp_path: Path, ports: range, host: str, bind: str, url: str
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = plan.make_plan(config_of(tmp_path, f"{{host: '{host}', port: {port}}}", ", auth: {mode: open}"))
    assert made.config["http_options"] == {"host": "127.0.0.1", "port": port}
    assert (made.env["SERVE_HAPROXY_BIND"], made.url) == (f"{bind}:{port}", f"{url}:{port}")
    assert made.env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"


def test_the_users_own_haproxy_is_kept(tmp_path: Path, ports: range, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "haproxy"
    own.touch(mode=0o755)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(own))
    made = plan.make_plan(config_of(tmp_path, "{}"))
    assert made.env["SERVE_HAPROXY_BINARY"] == str(own)
    assert made.env["RAY_SERVE_HAPROXY_BINARY_PATH"].endswith("haproxy.sh")
    own.unlink()
    with pytest.raises(plan.CannotStart, match="does not point to an executable file"):
        plan.make_plan(config_of(tmp_path, "{}"))


def test_a_certificate_for_serve_is_refused_since_haproxy_would_not_use_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, "{ssl_certfile: cert.pem, ssl_keyfile: key.pem}")
    assert launch.check(config) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"memserve: {config}: http_options.ssl_certfile: HAProxy, which takes the requests, does not use it. Put a "
        "server that terminates TLS in front of memserve (docs/deploy.md)"
    )


TRACEBACK = "Traceback (most recent call last):\n"
FRAMES = '  File "a.py", line 1, in f\n    raise Error(\n    ^^^^^^^^^^^^\n'


@pytest.mark.parametrize(
    ("message", "error"),
    [
        # An error of build_app, as Serve shows it.
        ("Deploying app 'memserve' failed with exception:\nqueue.size: unknown setting", "queue.size: unknown setting"),
        # An error of a constructor: its traceback is the message of another error, and Serve's text surrounds both.
        (
            f"The deployment failed to start 3 times. Error:\n{TRACEBACK}{FRAMES}RuntimeError: {TRACEBACK}{FRAMES}"
            "deployments.errors.ModelUnavailable: There is no model at 'a: b'.\n",
            "There is no model at 'a: b'.",
        ),
        # A cause, and the error that came of it.
        (f"{TRACEBACK}{FRAMES}KeyError: 1\n\nThe above ...:\n\n{TRACEBACK}{FRAMES}ValueError: wrong", "wrong"),
        # A message of several lines: the first.
        (f"{TRACEBACK}{FRAMES}torch.OutOfMemoryError: no memory\nTry this.\n  Or that.\n", "no memory"),
        (f"{TRACEBACK}{FRAMES}AssertionError\n", "AssertionError"),
        # Ray leaves out the header of a traceback that follows its cause.
        (
            f"{TRACEBACK}{FRAMES}KeyError: 1\n\nThe above ...:\n\nray::A.b()\n{FRAMES}a.b.Error: wrong",
            "wrong",
        ),
        (f"{TRACEBACK}{FRAMES}", "no reason given"),
        ("", "no reason given"),
    ],
)
def test_the_reason_of_a_failed_deployment_is_reported_in_one_line(message: str, error: str) -> None:
    assert launch.last_error(message) == error


def test_the_reason_is_that_of_the_deployment_that_has_one() -> None:
    failed = SimpleNamespace(message=f"Error:\n{TRACEBACK}{FRAMES}ValueError: wrong")
    waiting = SimpleNamespace(message="waits for replicas")
    application = SimpleNamespace(message="Failed to update", deployments={"Embedder": failed, "Store": waiting})
    assert launch._reason(application) == "wrong"
    application.deployments = {"Store": waiting}
    assert launch._reason(application) == "Failed to update"


def test_another_ray_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_internals, "CHECKED_WITH", "2.59.3")
    assert launch.serve(Path("serve_config.yaml")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("memserve: memserve needs Ray 2.59.3, and Ray 2.60.0 is installed: run pip install")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"json": {"error": {"message": "Not ready. store: no answer"}}}, "Not ready. store: no answer"),
        ({"text": "Internal Server\nError"}, "Internal Server Error"),
        ({"json": {"error": "no"}}, '{"error":"no"}'),
        ({"json": []}, "[]"),
    ],
)
def test_a_server_that_is_not_ready_is_quoted(answer: dict[str, Any], message: str) -> None:
    assert launch._message(httpx.Response(503, **answer)) == message


def test_rays_token_is_made_once_and_only_its_owner_can_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "elsewhere"))
    launch.make_token()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    launch.make_token()
    token = tmp_path / ".ray" / "auth_token"
    made = token.read_text()
    assert (len(bytes.fromhex(made)), token.stat().st_mode & 0o777) == (32, 0o600)
    launch.make_token()
    assert token.read_text() == made
