"""Ray, HAProxy and the application on this machine, in the foreground: start, wait until ready, stop.

Guarantees one line on standard output when the server answers, and one line on standard error and exit status 1 if it
cannot start. deployments/serving/processes.py makes sure that no process outlives the server.
"""

import logging
import os
import secrets
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import httpx
from pydantic import ValidationError

from deployments.serving import memory, ray_internals
from deployments.serving.plan import CannotStart, Plan, make_plan, read_config
from deployments.serving.processes import supervise
from deployments.settings import first_problem

READY_WITHIN_S = 300.0
OBJECT_STORE_BYTES = 256 * 1024**2
FRAME = '\n  File "'  # how each frame of a traceback begins


def default_config() -> Path:
    """./serve_config.yaml if there is one, else the config file that comes with memserve."""
    own = Path("serve_config.yaml")
    return own if own.exists() else Path(__file__).parents[1] / "serve_config.yaml"


def serve(config: Path) -> int:
    """Serve a config file in the foreground until a signal. Returns the exit status: 0 after a signal, else 1."""
    try:
        plan = make_plan(config)
    except CannotStart as reason:
        return _refuse(reason)
    return supervise(lambda: serve_until_signalled(plan))


def check(config: Path) -> int:
    """Check a config file and start nothing. Returns the exit status: 0 if `serve` would accept it, else 1."""
    try:
        read_config(config)
    except CannotStart as reason:
        return _refuse(reason)
    print(f"{config} is valid")
    return 0


def print_environment() -> int:
    """Print the variables that a shell that starts Ray needs, as `export` commands. Returns the exit status, 0."""
    variables = {**ray_internals.ENVIRONMENT, **memory.VARIABLES}
    print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()))
    return 0


def _refuse(reason: CannotStart) -> int:
    print(f"memserve: {reason}", file=sys.stderr)
    return 1


class _Stop(BaseException):
    """A signal asked this process to end."""


def _stop(_: int, __: FrameType | None) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise _Stop


def _stop_on_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def serve_until_signalled(plan: Plan) -> int:
    """Start Ray and the application, print one line when it answers, and stop both on SIGTERM or SIGINT.

    Returns:
        the exit status: 0 after a signal, 1 if it cannot start.
    """
    _stop_on_signals()
    os.environ.update(plan.env)
    try:
        try:
            ready = _start(plan)
            model = f"{ready['model']} on {ready['device']} ({ready['dtype']})"
            print(f"memserve is ready: {plan.url}  model {model}  data {plan.data}", flush=True)
            while True:
                signal.pause()
        except CannotStart as reason:
            return _refuse(reason)
        finally:
            _shut_down()
    except _Stop:
        return 0


def _start(plan: Plan) -> dict[str, str]:
    """Start Ray, deploy, and wait until /health/ready answers 200. Returns its body. Raises CannotStart."""
    import ray
    from ray import serve as ray_serve
    from ray.serve.schema import ServeDeploySchema

    try:
        config = ServeDeploySchema.model_validate(plan.config)
    except ValidationError as error:
        raise CannotStart(first_problem(error)) from error
    # In the environment, not in a runtime_env: with a runtime_env Ray cannot start workers before they are needed.
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *_python_path()])
    make_token()
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
    ray_serve.start(
        http_options=config.http_options.model_dump(),
        proxy_location=config.proxy_location,
        logging_config=config.logging_config,
    )
    ray_internals.deploy(config)
    return _wait_until_ready(plan, config.applications[0].name)


def make_token() -> None:
    """Make the token of this account's Ray clusters if there is none.

    Ray would make it itself, but readable by every account of the machine, and whoever reads it can run code.
    """
    if any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with open(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _wait_until_ready(plan: Plan, app_name: str) -> dict[str, str]:
    from ray import serve as ray_serve

    deadline = time.monotonic() + READY_WITHIN_S
    last = "no answer yet"
    with httpx.Client(base_url=plan.url, timeout=10.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            application = ray_serve.status().applications.get(app_name)
            if application is not None and application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise CannotStart(_reason(application))
            try:
                answer = client.get("/health/ready")
                if answer.status_code == 200:
                    body: dict[str, str] = answer.json()
                    return body
                last = f"/health/ready answered {answer.status_code}: {_message(answer)}"
            except httpx.TransportError as error:
                last = f"{type(error).__name__} from {plan.url}"
            time.sleep(0.1)
    raise CannotStart(f"not ready within {READY_WITHIN_S:g} s: {last}")


def _message(answer: httpx.Response) -> str:
    """The message of an error that a gateway answers; the text of any other answer, such as one of HAProxy itself."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(answer.text.split())


def _reason(application: Any) -> str:
    """The error that failed the deployment, in one line, from Serve's status of the application."""
    messages = [one.message for one in application.deployments.values() if FRAME in one.message]
    return last_error(messages[-1] if messages else application.message)


def last_error(message: str) -> str:
    """The first line of the last exception in a message, without its class.

    Python indents the frames of a traceback; the first line after the last frame that is not indented holds the
    exception. A message without a traceback is one of `build_app`, whose errors are one line: the last.
    """
    _, frame, rest = message.rpartition(FRAME)
    lines = [line for line in rest.splitlines()[1 if frame else 0 :] if line and not line[0].isspace()]
    if not lines:
        return "no reason given"
    if not frame:
        return lines[-1]
    kind, _, said = lines[0].partition(": ")
    return said or kind


def _shut_down() -> None:
    import ray
    from ray import serve as ray_serve

    if not ray.is_initialized():
        return
    # Ray's threads report the end of Serve's controller as an error although it was asked for, and may do so late. From
    # here on only a shutdown that fails is worth a line.
    stderr = os.dup(sys.stderr.fileno())
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(nowhere, stream.fileno())
    try:
        ray_serve.shutdown()
        ray.shutdown()
    except BaseException:
        os.dup2(stderr, sys.stderr.fileno())
        raise
