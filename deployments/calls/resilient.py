"""Calls between deployments: resent if their replica dies, with Ray's errors mapped to ours.

A call may be resent because a read changes nothing, and a write carries an id under which the log records it: a write
is made once, however often it arrives.

Importing this module does not import Ray, which is not there if all parts run in one process.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from deployments.errors import DeadlineExceeded, Overloaded, Unavailable
from deployments.fair_queue import Shares, Turn
from store.errors import OUTCOME_UNKNOWN

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

Answer = TypeVar("Answer")

ATTEMPTS = 3
MAX_UNBATCHED_CALLS = 1024
"""Calls to one deployment, each for one request, beyond which a caller may have no more than its share of them."""

Errors = tuple[type[Exception], ...]


class _RayErrors(NamedTuple):
    """Ray's errors by their meaning; no classes in a process that has not imported Ray."""

    lost: Errors = ()
    overloaded: Errors = ()
    others: Errors = ()

    @property
    def all(self) -> Errors:
        return self.lost + self.overloaded + self.others


def _ray_errors() -> _RayErrors:
    if "ray" not in sys.modules:
        return _RayErrors()
    from ray import exceptions
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

    return _RayErrors(
        (
            exceptions.RayActorError,
            exceptions.ActorUnavailableError,
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
        ),
        (BackPressureError,),
        (DeploymentUnavailableError, RayServeException),
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
            answer = await call()
        except _ray_errors().all as error:
            known = _ray_errors()
            lost = lost or isinstance(error, known.lost)
            if isinstance(error, known.lost) and attempt < ATTEMPTS:
                continue
            if writes and lost:
                raise _outcome_unknown(deployment) from error
            if isinstance(error, known.overloaded):
                raise Overloaded(f"The {deployment} is overloaded; try again later.") from error
            message = f"The {deployment} is not available; try again."
            raise Unavailable(message, None, f"{deployment}_unavailable") from error
        if writes and lost and isinstance(answer, DeadlineExceeded):
            raise _outcome_unknown(deployment)
        return answer
    raise AssertionError("unreachable")


def _outcome_unknown(deployment: str) -> Unavailable:
    message = f"The {deployment} was lost during this write. It is not known whether the write was made."
    return Unavailable(message, None, OUTCOME_UNKNOWN)


def with_plain_pickle(handle: DeploymentHandle, **options: Any) -> DeploymentHandle:
    """The handle with plain pickle, which takes half as long as cloudpickle.

    Arguments and answers must consist of importable classes.
    """
    return handle.options(request_serialization="pickle", response_serialization="pickle", **options)


class UnbatchedCalls:
    """Admits the calls to a deployment that are made for one request each.

    `MAX_UNBATCHED_CALLS` urgent ones may be in progress, and as many bulk ones. Beyond that, a caller may have as many
    as its share of them (see `Shares.admits`), so that a caller is not refused because of the calls of another. Bulk
    calls never cause the refusal of an urgent one.

    Args:
        deployment: its name, for errors.
    """

    def __init__(self, deployment: str) -> None:
        self._deployment = deployment
        self._urgent = Shares()
        self._bulk = Shares()

    @contextmanager
    def admit(self, turn: Turn) -> Iterator[None]:
        """A context for one call.

        Raises:
            Overloaded: the caller would have more calls in progress than its share, and the work has not begun.
        """
        shares = self._bulk if turn.bulk else self._urgent
        if not turn.begun and not shares.admits(turn.caller, 1, MAX_UNBATCHED_CALLS):
            raise Overloaded(f"The {self._deployment} is overloaded; try again later.")
        shares.add(turn.caller, 1)
        try:
            yield
        finally:
            shares.remove(turn.caller, 1)
