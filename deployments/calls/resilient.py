"""Calls between deployments: sent again where that is safe, with the errors of Ray mapped to ours.

A call that dies with its replica is sent again: reads change nothing, and a write carries an id under which the log
remembers it, so that it is made once however often it arrives.
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
LONE_CALLS = 1024  # for one request each, that may be on their way to a deployment; past it `Overloaded`

_REPLICA_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.ActorUnavailableError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
)


async def resilient(call: Callable[[], Awaitable[Answer]], what: str, *, writes: bool = False) -> Answer:
    """Await `call()`, again if its replica died.

    Args:
        writes: once it was lost it may have been made, so that no failure after that may deny it.

    Raises:
        Overloaded: the deployment refuses more work.
        Unavailable: no replica could answer in `ATTEMPTS` attempts; `OUTCOME_UNKNOWN` for a write that was lost.
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
                message = f"The {what} was lost while it worked, and whether this was written is not known."
                raise Unavailable(message, None, OUTCOME_UNKNOWN) from error
            if isinstance(error, BackPressureError):
                raise Overloaded(f"The {what} has more work than it admits.") from error
            raise Unavailable(f"The {what} is not available; try again.", None, f"{what}_unavailable") from error
    raise AssertionError("unreachable")


def quick(handle: DeploymentHandle, **options: Any) -> DeploymentHandle:
    """The handle with plain pickle: what travels is made of importable classes, and cloudpickle takes twice as long."""
    return handle.options(request_serialization="pickle", response_serialization="pickle", **options)


class LoneCalls:
    """Counts the calls to a deployment that are made for one request each.

    Args:
        what: the deployment, for errors.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._on_their_way = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Around a call. Raises Overloaded where `LONE_CALLS` are on their way."""
        if self._on_their_way >= LONE_CALLS:
            raise Overloaded(f"The {self._what} has more work than it admits; try again later.")
        self._on_their_way += 1
        try:
            yield
        finally:
            self._on_their_way -= 1
