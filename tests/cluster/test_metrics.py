"""`GET /metrics` behind HAProxy: the metrics of every replica of this node, from Ray's agent."""

import re
import time

from tests.cluster.elastic import Elastic

REPORTED_WITHIN_S = 60.0
OURS = {
    "ray_memserve_queued_tokens": "Embedder",
    "ray_memserve_gateway_queued_tokens": "Gateway",
    "ray_memserve_event_loop_lag_seconds": "Store",
}


def test_the_metrics_of_all_replicas_are_exported(elastic: Elastic) -> None:
    deadline = time.monotonic() + REPORTED_WITHIN_S
    with elastic.client() as http:
        while True:  # replicas report every few seconds
            assert http.post("/v1/embeddings", json={"input": "tea"}).status_code == 200
            answer = http.get("/metrics")
            assert (answer.status_code, answer.headers["content-type"]) == (
                200,
                "text/plain; version=0.0.4; charset=utf-8",
            )
            found = {
                name
                for name, deployment in OURS.items()
                if re.search(rf'^{name}{{.*deployment="{deployment}"', answer.text, re.MULTILINE)
            }
            if found == set(OURS) and "ray_serve_" in answer.text:
                break
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.5)
    names = {line.split("{")[0] for line in answer.text.splitlines() if not line.startswith("#")}
    assert {name for name in names if not name.startswith(("ray_memserve_", "ray_serve_"))} == set()
