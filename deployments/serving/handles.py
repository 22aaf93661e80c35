"""The handle of a running application, for programs on the cluster that are no part of it.

Guarantee: what a call raises is an error of deployments/errors.py or store/errors.py, or TimeoutError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

# `memserve serve` keeps Ray on 127.0.0.1 (ON_LOOPBACK in ray_internals.py). Read when Ray is imported; without it a
# driver would look for Ray at another address of this machine.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.errors import Unavailable


def handle_of(app: str) -> DeploymentHandle:
    """The handle of an application. Connects to the cluster of this machine unless the process has done so.

    Raises:
        Unavailable: the application does not run there.
        ConnectionError: there is no cluster.
    """
    if not ray.is_initialized():
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "auto"), namespace="serve", log_to_driver=False, logging_level="ERROR"
        )
    try:
        return serve.get_app_handle(app)
    except RayServeException as error:
        raise Unavailable(f"The application {app!r} does not run on this cluster.") from error


@contextmanager
def raised_plainly() -> Iterator[None]:
    """A context for a call: the error of the application is raised as it was there, without Ray's wrapper.

    Raises:
        Unavailable: no replica answered.
    """
    try:
        yield
    except RayTaskError as error:
        raise error.cause from error
    except (RayActorError, RayServeException) as error:
        raise Unavailable(f"The server cannot be reached: {error}") from error
