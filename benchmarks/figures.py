"""The arithmetic of the reports: percentiles, medians with their spread, exponents of growth. Pure functions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PERCENTILES = (50, 90, 99)


class Spread(NamedTuple):
    """The median of several runs, with the lowest and the highest."""

    median: float
    low: float
    high: float


def percentiles_ms(latencies_s: Sequence[float]) -> dict[str, float]:
    """`{p50_ms, p90_ms, p99_ms}` of latencies in seconds; NaN if there are none."""
    milliseconds = np.array(latencies_s if len(latencies_s) else [np.nan]) * 1e3
    return {f"p{q}_ms": float(np.percentile(milliseconds, q)) for q in PERCENTILES}


def spread(values: Sequence[float]) -> Spread:
    """Median, lowest and highest of the values that are not NaN; NaN if all are."""
    known = [value for value in values if not np.isnan(value)] or [float("nan")]
    return Spread(float(np.median(known)), float(min(known)), float(max(known)))


class Growth(NamedTuple):
    """`y = factor * x ** exponent`, and the share of the variance of log y that this explains."""

    exponent: float
    factor: float
    r_squared: float


def power_law(x: Sequence[float], y: Sequence[float]) -> Growth:
    """Fit by least squares on the logarithms. Needs at least two points, all above zero."""
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    exponent, intercept = np.polyfit(log_x, log_y, 1)
    left = float(np.sum((log_y - (exponent * log_x + intercept)) ** 2))
    whole = float(np.sum((log_y - log_y.mean()) ** 2))
    return Growth(float(exponent), float(np.exp(intercept)), 1 - left / whole if whole > 0 else 1.0)
