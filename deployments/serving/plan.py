"""What a start will do, decided and checked before anything is started.

A plan is a config file that has been read and checked, and what it needs of this machine: an address to listen on, free
ports, a folder for the data. Whatever is wrong is one line (`CannotStart`). The checks cannot cover what only starting
shows, for instance a model whose weights are damaged.
"""

import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from deployments.embedding.load import resolve
from deployments.errors import MemserveError
from deployments.serving.ray_internals import ENVIRONMENT, HAPROXY_PORTS, gateway_port_variables, wrong_ray
from deployments.settings import (
    RELOADABLE,
    ModelSettings,
    Settings,
    absolute_log_url,
    first_problem,
    load,
    with_user_config,
)

# Each server on this machine claims a run of 100 ports.
GATEWAY_PORTS = range(30_000, 32_000, 100)


class CannotStart(Exception):
    """The reason, in one line."""


class Plan(NamedTuple):
    """What is to be served.

    Attributes:
        config: the config file as it was read.
        data: where the memories lie: a path, or a database URL without its password.
        env: variables to set before Ray starts.
    """

    config: dict[str, Any]
    settings: Settings
    host: str
    port: int
    data: str
    env: dict[str, str]


def make_plan(path: Path) -> Plan:
    """Read and check a config file and what it needs of this machine. Makes the data folder. Raises CannotStart."""
    config, settings = read_config(path)
    http = dict(config.get("http_options") or {})
    host, port = http.get("host", "127.0.0.1"), http.get("port", 8000)
    if not isinstance(host, str):
        raise CannotStart(f"{path}: http_options.host: {host!r} is not an address")
    if not isinstance(port, int) or not 0 < port < 65_536:
        raise CannotStart(f"{path}: http_options.port: {port!r} is not a port")
    if (reason := _cannot_listen(host, port)) is not None:
        taken = reason.errno == errno.EADDRINUSE
        problem = "is taken by another process" if taken else f"cannot be listened on: {reason.strerror}"
        raise CannotStart(f"{host}:{port} {problem} (http_options in {path})")
    return Plan(config, settings, host, port, _prepare_data(settings.store.url), _environment())


def read_config(path: Path) -> tuple[dict[str, Any], Settings]:
    """Read a config file and check it, the installed Ray and the model. Raises CannotStart."""
    if (reason := wrong_ray()) is not None:
        raise CannotStart(reason)
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
        raise CannotStart(f"{path}: {first_problem(error)}") from error
    except MemserveError as error:
        raise CannotStart(str(error)) from error
    for name, user_config in user_configs.items():
        try:
            with_user_config(settings, name, user_config)
        except KeyError as error:
            known = ", ".join(sorted(RELOADABLE))
            raise CannotStart(f"{path}: deployments: there is no {name!r}, only {known}") from error
        except ValueError as error:
            raise CannotStart(f"{path}: {error}") from error
    return config, settings


def _check_model(model: ModelSettings) -> None:
    """Refuse a local model that is not there, before replicas try to load it. Raises CannotStart, ModelUnavailable."""
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
        raise CannotStart(
            f"model.name: {path!r} is not a folder, and no hub model of that name can be fetched: {reason}"
        ) from error


def _cannot_listen(host: str, port: int) -> OSError | None:
    """The error that prevents listening on a port; None if there is none."""
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
    """Variables to set before Ray starts. A variable that the user has set keeps its value.

    If HAProxy's default ports are taken, it gets ports from the end of the claimed run; Serve gives ports to gateways
    from its beginning. A port that is free now in the kernel's ephemeral range would not do: Ray may have taken it by
    the time HAProxy starts.
    """
    first = _claim_gateway_ports()
    last = first + GATEWAY_PORTS.step - 1
    env = {**ENVIRONMENT, "RAY_USAGE_STATS_ENABLED": "0", **gateway_port_variables(first, last)}
    for before_last, (name, port) in enumerate(HAPROXY_PORTS.items(), start=1):
        env[name] = str(port if _are_free([port]) else last - before_last)
    return {name: os.environ.get(name, value) for name, value in env.items()}


def _claim_gateway_ports() -> int:
    """Claim a run of ports that no other server on this machine uses, until this process ends. Returns its first."""
    for first in GATEWAY_PORTS:
        try:
            lock = os.open(f"{tempfile.gettempdir()}/memserve-ports-{first}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # claimed by another user of this machine
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        if _are_free(range(first, first + GATEWAY_PORTS.step)):
            return first  # the descriptor stays open, which keeps the claim
        os.close(lock)
    raise CannotStart(f"no free run of ports between {GATEWAY_PORTS.start} and {GATEWAY_PORTS.stop}")


def _prepare_data(url: str) -> str:
    """Make the folder of a SQLite log. Returns where the data lies, without a password. Raises CannotStart."""
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
