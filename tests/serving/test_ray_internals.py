"""The installed Ray still is as deployments/serving/ray_internals.py says. Starts nothing; takes milliseconds."""

import importlib
import importlib.metadata
import inspect
import os
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn.config
from ray import serve
from ray._private import ray_constants, services, worker
from ray.dashboard import agent
from ray.dashboard.modules.reporter import reporter_agent
from ray.serve._private import client, constants, constants_utils, controller, haproxy, http_util, replica
from ray.serve._private.common import TimeStampedValue
from ray.serve.config import AutoscalingContext, HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deployments.app import build_app
from deployments.embedder import Embedder
from deployments.gateway import Gateway
from deployments.requests.origin import HEADER
from deployments.serving import launch, ray_internals
from deployments.serving.ray_internals import ENVIRONMENT, HAPROXY_PORTS, HOOKS, gateway_port_variables, wrong_ray
from deployments.store import StoreReplica
from tests.serving.haproxy import options, render


@pytest.mark.parametrize(
    ("installed", "accepted"),
    [("2.60.0", True), ("2.60.7", True), ("2.61.0", False), ("2.6.0", False), ("3.60.0", False)],
)
def test_only_the_series_that_was_checked_is_accepted(
    installed: str, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: installed)
    assert (wrong_ray() is None) == accepted


def test_build_app_refuses_another_ray_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong_ray() is None
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.61.0")
    with pytest.raises(RayServeException) as refused:
        build_app({})
    assert str(refused.value) == (
        "memserve needs Ray 2.60.0, and Ray 2.61.0 is installed: "
        'run pip install "ray[serve]~=2.60.0" in this environment'
    )


def test_ray_knows_every_variable() -> None:
    named = {*ENVIRONMENT, *HAPROXY_PORTS, *gateway_port_variables(30_000, 30_099)}
    source = inspect.getsource(constants)
    assert [name for name in sorted(named) if f'"{name}"' not in source] == []
    for name, port in HAPROXY_PORTS.items():
        assert getattr(constants, name) == port
    assert not named & set(constants_utils._fully_deprecated_env_vars)


def test_haproxy_cfg_holds_each_of_our_lines_once(tmp_path: Path) -> None:
    lines = [line.strip() for line in render(tmp_path).read_text().splitlines()]
    defaults = lines[lines.index("defaults") : lines.index("frontend prometheus")]
    retry_on, *in_defaults = (line.strip() for line in ENVIRONMENT["RAY_SERVE_HAPROXY_RETRY_ON"].splitlines())
    balance, *answers = (line.strip() for line in ENVIRONMENT["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"].splitlines())
    inter, *rules = (line.strip() for line in ENVIRONMENT["RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER"].splitlines())
    assert (retry_on, balance, inter) == ("conn-failure empty-response", "leastconn", "5s")
    assert in_defaults == [
        "option http-buffer-request",
        "option redispatch 2",
        "option dontlog-normal",
        'log-format "%ci:%cp [%tr] %ft %b/%s %TR/%Tw/%Tc/%Tr/%Ta %ST %B %tsc %ac/%fc/%bc/%sc/%rc %sq/%bq %HM %ID"',
        "unique-id-format %[date(0,us)]-%[uuid]",
        f"unique-id-header {HEADER}",
        "timeout http-request 300s",
    ]
    for line in (f"retry-on {retry_on}", *in_defaults, "retries 6", f"balance {balance}", *answers):
        assert (defaults.count(line), lines.count(line)) == (1, 1), line
    # The last of two wins: Ray's own lines come before ours.
    assert defaults.index("option redispatch 1") < defaults.index("option redispatch 2")
    assert [line.split()[2] for line in answers] == ["400", "408", "500", "501", "502", "503", "504"]
    errorfiles = [number for number, line in enumerate(defaults) if line.startswith("errorfile")]
    assert max(errorfiles) < defaults.index(answers[0])
    assert lines.count("tune.bufsize 131072") == 1
    assert [line for line in lines if line.startswith("unique-id")] == in_defaults[4:6]

    backend = lines[lines.index("backend memserve") :]
    *rules, server = rules
    for line in rules:
        assert (backend.count(line), lines.count(line)) == (1, 1), line
    assert [line for line in backend if line.startswith("default-server")] == [
        "default-server fastinter 250ms downinter 250ms fall 2 rise 2 inter 5s",
        f"{server} check",
    ]
    assert server == "default-server inter 5s"


def test_haproxy_takes_these_values_from_the_variables() -> None:
    fields = {
        "retry_on": constants.RAY_SERVE_HAPROXY_RETRY_ON,
        "retries": constants.RAY_SERVE_HAPROXY_RETRIES,
        "bufsize": constants.RAY_SERVE_HAPROXY_TUNE_BUFSIZE,
        "balance_algorithm": constants.RAY_SERVE_HAPROXY_BALANCE_ALGORITHM,
        "health_check_inter": constants.RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER,
        "timeout_client_s": constants.RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S,
        "metrics_enabled": constants.RAY_SERVE_HAPROXY_METRICS_ENABLED,
    }
    assert {name: getattr(haproxy.HAProxyConfig(), name) for name in fields} == fields
    assert set(options()) == set(fields)


def test_a_config_file_can_be_deployed_to_the_serve_that_runs() -> None:
    assert {"proxy_location", "http_options", "logging_config"} <= set(inspect.signature(serve.start).parameters)
    assert callable(_get_global_client)
    assert list(inspect.signature(client.ServeControllerClient.deploy_apps).parameters) == [
        "self",
        "config",
        "_blocking",
    ]
    assert {"proxy_location", "http_options", "logging_config", "applications"} <= set(ServeDeploySchema.model_fields)


def test_serve_starts_uvicorn_with_the_protocol_of_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    ray_internals.use_http_protocol("uvicorn.protocols.http.httptools_impl:HttpToolsProtocol")
    config = uvicorn.Config(lambda: None, log_config=None)
    config.load()
    assert config.http_protocol_class is HttpToolsProtocol
    assert "http=" not in inspect.getsource(http_util.start_asgi_http_server)  # else Serve would choose another


def test_serve_obeys_the_last_disconnect_header() -> None:
    name, value = ray_internals.DO_NOT_WATCH
    assert name.decode() == constants.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER
    assert http_util.parse_disconnect_disabled_header(dict([(name, b"?0"), (name, value)]))
    assert not http_util.parse_disconnect_disabled_header({})


def test_serve_obeys_these_headers_of_a_client() -> None:
    timeout, watch = (name.decode() for name in ray_internals.HEADERS_FOR_SERVE)
    assert timeout == constants.SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER
    assert watch == constants.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER
    assert http_util.parse_request_timeout_header({timeout.encode(): b"0.5"}, None) == 0.5


def test_serve_waits_for_the_disconnect_with_the_receive_that_it_is_given() -> None:
    source = " ".join(inspect.getsource(replica.Replica._direct_ingress_asgi).split())
    assert "_call_http_entrypoint( user_method_info, scope, receive_proxy, send_user_message )" in source
    assert "elif receive_task in done: request_task.cancel()" in source


def test_the_router_takes_our_options() -> None:
    module, _, name = ray_internals.CONSISTENT_HASH_ROUTER.rpartition(".")
    router = getattr(importlib.import_module(module), name)
    for option in ray_internals.CONSISTENT_HASH_OPTIONS:
        made = object.__new__(router)
        with pytest.raises(ValueError, match=option):  # it ignores options that it does not know
            made.initialize_state(**{option: "wrong"})
    assert "session_id" in inspect.signature(DeploymentHandle.options).parameters


def test_an_application_may_have_a_policy_and_contexts_have_what_ours_reads() -> None:
    assert "autoscaling_policy" in ServeApplicationSchema.model_fields
    given = set(inspect.signature(AutoscalingContext).parameters)
    assert set(ray_internals.AUTOSCALING_CONTEXT) <= given


class Controller:
    """Stands for the handle of Serve's controller; knows one deployment."""

    def __init__(self) -> None:
        self._get_total_num_requests_for_deployment_for_testing = self._method({"Gateway": 3.5})
        metrics = {
            "waiting_tokens": [
                [TimeStampedValue(1.0, 5.0), TimeStampedValue(2.0, 7.0)],
                [],
                [TimeStampedValue(2.0, 4.0)],
            ]
        }
        self._get_metrics_for_deployment_for_testing = self._method({"Gateway": metrics})

    @staticmethod
    def _method(answers: dict[str, Any]) -> Any:
        return SimpleNamespace(remote=lambda one: answers[one.name] if one.app_name == "memserve" else None)


def test_the_controller_tells_what_the_policies_see(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in vars(Controller()):
        assert list(inspect.signature(getattr(controller.ServeController, method)).parameters) == [
            "self",
            "deployment_id",
        ]
    client_of = SimpleNamespace(_controller=Controller())
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: client_of)
    monkeypatch.setattr("ray.get", lambda answer: answer)
    assert ray_internals.requests_in_progress("memserve", "Gateway") == 3.5
    assert ray_internals.newest_figure("memserve", "Gateway", "waiting_tokens") == 11.0
    assert ray_internals.newest_figure("memserve", "Gateway", "no such figure") == 0.0
    assert ray_internals.newest_figure("another", "Gateway", "waiting_tokens") == 0.0


def test_serve_calls_the_hooks_by_these_names() -> None:
    assert constants.RECONFIGURE_METHOD in HOOKS
    assert constants.HEALTH_CHECK_METHOD in HOOKS
    assert replica.SERVE_BUILD_ASGI_APP_METHOD in HOOKS
    assert 'self._callable, "record_autoscaling_stats"' in inspect.getsource(replica)
    defined = {name for name in HOOKS for cls in (Gateway, Embedder, StoreReplica) if name in vars(cls)}
    assert defined == set(HOOKS)


def test_haproxy_is_in_front_if_serve_was_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    assert not ray_internals.haproxy_is_in_front()
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert ray_internals.haproxy_is_in_front()


def test_a_shell_takes_the_environment_as_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.print_environment() == 0
    printed = capsys.readouterr().out
    for name, value in ENVIRONMENT.items():
        script = f'{printed}printf %s "${name}"'
        assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout == value
    assert shlex.split(printed.splitlines()[0])[0] == "export"


def test_a_local_ray_has_a_loopback_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_global_node", None)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    assert services.get_node_ip_address() == ray_internals.LOOPBACK
    (name,) = ray_internals.ON_LOOPBACK
    assert name == ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    source = inspect.getsource(reporter_agent) + inspect.getsource(agent)
    assert source.count("get_localhost_ip() if is_localhost(self._ip) else") == 1  # the metrics exporter
    assert source.count("get_localhost_ip() if is_localhost(self.ip) else") == 1  # the agent


@pytest.mark.parametrize(("node", "listens"), [("127.0.0.1", "127.0.0.1:0"), ("192.0.2.2", "[::]:0")])
def test_a_replica_listens_for_calls_on_the_loopback_address_of_its_node(
    node: str, listens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(replica, "add_port_to_grpc_server", lambda _, address: asked.append(address))
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: node)
    ray_internals.listen_for_calls_on_loopback()
    replica.add_port_to_grpc_server(None, "[::]:0")
    assert asked == [listens]
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in inspect.getsource(replica)


def test_serve_starts_the_program_that_is_to_be_haproxy() -> None:
    variables = ray_internals.local_variables("127.0.0.1", 8000, "/usr/sbin/haproxy")
    assert constants.get_env_str("RAY_SERVE_HAPROXY_BINARY_PATH", "") == constants.RAY_SERVE_HAPROXY_BINARY_PATH
    script = Path(variables["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert os.access(script, os.X_OK)
    assert "RAY_SERVE_HAPROXY_BINARY_PATH" in inspect.getsource(haproxy.get_haproxy_binary)


def test_the_controller_knows_the_address_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for host, found in (("0.0.0.0", "0.0.0.0"), (None, "")):
        asked = SimpleNamespace(remote=lambda host=host: SimpleNamespace(host=host))
        client_of = SimpleNamespace(_controller=SimpleNamespace(get_http_config=asked))
        monkeypatch.setattr("ray.serve.context._get_global_client", lambda client_of=client_of: client_of)
        monkeypatch.setattr("ray.get", lambda answer: answer)
        assert ray_internals.http_host() == found
    assert "host" in HTTPOptions.model_fields
    assert hasattr(controller.ServeController, "get_http_config")
