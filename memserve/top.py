"""`memserve top`: the replicas, queues, batches and latencies of a server, from its `GET /metrics`.

Rates and percentiles are those of the time between two looks. Replicas report every few seconds, so a figure may be as
old. With several nodes the figures are those of the node whose gateway answers.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

DEPLOYMENTS = ("Gateway", "Embedder", "Reranker", "Store")

_HEALTH = "/-/healthz"
_LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Row:
    """One value of a metric."""

    labels: Mapping[str, str]
    value: float


Metrics = Mapping[str, list[Row]]
"""The values of each metric, by its name without `ray_`."""


def parse(text: str) -> Metrics:
    """The metrics of a text in Prometheus' format, without those of Serve's own health checks."""
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for line in text.splitlines():
        if match := _LINE.match(line):
            name, labels, value = match.groups()
            row = Row(dict(_LABEL.findall(labels or "")), float(value))
            if row.labels.get("route") != _HEALTH and row.labels.get("application") != "":
                found[name.removeprefix("ray_")].append(row)
    return found


def _of(metrics: Metrics, name: str, deployment: str | None = None) -> Iterator[Row]:
    return (row for row in metrics.get(name, []) if deployment is None or row.labels.get("deployment") == deployment)


def _sum(metrics: Metrics, name: str, deployment: str | None = None) -> float:
    return sum(row.value for row in _of(metrics, name, deployment))


@dataclass(frozen=True, slots=True)
class Deployment:
    """The figures of one deployment.

    Attributes:
        queued_tokens: that wait; None for the store.
        busy: the mean share of the time in which its replicas are busy; None if they do not report it.
        texts_per_s: that its model was run for; None without a model.
        batch_texts: texts in a run of its model; None without a run.
    """

    name: str
    replicas: int
    queued_tokens: float | None
    busy: float | None
    texts_per_s: float | None
    batch_texts: float | None


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a server. Percentiles are None if nothing was answered.

    Attributes:
        cache_hits: the share of inputs that were in the cache of vectors; None without inputs.
    """

    deployments: list[Deployment]
    requests_per_s: float
    errors_per_s: float
    p50_ms: float | None
    p99_ms: float | None
    cache_hits: float | None

    def as_json(self) -> dict[str, object]:
        """The figures with their names."""
        return asdict(self)


def figures(before: Metrics, after: Metrics, seconds: float) -> Figures:
    """The figures of the time between two looks."""

    def gained(name: str, deployment: str | None = None) -> float:
        return max(0.0, _sum(after, name, deployment) - _sum(before, name, deployment))

    hits, misses = gained("memserve_cache_hits_total"), gained("memserve_cache_misses_total")
    latencies = _buckets(before, after, "serve_http_request_latency_ms_bucket")
    return Figures(
        deployments=[one for name in DEPLOYMENTS if (one := _deployment(name, after, gained, seconds)).replicas],
        requests_per_s=gained("serve_num_http_requests_total") / seconds,
        errors_per_s=gained("serve_num_http_error_requests_total") / seconds,
        p50_ms=percentile(latencies, 0.5),
        p99_ms=percentile(latencies, 0.99),
        cache_hits=hits / (hits + misses) if hits + misses else None,
    )


def _deployment(name: str, after: Metrics, gained: Callable[..., float], seconds: float) -> Deployment:
    replicas = {row.labels.get("replica") for row in _of(after, "memserve_event_loop_lag_seconds", name)}
    busy = [row.value for row in _of(after, "memserve_busy_share", name)]
    runs = gained("memserve_batch_texts_count", name)
    texts = gained("memserve_batch_texts_sum", name)
    queued = "memserve_gateway_queued_tokens" if name == "Gateway" else "memserve_queued_tokens"
    has_model = name in ("Embedder", "Reranker")
    return Deployment(
        name,
        len(replicas),
        _sum(after, queued, name) if has_model or name == "Gateway" else None,
        sum(busy) / len(busy) if busy else None,
        texts / seconds if has_model else None,
        texts / runs if runs else None,
    )


def _buckets(before: Metrics, after: Metrics, name: str) -> dict[float, float]:
    """What was counted at most at each bound of a histogram between two looks."""
    found: defaultdict[float, float] = defaultdict(float)
    for sign, metrics in ((-1, before), (1, after)):
        for row in metrics.get(name, []):
            found[float(row.labels["le"])] += sign * row.value
    return dict(found)


def percentile(buckets: Mapping[float, float], share: float) -> float | None:
    """The value below which a share of a histogram lies, by linear interpolation; None if it is empty.

    Args:
        buckets: by each upper bound, the number of values that are at most so large.
    """
    bounds = sorted(buckets)
    if not bounds or buckets[bounds[-1]] <= 0:
        return None
    wanted = share * buckets[bounds[-1]]
    low, counted = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= wanted:
            if bound == float("inf"):
                return low
            inside = buckets[bound] - counted
            return low + (bound - low) * ((wanted - counted) / inside if inside else 0.0)
        low, counted = bound, buckets[bound]
    return low


def table(found: Figures, title: str) -> Table:
    """The figures for people."""
    from rich import box
    from rich.table import Table

    shown = Table(title=title, caption=_summary(found), box=box.SIMPLE_HEAD, title_justify="left")
    shown.add_column("")
    for name in ("replicas", "queued tokens", "busy", "texts/s", "texts a batch"):
        shown.add_column(name, justify="right")
    for one in found.deployments:
        shown.add_row(
            one.name,
            str(one.replicas),
            _number(one.queued_tokens),
            "" if one.busy is None else f"{one.busy:.0%}",
            _number(one.texts_per_s),
            _number(one.batch_texts, 1),
        )
    return shown


def _summary(found: Figures) -> str:
    parts = [f"{found.requests_per_s:,.1f} requests/s", f"{found.errors_per_s:,.1f} errors/s"]
    if found.p50_ms is not None and found.p99_ms is not None:
        parts.append(f"p50 {found.p50_ms:,.0f} ms, p99 {found.p99_ms:,.0f} ms")
    if found.cache_hits is not None:
        parts.append(f"{found.cache_hits:.0%} from the cache")
    return "   ".join(parts)


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def looks(read: Callable[[], str], interval_s: float, sleep: Callable[[float], None] = time.sleep) -> Iterator[Figures]:
    """The figures of each interval, for ever.

    Args:
        read: the metrics of the server, as `GET /metrics` answers them.
    """
    before, began = parse(read()), time.monotonic()
    while True:
        sleep(interval_s)
        after, now = parse(read()), time.monotonic()
        yield figures(before, after, max(now - began, 1e-3))
        before, began = after, now
