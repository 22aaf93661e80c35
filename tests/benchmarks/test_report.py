"""The reports: their arithmetic, their tables and their plots."""

import argparse
import json
import math
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from packaging.requirements import Requirement

from benchmarks import report
from benchmarks.figures import Growth, Spread, percentiles_ms, power_law, spread
from benchmarks.machine import _gap, missing, provenance, slug, stem
from benchmarks.reference import BY_NAME, SERVERS, chosen
from benchmarks.server import end, merged, parse_args, profile
from benchmarks.suite import FULL, QUICK, most
from deployments.serving.sizing import fill_in
from deployments.settings import load

MACHINE = {
    "commit": "0123456789abcdef",
    "dirty": False,
    "at": "2026-01-02T03:04:05+00:00",
    "cpu": "A Processor",
    "cores": 2,
    "gpus": [],
    "load_average_before": 0.1,
    "versions": {"ray": "2.60.0"},
    "command": "python -m benchmarks.suite",
}


def a_run(rate: float, **more: Any) -> dict[str, Any]:
    latency = {"p50_ms": 1.0, "p90_ms": 2.0, "p99_ms": 3.0, "late_p99_ms": 0.5}
    return {"requests_per_s": rate, "texts_per_s": rate, "errors": {}, **latency, **more}


def test_percentiles_are_milliseconds_or_nan_if_there_are_none() -> None:
    found = percentiles_ms([n / 1000 for n in range(1, 102)])
    assert found == pytest.approx({"p50_ms": 51.0, "p90_ms": 91.0, "p99_ms": 100.0})
    assert all(math.isnan(value) for value in percentiles_ms([]).values())


def test_a_spread_ignores_runs_without_a_value() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert spread([math.nan, 5.0]) == Spread(5.0, 5.0, 5.0)
    assert math.isnan(spread([math.nan]).median)


def test_a_power_law_is_fitted_exactly_and_through_noise() -> None:
    x = [1e2, 1e3, 1e4, 1e5]
    assert power_law(x, [3 * value**0.5 for value in x]) == pytest.approx(Growth(0.5, 3.0, 1.0))
    assert power_law(x, [7.0] * 4) == pytest.approx(Growth(0.0, 7.0, 1.0), abs=1e-9)
    noise = np.random.default_rng(1).lognormal(0, 0.1, 4)
    fit = power_law(x, 2 * np.array(x) * noise)
    assert fit.exponent == pytest.approx(1.0, abs=0.1)
    assert fit.r_squared > 0.99


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.01234, "0.0123"), (1.5, "1.50"), (45.67, "45.7"), (1234.5, "1,234"), (math.nan, "-"), (None, "-")],
)
def test_numbers_have_three_significant_digits(value: float | None, said: str) -> None:
    assert report.number(value) == said


def test_a_range_is_written_only_if_there_is_one() -> None:
    assert report.ranged(Spread(2.0, 1.0, 3.0)) == "2.00 (1.00 to 3.00)"
    assert report.ranged(Spread(2.0, 2.0, 2.0)) == "2.00"


def test_errors_add_up_over_runs() -> None:
    runs = [a_run(1, errors={"429": 2}), a_run(1, errors={"429": 3, "503": 1}), a_run(1)]
    assert report.errors(runs) == "429: 5, 503: 1"
    assert report.errors([a_run(1)]) == ""


@pytest.mark.parametrize(
    ("cpu", "cores", "gpus", "expected"),
    [
        ("Intel(R) Xeon(R) Processor", 2, [], "intel-xeon-2-cores"),
        ("AMD EPYC 9R14 96-Core Processor", 16, [], "amd-epyc-9r14-96-core-16-cores"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", 4, [], "intel-xeon-4-cores"),
        ("any", 16, ["NVIDIA H100 80GB HBM3"], "nvidia-h100-80gb-hbm3-16-cores"),
        ("any", 16, ["NVIDIA L4"] * 2, "2x-nvidia-l4-16-cores"),
        ("", 1, [], "unknown-1-cores"),
    ],
)
def test_a_file_is_named_after_the_kind_of_machine(cpu: str, cores: int, gpus: list[str], expected: str) -> None:
    assert slug(cpu, cores, gpus) == expected


def test_provenance_has_the_versions_but_no_host() -> None:
    import socket

    found = provenance("abc")
    assert (found["commit"], found["dirty"]) == ("abc", None)
    assert {"ray", "torch", "numpy"} <= set(found["versions"])
    assert socket.gethostname() not in json.dumps({**found, "command": ""})
    assert missing() == []
    assert _gap(Requirement("numpy>=99")) == f"numpy>=99 (installed: {version('numpy')})"
    assert _gap(Requirement("no-such-package[extra]")) == "no-such-package[extra]"
    assert stem({**MACHINE, "dirty": True}).endswith("-01234567-dirty")


@pytest.mark.parametrize("program", ["benchmarks.suite", "benchmarks.scaling"])  # a module, and a package
def test_provenance_names_the_command(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    said: list[str] = []
    monkeypatch.setattr(sys, "argv", ["-m", "--help"])
    monkeypatch.delitem(sys.modules, program, raising=False)

    def say(*_: Any, **__: Any) -> None:
        said.append(str(provenance("abc")["command"]))

    monkeypatch.setattr(argparse.ArgumentParser, "print_help", say)
    with pytest.raises(SystemExit):
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    assert said == [f"python -m {program} --help"]


def suite_result() -> dict[str, Any]:
    closed = [
        {"job": "embed", "size": 1, "length": "short", "clients": n, "runs": [a_run(n * 10.0), a_run(n * 30.0)]}
        for n in (1, 4)
    ]
    closed.append(
        {"job": "embed", "size": 32, "length": "mixed", "clients": 4, "runs": [a_run(5.0, errors={"429": 7})]}
    )
    opened = [{"job": "embed", "share": 0.4, "rate": 32.0, "runs": [a_run(31.0)]}]
    opened.append({"job": "embed", "share": 0.8, "rate": 64.0, "runs": [a_run(60.0)]})
    plan = {"repeats": 2, "measure_s": 1.0}
    return {"kind": "suite", **MACHINE, "plan": plan, "closed": closed, "open": opened}


def test_the_report_of_the_suite_has_tables_plots_and_provenance(tmp_path: Path) -> None:
    path = tmp_path / "machine-0123.json"
    path.write_text(json.dumps(suite_result()))
    written = report.write(path)
    assert [file.name for file in written] == [
        "machine-0123.md",
        "machine-0123-concurrency.svg",
        "machine-0123-open-loop.svg",
    ]
    said = written[0].read_text()
    assert "commit 0123456789ab, 2026" in said
    assert "| embed, 1 short | 4 | 80.0 (40.0 to 120) | 1.00 | 2.00 | 3.00 | none |" in said
    assert "| embed, 32 mixed | 4 | 5.00 | 1.00 | 2.00 | 3.00 | 429: 7 |" in said
    assert "| embed | 40% | 32.0 | 31.0 | 1.00 | 2.00 | 3.00 | 0.500 | none |" in said
    drawn = written[1].read_text()
    assert "Throughput" in drawn and "Latency, p99" in drawn
    report.write(path)
    assert written[1].read_text() == drawn  # the same result makes the same file


def test_without_matplotlib_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda _: None)
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(suite_result()))
    (written,) = report.write(path)
    assert "matplotlib is not installed" in written.read_text()
    assert "svg" not in written.read_text()


def test_growth_is_fitted_and_drawn(tmp_path: Path) -> None:
    rows = [{"users": n, "search_ms": 0.5, "file_mb": n / 1000} for n in (100, 1000, 10_000)]
    part = {"title": "Users", "x": "users", "figures": ["search_ms", "file_mb"], "rows": rows}
    path = tmp_path / "growth.json"
    path.write_text(json.dumps({"kind": "growth", **MACHINE, "parts": {"users": part}}))
    said, drawn = (file.read_text() for file in report.write(path))
    assert "| 10,000 | 0.500 | 10.0 |" in said
    assert "| search_ms | +0.00 |" in said or "| search_ms | -0.00 |" in said
    assert "| file_mb | +1.00 | 1.00 |" in said
    assert "![Users](growth-users.svg)" in said
    assert "file_mb: +1.00" in drawn


def test_a_missing_figure_is_not_fitted_and_errors_are_listed(tmp_path: Path) -> None:
    rows = [{"replicas": n, "p99_ms": 2.0 * n, "errors": ""} for n in (1, 2, 4)]
    rows.append({"replicas": 8, "p99_ms": float("nan"), "errors": "503: 7"})
    part = {"title": "Replicas", "x": "replicas", "figures": ["p99_ms"], "rows": rows}
    path = tmp_path / "growth.json"
    path.write_text(json.dumps({"kind": "growth", **MACHINE, "parts": {"replicas": part}}))
    said = report.write(path)[0].read_text()
    assert "| replicas | p99_ms | errors |" in said
    assert "| 4 | 8.00 |  |" in said
    assert "| 8 | - | 503: 7 |" in said
    assert "| p99_ms | +1.00 | 1.00 |" in said


def test_the_table_of_the_reference_has_both_ratios(tmp_path: Path) -> None:
    batch = BY_NAME["batch"]
    scenario = {**vars(batch), "runs": [a_run(300.0), a_run(400.0)], "ratios": [15.0, 17.0]}
    inside = {"in_process": [a_run(500.0), a_run(600.0)], "ratios_in_process": [20.0]}
    path = tmp_path / "reference.json"
    path.write_text(json.dumps({"kind": "reference", **MACHINE, "scenarios": [scenario, {**scenario, **inside}]}))
    (written,) = report.write(path)
    ratio = "| one batch of 50 | 13.16x | **16.0x** (15.0 to 17.0) | sequential |"
    assert f"{ratio} 251 to 430 | 350 (300 to 400) | 1.00, 3.00 | - | - | - |" in written.read_text()
    assert f"{ratio} 251 to 430 | 350 (300 to 400) | 1.00, 3.00 | **20.0x** | 550 (500 to 600) | 1.00, 3.00 |" in (
        written.read_text()
    )


def test_a_chosen_scenario_brings_the_base_of_its_ratio() -> None:
    assert [scenario.name for scenario in chosen(["queued"])] == ["unqueued", "queued"]
    assert [scenario.name for scenario in chosen([])] == list(BY_NAME)
    assert {scenario.server for scenario in BY_NAME.values()} == set(SERVERS)


@pytest.mark.parametrize("name", SERVERS)
def test_every_server_of_the_reference_has_valid_settings(name: str) -> None:
    settings = load(merged(profile(2, 0), SERVERS[name]))
    assert settings.store.synchronous == "FULL"
    assert settings.embedder.max_replicas == (2 if name == "several" else 1)
    assert settings.queue.enabled is (name != "one, no queue")


@pytest.mark.parametrize(("cores", "gpus"), [(2, 0), (4, 0), (8, 0), (16, 0), (4, 1), (8, 1), (16, 1), (64, 8)])
def test_a_profile_fits_its_machine(cores: int, gpus: int) -> None:
    settings = fill_in(load(profile(cores, gpus)), cores, gpus)
    for part in (settings.embedder, settings.gateway, settings.store):
        assert part.min_replicas == part.max_replicas
    needed = sum(part.max_replicas * part.num_cpus for part in (settings.embedder, settings.gateway, settings.store))
    assert needed <= cores
    assert settings.embedder.max_replicas * settings.embedder.num_gpus <= gpus


@pytest.mark.parametrize("kind", report.KINDS)
def test_a_published_report_is_made_from_the_json_next_to_it(kind: str) -> None:
    path = report.PUBLISHED / f"{kind}.json"
    found = {**json.loads(path.read_text()), "stem": kind, "drawn": True}
    assert path.with_suffix(".md").read_text() == report.markdown(found)
    plots = re.findall(r"\]\((.+?\.svg)\)", report.markdown(found))
    assert all((report.PUBLISHED / plot).is_file() for plot in plots)
    assert bool(plots) is bool(report.KINDS[kind].plots)


def test_a_result_is_published_under_the_name_of_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PUBLISHED", tmp_path)
    monkeypatch.setattr(report, "find_spec", lambda _: None)
    path = tmp_path / "machine-0123.json"
    path.write_text(json.dumps(suite_result()))
    assert report.publish(path) == [tmp_path / "suite.json", tmp_path / "suite.md"]
    assert (tmp_path / "suite.json").read_text() == path.read_text()


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep(600)
"""


def test_a_server_that_ignores_sigterm_is_killed_with_its_children() -> None:
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    end(process, 0.2)
    assert process.returncode is not None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_settings_are_merged_by_section_and_parsed_from_json() -> None:
    one = {"gateway": {"min_replicas": 1, "num_cpus": 0.2}}
    assert merged(one, {"gateway": {"num_cpus": 0.5}, "store": {}}) == {
        "gateway": {"min_replicas": 1, "num_cpus": 0.5},
        "store": {},
    }
    assert one["gateway"]["num_cpus"] == 0.2
    assert parse_args('{"cache": {"max_bytes": 0}}') == {"cache": {"max_bytes": 0}}
    with pytest.raises(ValueError, match="object of sections"):
        parse_args('{"cache": 1}')


def test_plans_take_minutes_and_every_open_loop_has_a_closed_loop() -> None:
    assert FULL.seconds < 10 * 60
    assert QUICK.seconds < 2 * 60
    for plan in (FULL, QUICK):
        assert {one.job for one in plan.opens} <= {cell.job for cell in plan.cells if cell.size == 1}
        assert len(set(plan.cells)) == len(plan.cells)


def test_the_best_rate_is_of_single_short_texts() -> None:
    assert most(suite_result()["closed"], "embed") == 80.0
