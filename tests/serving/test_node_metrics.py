"""The metrics of a node: which lines are passed on, and what is answered if there are none."""

from typing import Any

import httpx
import pytest

from deployments.errors import Unavailable
from deployments.serving import node_metrics

EXPORTED = """\
# HELP ray_memserve_queued_tokens Tokens that wait for the device.
# TYPE ray_memserve_queued_tokens gauge
ray_memserve_queued_tokens{deployment="Embedder",replica="a"} 12.0
# HELP ray_node_cpu_utilization of ray_memserve_queued_tokens
# TYPE ray_node_cpu_utilization gauge
ray_node_cpu_utilization{ip="127.0.0.1"} 3.0
# HELP ray_serve_num_http_requests_total Requests.
# TYPE ray_serve_num_http_requests_total counter
ray_serve_num_http_requests_total{route="/v1/embeddings",status_code="200"} 7.0
python_gc_objects_collected_total{generation="0"} 1.0
# EOF
"""


def exporting(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://127.0.0.1:1234/metrics"
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    made = httpx.AsyncClient(transport=httpx.MockTransport(handle))
    monkeypatch.setattr(node_metrics, "metrics_exporter", lambda: "http://127.0.0.1:1234/metrics")
    monkeypatch.setattr(httpx, "AsyncClient", lambda **_: made)


async def test_the_metrics_of_the_application_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    exporting(monkeypatch, httpx.Response(200, text=EXPORTED))
    lines = EXPORTED.splitlines(keepends=True)
    assert await node_metrics.read() == "".join(lines[:3] + lines[6:9]).encode()


@pytest.mark.parametrize("answer", [httpx.Response(500), httpx.ConnectError("refused"), httpx.ReadTimeout("slow")])
async def test_an_agent_that_does_not_answer_is_503(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    exporting(monkeypatch, answer)
    with pytest.raises(Unavailable) as caught:
        await node_metrics.read()
    assert caught.value.code == "no_metrics"


async def test_a_node_that_exports_nothing_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise LookupError("its port is not known")

    monkeypatch.setattr(node_metrics, "metrics_exporter", none)
    with pytest.raises(Unavailable, match="its port is not known"):
        await node_metrics.read()
