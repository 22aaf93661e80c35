"""How many embedders and stores the work needs: the arithmetic, and Serve's policies around it.

Calls between the deployments are coalesced, so that their number says little; what is counted is tokens, and the time
that a replica is at work. Each time that Serve asks (some three times a second, of means over the last seconds):

    by backlog   tokens that wait, in gateways and embedders / (tokens/s that a busy embedder drains * target_drain_s)
    by use       sum over the embedders of the share of the time in which one had a call in hand / target_busy
    embedders    the larger of the two, rounded up
    stores       by use, alike: a store works on one call at a time

The backlog answers a step in the load; use answers a load that fills the embedders without a queue, as clients do that
wait for their answers, or are refused, and is what says that one embedder can go. It goes when the others would be
`SLACK` below target_busy without it, so that a load between the two changes nothing. Serve then applies min, max and
the delays.

Serve carries this module to its controller by value: it imports nothing but the standard library.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

WAITING_TOKENS = "waiting_tokens"
DRAIN_RATE = "drain_tokens_per_s"
BUSY = "busy_share"
SLACK = 0.2


class EmbedderLoad(NamedTuple):
    """What one embedder has reported: tokens a second while busy (0 before its first forward), share of time busy."""

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
    """How many embedders the work needs, before min and max.

    Args:
        waiting_tokens: in gateways and embedders together.
        loads: of the embedders that have reported.
        running: embedders that run, reported or not.
        target: embedders that were decided on last.
        target_drain_s: seconds in which what waits should be done.
        target_busy: share of the time in which an embedder should be at work.
    """
    if running == 0:
        return 1 if waiting_tokens > 0 else 0
    rates = [load.drain_rate for load in loads if load.drain_rate > 0]
    if rates:
        by_backlog = waiting_tokens / (sum(rates) / len(rates) * target_drain_s)
    else:  # nothing is known of their speed yet: what runs stays
        by_backlog = running if waiting_tokens > 0 else 0
    by_use = needed_by_use([load.busy for load in loads], target, target_busy=target_busy)
    return max(math.ceil(by_backlog), by_use)


def needed_by_use(busy: Iterable[float], target: int, *, target_busy: float) -> int:
    """How many replicas would each be at work for at most `target_busy` of the time; of `target`, one too many stays
    until the others would have `SLACK` to spare.

    Args:
        busy: shares of the time in which each replica was at work.
        target: replicas that were decided on last.
    """
    used = sum(busy) / target_busy
    return max(math.ceil(used), min(target, math.ceil(used / (1 - SLACK))))


class EmbedderPolicy:
    """Serve's policy of the Embedder deployment alone: by what its replicas report. See `application_policy`."""

    def __init__(self, target_drain_s: float, target_busy: float) -> None:
        self._targets = {"target_drain_s": target_drain_s, "target_busy": target_busy}

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        return _embedders(ctx, 0.0, self._targets), {}


class StorePolicy:
    """Serve's policy of the Store deployment: by the share of the time in which its replicas are at work."""

    def __init__(self, target_busy: float) -> None:
        self._target_busy = target_busy

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        return _stores(ctx, {"target_busy": self._target_busy}), {}


def application_policy(contexts: Mapping[Any, Any]) -> tuple[dict[Any, float], dict[Any, dict[str, Any]]]:
    """Serve's policy of the whole application (`autoscaling_policy` in serve_config.yaml).

    It sees the queues of the gateways, which EmbedderPolicy does not, and where most of a backlog waits: each gateway
    says what waits in it, and one that dies takes its queue and its figure along. Gateways scale by their requests, and
    so does whatever has an `autoscaling_config` without our policy in the config file.
    """
    waiting = sum(
        sum(_reported(ctx, WAITING_TOKENS).values()) for ctx in contexts.values() if ctx.deployment_name == "Gateway"
    )
    decisions: dict[Any, float] = {}
    for deployment, ctx in contexts.items():
        targets = ctx.config.policy.policy_kwargs
        if ctx.deployment_name == "Embedder" and targets:
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
    """A figure of the replicas that run and have reported it, as means over Serve's look-back period."""
    metrics: dict[str, dict[Any, float]] = ctx.aggregated_metrics or {}
    return metrics.get(name, {})


class BusyTime:
    """The share of the time in which there was at least one call in hand, from one look to the next."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._in_hand = 0
        self._busy_s = 0.0
        self._looked_at = self._counted_until = clock()

    @contextmanager
    def call(self) -> Iterator[None]:
        """While one call is in hand."""
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
        """Since the last look."""
        now = self._count()
        elapsed, busy_s = now - self._looked_at, self._busy_s
        self._looked_at, self._busy_s = now, 0.0
        return busy_s / elapsed if elapsed > 0 else 0.0
