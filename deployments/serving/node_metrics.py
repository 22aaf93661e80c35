"""The metrics of all replicas on this node, as Ray's agent exports them for Prometheus.

Guarantees: only metrics of memserve and of Serve are passed on, not those of the processes of Ray itself. They are some
seconds old: replicas report to the agent every few seconds.
"""

import asyncio
from collections.abc import Iterator

import httpx

from deployments.errors import Unavailable
from deployments.serving.ray_internals import metrics_exporter

_PREFIXES = ("ray_memserve_", "ray_serve_")
_TIMEOUT_S = 5.0


async def read() -> bytes:
    """The metrics in Prometheus' text format. Raises Unavailable if the agent does not answer."""
    try:
        url = await asyncio.to_thread(metrics_exporter)
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as http:
            answer = await http.get(url)
            answer.raise_for_status()
    except (LookupError, httpx.HTTPError) as error:
        raise Unavailable(
            f"Ray's agent on this node does not export its metrics: {error}", None, "no_metrics"
        ) from error
    # Hundreds of kilobytes on a large node, so not on the event loop.
    return await asyncio.to_thread(lambda: b"".join(of_application(answer.text)))


def of_application(text: str) -> Iterator[bytes]:
    """The lines of the application's metrics, comments included."""
    for line in text.splitlines():
        name = line.split(" ", 3)[2] if line.startswith(("# HELP ", "# TYPE ")) else line
        if name.startswith(_PREFIXES):
            yield f"{line}\n".encode()
