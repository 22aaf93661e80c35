"""The arithmetic of the reports: percentiles, medians with their spread, exponents of growth. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PERCENTILES = (50, 90, 99)


class Spread(NamedTuple):
    """The middle of several runs, and the lowest and highest of them."""

    median: float
    low: float
    high: float


def percentiles_ms(latencies_s: Sequence[float]) -> dict[str, float]:
    """`{p50_ms, p90_ms, p99_ms}` of latencies in seconds; NaN where there are none."""
    milliseconds = np.array(latencies_s if len(latencies_s) else [np.nan]) * 1e3
    return {f"p{q}_ms": float(np.percentile(milliseconds, q)) for q in PERCENTILES}


def spread(values: Sequence[float]) -> Spread:
    """Median, least and greatest of the runs that have a value; NaN where none has."""
    known = [value for value in values if not np.isnan(value)] or [float("nan")]
    return Spread(float(np.median(known)), float(min(known)), float(max(known)))


class Growth(NamedTuple):
    """`y = factor * x ** exponent`, with the share of the variance of log y that it explains."""

    exponent: float
    factor: float
    r_squared: float


def power_law(x: Sequence[float], y: Sequence[float]) -> Growth:
    """Least squares on the logarithms; needs two points above zero."""
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    exponent, intercept = np.polyfit(log_x, log_y, 1)
    left = float(np.sum((log_y - (exponent * log_x + intercept)) ** 2))
    whole = float(np.sum((log_y - log_y.mean()) ** 2))
    return Growth(float(exponent), float(np.exp(intercept)), 1 - left / whole if whole > 0 else 1.0)
