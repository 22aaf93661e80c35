"""Calls between deployments: resent if their replica dies, with Ray's errors mapped to ours.

A call may be resent because a read changes nothing, and a write carries an id under which the log records it: a write
is made once, however often it arrives.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ray.exceptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.errors import Overloaded, Unavailable
from store.errors import OUTCOME_UNKNOWN

Answer = TypeVar("Answer")

ATTEMPTS = 3
MAX_UNBATCHED_CALLS = 1024  # to one deployment at a time, each for one request; more are refused with `Overloaded`

_REPLICA_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.ActorUnavailableError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
)


async def resilient(call: Callable[[], Awaitable[Answer]], deployment: str, *, writes: bool = False) -> Answer:
    """Await `call()`, and call it again if its replica died.

    Args:
        deployment: its name, for errors.
        writes: the call writes. If its replica was lost, the write may have been made, so later errors must say so.

    Raises:
        Overloaded: the deployment refuses more work.
        Unavailable: no replica answered in `ATTEMPTS` attempts; `OUTCOME_UNKNOWN` for a write whose replica was lost.
    """
    lost = False
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await call()
        except (*_REPLICA_LOST, BackPressureError, DeploymentUnavailableError, RayServeException) as error:
            lost = lost or isinstance(error, _REPLICA_LOST)
            if isinstance(error, _REPLICA_LOST) and attempt < ATTEMPTS:
                continue
            if writes and lost:
                message = f"The {deployment} was lost during this write. It is not known whether the write was made."
                raise Unavailable(message, None, OUTCOME_UNKNOWN) from error
            if isinstance(error, BackPressureError):
                raise Overloaded(f"The {deployment} is overloaded; try again later.") from error
            message = f"The {deployment} is not available; try again."
            raise Unavailable(message, None, f"{deployment}_unavailable") from error
    raise AssertionError("unreachable")


def with_plain_pickle(handle: DeploymentHandle, **options: Any) -> DeploymentHandle:
    """The handle with plain pickle, which takes half as long as cloudpickle.

    Arguments and answers must consist of importable classes.
    """
    return handle.options(request_serialization="pickle", response_serialization="pickle", **options)


class UnbatchedCalls:
    """Bounds the calls to a deployment that are made for one request each.

    Args:
        deployment: its name, for errors.
    """

    def __init__(self, deployment: str) -> None:
        self._deployment = deployment
        self._running = 0

    @contextmanager
    def admit(self) -> Iterator[None]:
        """A context for one call. Raises Overloaded if `MAX_UNBATCHED_CALLS` are running."""
        if self._running >= MAX_UNBATCHED_CALLS:
            raise Overloaded(f"The {self._deployment} is overloaded; try again later.")
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
