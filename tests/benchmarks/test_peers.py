"""The comparison with other servers: its pure functions, and that servers are paused and ended with their processes."""

import argparse
import base64
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
import pytest

from benchmarks.peers.corpus import LARGE, Corpus, collections
from benchmarks.peers.environments import REQUIREMENTS
from benchmarks.peers.measure import contenders, parts
from benchmarks.peers.report import ratios, summary, tables
from benchmarks.peers.run import checkout, keys, peers_of, scenario_keys
from benchmarks.peers.scenarios import SCENARIOS
from benchmarks.peers.searches import path_and_body
from benchmarks.peers.servers import DidNotStart, Server, last_line
from benchmarks.peers.table import PEERS, Launch, baseline, hold_to_two_cores, memserve
from benchmarks.peers.tune import TUNED_FOR
from benchmarks.peers.wire import answer, inputs
from benchmarks.server import free_port

ROOT = Path(__file__).resolve().parents[2]
BOTH = ("float32", "bfloat16")


def test_every_environment_pins_the_packages_of_its_peers_and_the_same_torch() -> None:
    environments = {peer.environment for peer in PEERS if peer.environment}
    assert environments == {path.stem for path in REQUIREMENTS.glob("*.txt")}
    for peer in PEERS:
        if peer.environment is None:
            continue
        lines = (REQUIREMENTS / f"{peer.environment}.txt").read_text().splitlines()
        pins = dict(line.split("==") for line in lines if not line.startswith("#"))
        assert pins.get("torch", "2.13.0") == "2.13.0"
        normal = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
        assert normal >= set(peer.packages)


def test_memserve_comes_first_and_each_job_of_mem0_has_its_own_server() -> None:
    everyone = contenders(PEERS, SCENARIOS, BOTH)
    assert everyone[0].name == "memserve bfloat16"
    assert everyone[0].jobs == {"embed", "add", "search", "vectors"}
    assert [one.jobs for one in everyone if one.name == "memserve float32"] == [{"embed"}]
    assert [sorted(one.jobs) for one in everyone if one.name == "mem0-faiss float32"] == [["add"], ["search"]]
    assert len({one.name for one in everyone if one.peer.key == "chroma"}) == 1


def test_a_baseline_is_another_checkout_with_the_settings_and_the_jobs_of_memserve(tmp_path: Path) -> None:
    peer = baseline(ROOT)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert peer.title == f"memserve at {commit.stdout.strip()}"
    launch = Launch("m", "bfloat16", 1, tmp_path, None)
    assert peer.command(launch) == ["env", "-C", str(ROOT), f"PYTHONPATH={ROOT}", *memserve(launch)]
    jobs = {one.name: sorted(one.jobs) for one in contenders([PEERS[0], peer], SCENARIOS, BOTH)}
    assert jobs == {
        "memserve bfloat16": ["add", "embed", "search", "vectors"],
        "baseline bfloat16": ["add", "embed", "search", "vectors"],
        "memserve float32": ["embed"],
        "baseline float32": ["embed"],
    }


def test_only_the_baseline_needs_no_environment_of_a_peer() -> None:
    assert [peer.key for peer in peers_of(keys("baseline"), checkout(str(ROOT)))] == ["memserve", "baseline"]
    assert [peer.key for peer in peers_of(keys("lock"), None)] == ["memserve", "lock"]
    assert peers_of(None, None) == list(PEERS)
    with pytest.raises(argparse.ArgumentTypeError, match="is not a checkout of memserve"):
        checkout(str(ROOT / "docs"))


def test_the_report_compares_memserve_with_its_baseline_scenario_by_scenario() -> None:
    older = {"baseline bfloat16": runs(500.0, p50_ms=1.0, p99_ms=2.0, errors={})}
    found = {
        **FOUND,
        "peers": {**FOUND["peers"], "baseline": {"title": "memserve at 0123abc", "versions": {}}},
        "runs": {**FOUND["runs"], "64 x 1": {**FOUND["runs"]["64 x 1"], **older}},
    }
    row = "| 64 clients, one short text per request | 600 | memserve at 0123abc, bfloat16 | 500 | 1.20 |"
    assert row in "\n".join(tables(found)).splitlines()
    assert summary(found) == summary(FOUND)


def test_servers_that_are_compared_run_at_the_same_time() -> None:
    everyone = contenders(PEERS, SCENARIOS, BOTH)
    together, apart = parts(everyone)
    assert sorted(map(id, together + apart)) == sorted(map(id, everyone))
    assert together[0].name == "memserve bfloat16"
    assert {one.dtype for one in apart} == {"float32"}
    assert {one.peer.key for one in apart} >= {"memserve", "lock", "litserve", "infinity", "plain-batch"}
    assert {"mem0-faiss float32", "chroma float32"} <= {one.name for one in together}
    assert len(parts(contenders(PEERS, SCENARIOS, ("bfloat16",)))) == 1


def test_the_choice_of_a_dtype_keeps_the_peers_without_a_model() -> None:
    names = [one.name for one in contenders(PEERS, SCENARIOS, ("bfloat16",))]
    assert not any(name.endswith("float32") for name in names if name.split()[0] not in ("chroma", "qdrant"))
    assert "chroma float32" in names


def test_every_contender_has_a_probe() -> None:
    probes = {one.name: one.probe[0] for one in contenders(PEERS, SCENARIOS, BOTH)}
    assert probes["memserve bfloat16"] == "/v1/embeddings"
    assert probes["qdrant float32"] == "/v1/users/user-0/memories/search"
    assert probes["chroma float32"].endswith("/collections")


def test_all_servers_have_the_same_two_cores_and_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: set[int] = set()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: held or set(range(3, 19)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: held.update(cores))
    monkeypatch.setattr("benchmarks.machine.gpus", lambda: ["a card"])
    hold_to_two_cores()
    assert held == {3, 4}
    *_, config = memserve(Launch("m", "bfloat16", 1, tmp_path, None))
    args = json.loads(Path(config).read_text())["applications"][0]["args"]
    assert args["model"] == {"name": "m", "device": "cpu", "dtype": "bfloat16"}
    assert args["embedder"] == {"min_replicas": 2, "max_replicas": 2}


def test_settings_are_tuned_for_scenarios_of_each_job_with_a_model() -> None:
    jobs = {scenario.key: scenario.job for scenario in SCENARIOS}
    assert {jobs[key] for key in TUNED_FOR} == {"embed", "add", "search"}


def test_a_body_carries_little_endian_float32() -> None:
    assert inputs(b'{"input": "one"}') == ["one"]
    assert inputs(b'{"input": ["one", "two"]}') == ["one", "two"]
    vectors = np.arange(6, dtype=np.float64).reshape(2, 3)
    data = orjson.loads(answer(vectors))["data"]
    assert [item["index"] for item in data] == [0, 1]
    got = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4").tolist() for item in data]
    assert got == [[0, 1, 2], [3, 4, 5]]


def test_a_search_by_vector_has_the_shape_of_its_server() -> None:
    path, body = path_and_body("memserve", "user-3", [1.0, 0.0])
    assert (path, json.loads(body)) == ("/v1/users/user-3/memories/search", {"vector": [1.0, 0.0], "top_k": 10})
    path, body = path_and_body("chroma", "some-id", [1.0, 0.0])
    assert path.endswith("/collections/some-id/query")
    assert json.loads(body)["query_embeddings"] == [[1.0, 0.0]]
    assert json.loads(body)["n_results"] == 10


def test_a_corpus_is_read_as_it_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    written = Corpus(["a", "b"], rng.random((2, 4), "f4"), rng.random((3, 4), "f4"))
    written.write(tmp_path)
    read = Corpus.read(tmp_path)
    assert read.texts == written.texts
    assert np.array_equal(read.vectors, written.vectors)
    assert np.array_equal(read.queries, written.queries)


def test_ten_users_have_a_thousand_memories_and_one_has_them_all() -> None:
    corpus = Corpus([str(n) for n in range(LARGE)], np.zeros((LARGE, 1), "f4"), np.zeros((1, 1), "f4"))
    parts = collections(corpus)
    assert {name: len(part.texts) for name, part in parts.items()} == {
        **{f"user-{n}": 1_000 for n in range(10)},
        "large-0": 20_000,
    }
    assert parts["user-9"].texts[0] == "9000"
    assert len(set(parts["user-0"].ids("user-0")) | set(parts["user-1"].ids("user-1"))) == 2_000
    assert "large-0" not in collections(corpus, large=False)


def runs(*rates: float, **more: object) -> list[dict[str, object]]:
    return [{"round": n, "texts_per_s": rate, **more} for n, rate in enumerate(rates)]


def test_a_ratio_is_taken_within_a_round() -> None:
    # The machine was half as fast in the second round: the rates differ, the ratio does not.
    assert ratios(runs(100.0, 50.0, 120.0), runs(10.0, 5.0)) == (10.0, 10.0, 10.0)
    assert ratios(runs(100.0), []) is None
    assert ratios(runs(100.0), runs(0.0)) is None


FOUND: dict[str, Any] = {
    **{"commit": "0123456789abcdef", "dirty": False, "at": "2026-11-22T12:00:00+00:00", "cpu": "a processor"},
    **{"cores": 2, "gpus": [], "load_average_before": 0.1, "versions": {"ray": "2.60.0"}, "command": "python -m ..."},
    "plan": {"rounds": 1, "measure_s": 3.0, "seed": 1},
    "peers": {
        "memserve": {"title": "memserve", "versions": {}},
        "lock": {"title": "one model behind a lock", "versions": {"fastapi": "1.2"}},
        "infinity": {"title": "Infinity", "versions": {}},
    },
    "runs": {
        "64 x 1": {
            "memserve bfloat16": runs(600.0, p50_ms=100.0, p99_ms=200.0, errors={}),
            "lock float32": runs(30.0, p50_ms=900.0, p99_ms=999.0, errors={}),
            "lock bfloat16": runs(100.0, p50_ms=600.0, p99_ms=700.0, errors={"500": 3}),
        },
        "8 x 32": {"memserve bfloat16": runs(900.0, p50_ms=1.0, p99_ms=2.0, errors={}), "engine": runs(1000.0)},
        "add": {"memserve bfloat16": runs(300.0, p50_ms=1.0, p99_ms=2.0, errors={})},
    },
    "errors": {"64 x 1": {"infinity float32": "CannotInstall: no such version"}},
}


def test_the_summary_names_the_fastest_of_the_other_servers() -> None:
    assert summary(FOUND).splitlines()[2:] == [  # no slower server, no bare engine, no scenario without another server
        "| 64 clients, one short text per request | 600 | one model behind a lock 1.2, bfloat16 | 100 | 6.00 |",
    ]


def test_a_contender_that_did_not_run_is_listed_with_its_error() -> None:
    lines = "\n".join(tables(FOUND)).splitlines()
    assert "| Infinity, float32 | did not run |  |  |  | CannotInstall: no such version |" in lines
    assert "| one model behind a lock 1.2, bfloat16 | 100 | 6.00 | 600 | 700 | 500: 3 |" in lines
    assert "| memserve, bfloat16 | 600 |  | 100 | 200 | none |" in lines


@pytest.mark.parametrize("parse", [keys, scenario_keys])
def test_an_unknown_name_is_refused_by_name(parse: object) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="nobody"):
        parse("nobody")  # type: ignore[operator]


PARENT = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def serve(folder: Path, code: str) -> Server:
    port = free_port()
    return Server(
        [sys.executable, "-c", code, str(port)],
        url=f"http://127.0.0.1:{port}",
        probe=("/", {}),
        variables={},
        log=folder / "log",
    )


def wait_until_stopped(family: list[psutil.Process]) -> None:
    """Wait for a condition: a signal may take a moment on a busy machine."""
    deadline = time.monotonic() + 10
    while {process.status() for process in family} != {psutil.STATUS_STOPPED}:
        assert time.monotonic() < deadline


def test_a_server_runs_only_while_it_is_measured_and_leaves_no_process(tmp_path: Path) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    server = serve(tmp_path, PARENT)
    try:
        server.wait_until_ready()
        family = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
        assert len(family) == 2
        server.pause()
        wait_until_stopped(family)
        with server.running():
            assert psutil.STATUS_STOPPED not in {process.status() for process in family}
        wait_until_stopped(family)
    finally:
        server.end()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)


def test_replaced_replicas_are_told_from_those_that_stay(tmp_path: Path) -> None:
    child = "subprocess.Popen(['ray::ServeReplica:app:Embedder', '600'], executable='/bin/sleep')\n"
    server = serve(tmp_path, f"import subprocess\n{child}{PARENT}")
    try:
        server.wait_until_ready()
        (replica,) = server.replicas()
        process = psutil.Process(replica)
        process.kill()
        deadline = time.monotonic() + 10
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
        with pytest.raises(DidNotStart, match="fewer than 1 replicas"):
            server.wait_until_whole(1, within_s=0.5)
        server.wait_until_whole(0)
    finally:
        server.end()


def test_the_error_of_a_server_that_ends_has_its_last_line(tmp_path: Path) -> None:
    server = serve(tmp_path, "raise SystemExit('no model there')")
    with pytest.raises(DidNotStart, match="no model there"):
        server.wait_until_ready()
    server.end()


def test_the_last_line_is_the_last_that_is_not_empty() -> None:
    assert last_line("Traceback\n  ...\nValueError: no\n\n") == "ValueError: no"
    assert last_line("") == "its log is empty"
