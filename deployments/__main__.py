"""`python -m deployments [serve_config.yaml]`: Ray, HAProxy and the app on this machine, in the foreground.

Guarantees: one line when the server answers; one line and exit 1, within seconds, when it cannot start; and when it
ends, by Ctrl-C, by a signal or by an error, every process that it started has ended too.

Two processes see to the last: the supervisor only waits, and ends what is left when the server process is gone, even by
kill -9; the server process is told by the kernel when the supervisor dies. Both are subreapers (prctl(2)), so that a
daemon which detached itself, as HAProxy does on a reload, is still theirs to find.
"""

import argparse
import ctypes
import errno
import fcntl
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import psutil
import yaml
from pydantic import ValidationError

from deployments.embedding.load import resolve
from deployments.errors import MemserveError
from deployments.serving.environment import CONTROLLER_CALLBACK, ENVIRONMENT
from deployments.settings import LIVE, ModelSettings, Settings, absolute_log_url, explain, live, load

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
READY_WITHIN_S = 300.0
TERMINATE_WITHIN_S = 5.0
OBJECT_STORE_BYTES = 256 * 1024**2
HAPROXY_PORTS = {"RAY_SERVE_HAPROXY_STATS_PORT": 8404, "RAY_SERVE_HAPROXY_METRICS_PORT": 9101}
# Behind HAProxy gateways listen from 30000 up, Serve's own proxy (the fallback) on 8500, and all of them share a port
# that is taken (SO_REUSEPORT): a second server on this machine needs ports of its own, or it answers for the first.
GATEWAY_PORTS = range(30_000, 32_000, 100)
GRPC_OFFSET = 10_000


class CannotStart(Exception):
    """The reason, in one line."""


class Plan(NamedTuple):
    """What is to be served, checked as far as that is possible without starting anything."""

    config: dict[str, Any]
    settings: Settings
    host: str
    port: int
    data: str
    env: dict[str, str]


def main(argv: list[str]) -> int:
    """Run until a signal. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deployments", description="Serve memserve on this machine.")
    parser.add_argument("config", nargs="?", default="serve_config.yaml", help="a Serve config file")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="only say whether the config file is right")
    only.add_argument(
        "--environment", action="store_true", help="only print what a shell that starts Ray needs: `eval` it"
    )
    arguments = parser.parse_args(argv)
    if arguments.environment:
        _print_environment()
        return 0
    path = Path(arguments.config)
    try:
        if arguments.check:
            read_config(path)
            print(f"{path} is right")
            return 0
        plan = make_plan(path)
    except CannotStart as reason:
        print(f"memserve: {reason}", file=sys.stderr)
        return 1
    return supervise(lambda: serve_until_signalled(plan))


def _print_environment() -> None:
    environment = dict(ENVIRONMENT)
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('deployments.serving.controller') is None)"
    if subprocess.run([sys.executable, "-P", "-c", find], cwd="/", stderr=subprocess.DEVNULL, check=False).returncode:
        del environment[CONTROLLER_CALLBACK]
        print(
            "memserve is not installed here: `serve status` will not say what is wrong in `user_config`",
            file=sys.stderr,
        )
    print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items()))


def make_plan(path: Path) -> Plan:
    """Read and check a config file, and what it needs of this machine. Raises CannotStart."""
    config, settings = read_config(path)
    http = dict(config.get("http_options") or {})
    host, port = http.get("host", "127.0.0.1"), http.get("port", 8000)
    if not isinstance(host, str):
        raise CannotStart(f"{path}: http_options.host: {host!r} is no address")
    if not isinstance(port, int) or not 0 < port < 65_536:
        raise CannotStart(f"{path}: http_options.port: {port!r} is no port")
    if (reason := _cannot_listen(host, port)) is not None:
        taken = reason.errno == errno.EADDRINUSE
        what = "is taken by another process" if taken else f"cannot be listened on: {reason.strerror}"
        raise CannotStart(f"{host}:{port} {what} (http_options in {path})")
    return Plan(config, settings, host, port, _prepare_data(settings.store.url), _environment())


def read_config(path: Path) -> tuple[dict[str, Any], Settings]:
    """A config file, checked. Raises CannotStart."""
    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        raise CannotStart(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CannotStart(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        (application,) = config["applications"]
        args = dict(application.get("args") or {})
        dict(config.get("http_options") or {})
        user_configs = {one["name"]: one.get("user_config") for one in application.get("deployments") or []}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CannotStart(
            f"{path}: needs exactly one entry under `applications:`, and mappings under its `args:` and `http_options:`"
        ) from error
    try:
        settings = load(args)
        _check_model(settings.model)
    except ValidationError as error:
        raise CannotStart(f"{path}: {explain(error)}") from error
    except MemserveError as error:
        raise CannotStart(str(error)) from error
    for name, user_config in user_configs.items():
        try:
            live(settings, name, user_config)
        except KeyError as error:
            raise CannotStart(f"{path}: deployments: there is no {name!r}, only {', '.join(sorted(LIVE))}") from error
        except ValueError as error:
            raise CannotStart(f"{path}: {error}") from error
    return config, settings


def _check_model(model: ModelSettings) -> None:
    """Raises CannotStart or ModelUnavailable for a local model that is not there, before a replica spends its time."""
    if model.provider != "local":
        return
    path = resolve(model.name)
    if Path(path).is_dir():
        if not any((Path(path) / name).is_file() for name in ("modules.json", "config.json")):
            raise CannotStart(f"model.name: the folder {path!r} holds no model (no modules.json, no config.json)")
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        hf_hub_download(path, "config.json", local_files_only=not model.allow_download, etag_timeout=5.0)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CannotStart(f"model.name: {path!r} is no folder, and no hub model that can be had: {reason}") from error


def _cannot_listen(host: str, port: int) -> OSError | None:
    """Why a port cannot be listened on; None where it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def _are_free(ports: Iterable[int]) -> bool:
    return all(_cannot_listen("", port) is None for port in ports)


def _environment() -> dict[str, str]:
    """What must stand in the environment before Ray starts. HAProxy's own ports move aside if they are taken.

    They move to the end of the claimed run, from whose beginning Serve gives ports to gateways: what is free now in the
    range that the kernel gives out may be one of Ray's own when HAProxy starts.
    """
    env = {**ENVIRONMENT, "RAY_USAGE_STATS_ENABLED": "0"}
    first = _claim_gateway_ports()
    last = first + GATEWAY_PORTS.step - 1
    for protocol, offset in (("HTTP", 0), ("GRPC", GRPC_OFFSET)):
        env[f"RAY_SERVE_DIRECT_INGRESS_MIN_{protocol}_PORT"] = str(first + offset)
        env[f"RAY_SERVE_DIRECT_INGRESS_MAX_{protocol}_PORT"] = str(last + offset)
        env[f"RAY_SERVE_FALLBACK_PROXY_{protocol}_PORT"] = str(last + offset)
    for before_last, (name, port) in enumerate(HAPROXY_PORTS.items(), start=1):
        env[name] = str(port if _are_free([port]) else last - before_last)
    # What the user set wins.
    return {name: os.environ.get(name, value) for name, value in env.items()}


def _claim_gateway_ports() -> int:
    """The first of a run of ports that no other server here uses; claimed until this server ends."""
    for first in GATEWAY_PORTS:
        try:
            lock = os.open(f"{tempfile.gettempdir()}/memserve-ports-{first}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # the claim of another user of this machine
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        if _are_free(range(first, first + GATEWAY_PORTS.step)):
            return first  # the descriptor stays open, and with it the claim
        os.close(lock)
    raise CannotStart(f"no free run of ports between {GATEWAY_PORTS.start} and {GATEWAY_PORTS.stop}")


def _prepare_data(url: str) -> str:
    """Make the directory of a SQLite log. Returns where the data lies, without a password."""
    url = absolute_log_url(url, Path.cwd())
    prefix = "sqlite:///"
    if not url.startswith(prefix):
        scheme, _, rest = url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
    path = Path(url.removeprefix(prefix))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotStart(f"store.url: cannot make {path.parent}: {error.strerror}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CannotStart(f"store.url: {path} is not writable")
    return str(path)


def supervise(serve: Callable[[], int]) -> int:
    """Run `serve` in a process of its own, pass signals on to it, and end whatever it leaves."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    supervisor = os.getpid()
    child = os.fork()
    if child == 0:
        os.setsid()  # the terminal's Ctrl-C reaches the supervisor alone
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != supervisor:
            os._exit(1)
        status = 1
        try:
            status = serve()
        except BaseException:  # noqa: BLE001 - the last frame of this process: said here or nowhere
            traceback.print_exc()
        finally:
            end_descendants()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def pass_on(_: int, __: FrameType | None) -> None:
        if psutil.pid_exists(child):
            os.kill(child, signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    _, result = os.waitpid(child, 0)
    end_descendants()
    return os.waitstatus_to_exitcode(result) if os.WIFEXITED(result) else 1


def end_descendants() -> None:
    """End every process below this one: ask, wait, then force."""
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            _signal(process, signal.SIGTERM)
        _, alive = psutil.wait_procs(descendants, timeout=TERMINATE_WITHIN_S)
        for process in alive:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=TERMINATE_WITHIN_S)


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


class _Stop(BaseException):
    """A signal asked for the end."""


def _stop(_: int, __: FrameType | None) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise _Stop


def _stop_on_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def serve_until_signalled(plan: Plan) -> int:
    """Start Ray and the app, say when it answers, and shut both down on SIGTERM. Returns the exit status."""
    _stop_on_signals()
    os.environ.update(plan.env)
    try:
        try:
            ready = _start(plan)
            url = f"http://{plan.host}:{plan.port}"
            where = f"{ready['model']} on {ready['device']} ({ready['dtype']})"
            print(f"memserve is ready: {url}  model {where}  data {plan.data}", flush=True)
            while True:
                signal.pause()
        except CannotStart as reason:
            print(f"memserve: {reason}", file=sys.stderr)
            return 1
        finally:
            _shut_down()
    except _Stop:
        return 0


def _start(plan: Plan) -> dict[str, str]:
    """Start Ray, deploy, and wait until /health/ready answers 200. Returns its body. Raises CannotStart."""
    import ray
    from ray.serve._private.api import serve_start
    from ray.serve.schema import ServeDeploySchema

    try:
        config = ServeDeploySchema.model_validate(plan.config)
    except ValidationError as error:
        raise CannotStart(explain(error)) from error
    # In the environment, not in a runtime_env: only so can Ray start workers before they are asked for.
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *_python_path()])
    ray.init(
        address="local",
        namespace="serve",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=OBJECT_STORE_BYTES,
    )
    _stop_on_signals()  # ray.init installs a handler of its own that ends the process at once
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    client = serve_start(
        http_options=config.http_options.model_dump(),
        proxy_location=config.proxy_location,
        global_logging_config=config.logging_config,
    )
    client.deploy_apps(config, _blocking=False)
    return _wait_until_ready(plan, config.applications[0].name)


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _wait_until_ready(plan: Plan, app_name: str) -> dict[str, str]:
    import httpx
    from ray import serve

    deadline = time.monotonic() + READY_WITHIN_S
    last = "no answer yet"
    with httpx.Client(base_url=f"http://{plan.host}:{plan.port}", timeout=10.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            application = serve.status().applications.get(app_name)
            if application is not None and application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise CannotStart(_reason(application))
            try:
                answer = client.get("/health/ready")
                if answer.status_code == 200:
                    body: dict[str, str] = answer.json()
                    return body
                last = f"/health/ready answered {answer.status_code}"
            except httpx.TransportError as error:
                last = f"{type(error).__name__} from {plan.host}:{plan.port}"
            time.sleep(0.1)
    raise CannotStart(f"not ready within {READY_WITHIN_S:g} s: {last}")


_ERROR_LINE = re.compile(r"((\w+\.)+[A-Z]\w*|\w+(Error|Exception)): ")


def _reason(application: Any) -> str:
    """The line of a failed deployment's message that names the error: the last one of its traceback."""
    messages = [application.message, *(deployment.message for deployment in application.deployments.values())]
    for message in reversed(messages):
        # A traceback's frames are indented; the line that is not, and begins with an exception's name, is the error.
        lines = [line for line in message.splitlines() if _ERROR_LINE.match(line)]
        if lines:
            return _ERROR_LINE.sub("", lines[-1])
    return " ".join(application.message.split())


def _shut_down() -> None:
    import ray
    from ray import serve

    if not ray.is_initialized():
        return
    # Ray's threads report the end of Serve's controller, which was asked for, as an error, and may do so late: nothing
    # that this process says from here on is news, but for a shutdown that fails.
    stderr = os.dup(sys.stderr.fileno())
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(nowhere, stream.fileno())
    try:
        serve.shutdown()
        ray.shutdown()
    except BaseException:
        os.dup2(stderr, sys.stderr.fileno())
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
