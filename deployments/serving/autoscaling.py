"""The number of embedders, rerankers and stores that the load needs: the formulas, and Serve's policies that use them.

Calls between deployments carry many requests each, so the policies do not count calls. They count tokens, and the time
in which a replica is busy. Serve calls them about three times a second, with means over the last seconds:

    by backlog   waiting tokens, of gateways and embedders / (tokens/s of one busy embedder * target_drain_s)
    by use       sum over the embedders of the share of the time in which a call was in progress / target_busy
    embedders    the larger of the two, rounded up
    rerankers    as embedders, by their own tokens
    stores       by use alone; a store works on one call at a time

The backlog answers a step in the load. Use answers a load that keeps the embedders busy without a queue, such as
clients that wait for their answers or are refused, and decides when an embedder may stop. One stops only if the others
would then be `SLACK` below target_busy, so that a load in between changes nothing. Serve applies min, max and delays
afterwards.

Serve pickles this module by value into its controller, so it may import nothing but the standard library.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

WAITING_TOKENS = "waiting_tokens"
WAITING_FOR_RERANKER = "waiting_for_reranker_tokens"
DRAIN_RATE = "drain_tokens_per_s"
BUSY = "busy_share"
SLACK = 0.2


class EmbedderLoad(NamedTuple):
    """The report of one embedder: tokens/s while busy (0 before its first run), and its busy share, from 0 to 1."""

    drain_rate: float
    busy: float


def embedders_needed(
    waiting_tokens: float,
    loads: Sequence[EmbedderLoad],
    running: int,
    target: int,
    *,
    target_drain_s: float,
    target_busy: float,
) -> int:
    """The number of embedders that the load needs, before min and max are applied.

    Args:
        waiting_tokens: in gateways and embedders together.
        loads: of the embedders that have reported.
        running: the number of embedders that run, whether they have reported or not.
        target: the number that was decided last.
        target_drain_s: seconds in which the waiting tokens should be embedded.
        target_busy: share of the time, from 0 to 1, in which an embedder should be busy.
    """
    if running == 0:
        return 1 if waiting_tokens > 0 else 0
    rates = [load.drain_rate for load in loads if load.drain_rate > 0]
    if rates:
        by_backlog = waiting_tokens / (sum(rates) / len(rates) * target_drain_s)
    else:  # their speed is not known yet: keep the replicas that run
        by_backlog = running if waiting_tokens > 0 else 0
    by_use = needed_by_use([load.busy for load in loads], target, target_busy=target_busy)
    return max(math.ceil(by_backlog), by_use)


def needed_by_use(busy: Iterable[float], target: int, *, target_busy: float) -> int:
    """How many replicas are needed for each to be busy at most `target_busy` of the time.

    A replica beyond that is kept until the others would have `SLACK` to spare without it.

    Args:
        busy: the share of the time, from 0 to 1, in which each replica was busy.
        target: the number that was decided last.
    """
    used = sum(busy) / target_busy
    return max(math.ceil(used), min(target, math.ceil(used / (1 - SLACK))))


class EmbedderPolicy:
    """Serve's policy for Embedder or Reranker alone, by the reports of its replicas. See `application_policy`."""

    def __init__(self, target_drain_s: float, target_busy: float) -> None:
        self._targets = {"target_drain_s": target_drain_s, "target_busy": target_busy}

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        return _embedders(ctx, 0.0, self._targets), {}


class StorePolicy:
    """Serve's policy for the Store deployment, by the share of the time in which its replicas are busy."""

    def __init__(self, target_busy: float) -> None:
        self._target_busy = target_busy

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        return _stores(ctx, {"target_busy": self._target_busy}), {}


def application_policy(contexts: Mapping[Any, Any]) -> tuple[dict[Any, float], dict[Any, dict[str, Any]]]:
    """Serve's policy for the whole application (`autoscaling_policy` in serve_config.yaml).

    It sees the queues of the gateways, in which most of a backlog waits; EmbedderPolicy does not. Each gateway reports
    its own queue, so that the figure of one that dies goes with it. Gateways scale by their requests in progress. So
    does a deployment whose `autoscaling_config` in the config file does not name a policy of this module.
    """
    waiting_for = {"Embedder": WAITING_TOKENS, "Reranker": WAITING_FOR_RERANKER}
    gateways = [ctx for ctx in contexts.values() if ctx.deployment_name == "Gateway"]
    decisions: dict[Any, float] = {}
    for deployment, ctx in contexts.items():
        targets = ctx.config.policy.policy_kwargs
        if ctx.deployment_name in waiting_for and targets:
            name = waiting_for[ctx.deployment_name]
            waiting = sum(sum(_reported(gateway, name).values()) for gateway in gateways)
            decisions[deployment] = _embedders(ctx, waiting, targets)
        elif ctx.deployment_name == "Store" and targets:
            decisions[deployment] = _stores(ctx, targets)
        elif ctx.current_num_replicas == 0:
            decisions[deployment] = ctx.target_num_replicas
        else:
            decisions[deployment] = ctx.total_num_requests / ctx.config.get_target_ongoing_requests()
    return decisions, {}


def _embedders(ctx: Any, waiting_in_gateways: float, targets: Mapping[str, float]) -> int:
    rates, busy = _reported(ctx, DRAIN_RATE), _reported(ctx, BUSY)
    return embedders_needed(
        waiting_in_gateways + sum(_reported(ctx, WAITING_TOKENS).values()),
        [EmbedderLoad(rate, busy.get(replica, 0.0)) for replica, rate in rates.items()],
        ctx.current_num_replicas,
        ctx.target_num_replicas,
        target_drain_s=targets["target_drain_s"],
        target_busy=targets["target_busy"],
    )


def _stores(ctx: Any, targets: Mapping[str, float]) -> int:
    return needed_by_use(_reported(ctx, BUSY).values(), ctx.target_num_replicas, target_busy=targets["target_busy"])


def _reported(ctx: Any, name: str) -> dict[Any, float]:
    """A figure of each replica that runs and has reported it: the mean over Serve's look-back period."""
    metrics: dict[str, dict[Any, float]] = ctx.aggregated_metrics or {}
    return metrics.get(name, {})


class BusyTime:
    """Measures the share of the time in which at least one call was in progress."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._in_hand = 0
        self._busy_s = 0.0
        self._looked_at = self._counted_until = clock()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count one call as in progress within this context."""
        self._count()
        self._in_hand += 1
        try:
            yield
        finally:
            self._count()
            self._in_hand -= 1

    def _count(self) -> float:
        now = self._clock()
        if self._in_hand:
            self._busy_s += now - self._counted_until
        self._counted_until = now
        return now

    def share(self) -> float:
        """The busy share, from 0 to 1, since the last time this was called."""
        now = self._count()
        elapsed, busy_s = now - self._looked_at, self._busy_s
        self._looked_at, self._busy_s = now, 0.0
        return busy_s / elapsed if elapsed > 0 else 0.0
