"""`memserve top`: the figures of two looks at a server's metrics."""

import json
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from memserve import command, http, top

BEFORE = """\
# HELP ray_memserve_event_loop_lag_seconds The longest time.
# TYPE ray_memserve_event_loop_lag_seconds gauge
ray_memserve_event_loop_lag_seconds{deployment="Gateway",replica="g1"} 0.01
ray_memserve_event_loop_lag_seconds{deployment="Embedder",replica="e1"} 0.01
ray_memserve_batch_texts_count{deployment="Embedder",replica="e1"} 10.0
ray_memserve_batch_texts_sum{deployment="Embedder",replica="e1"} 100.0
ray_serve_num_http_requests_total{route="/v1/embeddings",status_code="200"} 50.0
ray_serve_http_request_latency_ms_bucket{route="/a",le="10.0"} 5.0
ray_serve_http_request_latency_ms_bucket{route="/a",le="20.0"} 5.0
ray_serve_http_request_latency_ms_bucket{route="/a",le="+Inf"} 5.0
"""
AFTER = """\
ray_memserve_event_loop_lag_seconds{deployment="Gateway",replica="g1"} 0.01
ray_memserve_event_loop_lag_seconds{deployment="Embedder",replica="e1"} 0.01
ray_memserve_event_loop_lag_seconds{deployment="Embedder",replica="e2"} 0.01
ray_memserve_event_loop_lag_seconds{deployment="Store",replica="s1"} 0.01
ray_memserve_gateway_queued_tokens{deployment="Gateway",replica="g1"} 1200.0
ray_memserve_queued_tokens{deployment="Embedder",replica="e1"} 30.0
ray_memserve_queued_tokens{deployment="Embedder",replica="e2"} 12.0
ray_memserve_busy_share{deployment="Embedder",replica="e1"} 1.0
ray_memserve_busy_share{deployment="Embedder",replica="e2"} 0.5
ray_memserve_batch_texts_count{deployment="Embedder",replica="e1"} 15.0
ray_memserve_batch_texts_sum{deployment="Embedder",replica="e1"} 200.0
ray_memserve_batch_texts_count{deployment="Embedder",replica="e2"} 5.0
ray_memserve_batch_texts_sum{deployment="Embedder",replica="e2"} 20.0
ray_memserve_cache_hits_total{deployment="Gateway",replica="g1"} 30.0
ray_memserve_cache_misses_total{deployment="Gateway",replica="g1"} 90.0
ray_serve_num_http_requests_total{route="/v1/embeddings",status_code="200"} 90.0
ray_serve_num_http_requests_total{route="/health",status_code="200"} 10.0
ray_serve_num_http_requests_total{application="memserve",route="/-/healthz",status_code="200"} 70.0
ray_serve_num_http_requests_total{application="",route="/",status_code="404"} 80.0
ray_serve_num_http_error_requests_total{route="/a",error_code="429"} 4.0
ray_serve_http_request_latency_ms_bucket{route="/a",le="10.0"} 55.0
ray_serve_http_request_latency_ms_bucket{route="/b",le="10.0"} 0.0
ray_serve_http_request_latency_ms_bucket{route="/a",le="20.0"} 105.0
ray_serve_http_request_latency_ms_bucket{route="/a",le="+Inf"} 105.0
"""
FIGURES = top.Figures(
    deployments=[
        top.Deployment("Gateway", 1, 1200.0, None, None, None),
        top.Deployment("Embedder", 2, 42.0, 0.75, 60.0, 12.0),
        top.Deployment("Store", 1, None, None, None, None),
    ],
    requests_per_s=25.0,
    errors_per_s=2.0,
    p50_ms=10.0,
    p99_ms=19.8,
    cache_hits=0.25,
)


def test_the_figures_are_of_the_time_between_two_looks() -> None:
    assert top.figures(top.parse(BEFORE), top.parse(AFTER), 2.0) == FIGURES


def test_a_server_that_has_done_nothing_has_no_percentiles() -> None:
    found = top.figures(top.parse(BEFORE), top.parse(BEFORE), 2.0)
    assert (found.requests_per_s, found.p50_ms, found.p99_ms, found.cache_hits) == (0.0, None, None, None)
    assert found.deployments[1] == top.Deployment("Embedder", 1, 0.0, None, 0.0, None)


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ({}, 0.5, None),
        ({10.0: 0.0, float("inf"): 0.0}, 0.5, None),
        ({10.0: 100.0, float("inf"): 100.0}, 0.5, 5.0),
        ({10.0: 0.0, 20.0: 100.0, float("inf"): 100.0}, 0.25, 12.5),
        ({10.0: 50.0, 20.0: 50.0, 30.0: 100.0, float("inf"): 100.0}, 0.5, 10.0),
        ({10.0: 50.0, float("inf"): 100.0}, 0.99, 10.0),  # above the last bound nothing is known
    ],
)
def test_a_percentile_lies_between_the_bounds_of_its_bucket(
    buckets: dict[float, float], share: float, expected: float | None
) -> None:
    assert top.percentile(buckets, share) == expected


def test_labels_may_hold_quotes() -> None:
    (row,) = top.parse('x{a="say \\"b\\", c",d="e"} 1.5 1700000000000')["x"]
    assert (dict(row.labels), row.value) == ({"a": 'say \\"b\\", c', "d": "e"}, 1.5)


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server whose metrics grow from look to look; two seconds pass each time."""
    answers = iter([BEFORE, AFTER, AFTER])
    moments = iter([0.0, 2.0, 4.0])
    monkeypatch.setattr(http.HttpTransport, "text", lambda self, path, timeout_s: next(answers))
    monkeypatch.setattr("memserve.top.time.monotonic", lambda: next(moments))
    yield


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command.memserve, ["top", "--interval", "0.1", *arguments], prog_name="memserve")
    assert result.exit_code == 0, result.output
    return result.stdout


def test_programs_get_one_object_for_each_look(metrics: None) -> None:
    first, second = map(json.loads, run("--json", "--count", "2").splitlines())
    assert first == FIGURES.as_json()
    assert (second["requests_per_s"], second["p50_ms"]) == (0.0, None)


def test_people_get_a_table(metrics: None) -> None:
    lines = [line.split() for line in run("--count", "1", "--url", "http://one:1").splitlines() if line.strip()]
    assert lines[0] == ["http://one:1"]
    assert ["Gateway", "1", "1,200"] in lines
    assert ["Embedder", "2", "42", "75%", "60", "12.0"] in lines
    assert ["Store", "1"] in lines
    assert "25.0 requests/s 2.0 errors/s p50 10 ms, p99 20 ms 25% from the cache" in " ".join(map(" ".join, lines))


def test_a_server_that_is_away_is_reported_in_one_line() -> None:
    result = CliRunner().invoke(command.memserve, ["top", "--url", "http://127.0.0.1:1"], prog_name="memserve")
    assert result.exit_code == 1
    assert result.stderr.startswith("memserve top: The server cannot be reached: ")
    assert len(result.stderr.splitlines()) == 1
