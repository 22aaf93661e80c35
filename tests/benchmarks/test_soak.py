"""The soak benchmark: its requests, its samples of memory and its report."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import pytest

from benchmarks import report, soak
from benchmarks.machine import provenance
from benchmarks.soak import MIB, Client, Plan, Process, Sampler, change, measure, role_of


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["ray::ServeReplica:memserve:embedder"], "embedder"),
        (["ray::ServeReplica:memserve:gateway.handle_request"], "gateway"),
        (["ray::ServeController.listen_for_change"], "ServeController"),
        (["ray::IDLE"], "IDLE"),
        (["/opt/ray/core/src/ray/raylet/raylet", "--port=1"], "raylet"),
        (["/usr/bin/python3", "-u", "/opt/ray/dashboard/agent.py", "--x"], "agent"),
        (["python", "-m", "deployments", "serve_config.yaml"], "deployments"),
        ([], ""),
    ],
)
def test_roles_of_processes(command: list[str], role: str) -> None:
    assert role_of(command) == role


def test_the_sampler_reads_the_memory_of_descendants() -> None:
    waits = "b = bytearray(50 << 20); print('there', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"there\n"
        sampler = Sampler(psutil.Process())
        sampler.sample()
        sampler.sample()
        seen = sampler.processes[child.pid]
        child.communicate(b"\n")
        sampler.sample()
    assert (len(seen.seconds), len(seen.rss), len(seen.uss)) == (2, 2, 2)
    assert seen.rss[0] > 50 << 20
    assert seen.uss[0] > 50 << 20


def test_memory_is_compared_after_the_warm_up() -> None:
    plan = Plan(100, 200)  # medians of 10 s
    process = Process("store", 7)
    for second in range(301):
        process.seconds.append(second)
        process.rss.append((200 if 99 < second < 110 else 900 if second == 150 else 250 if second > 290 else 10) * MIB)
        process.uss.append(second * MIB)
    row = process.figures(plan)
    assert (row["rss_first"], row["rss_last"], row["rss_most"]) == (200, 250, 900)
    assert (row["uss_first"], row["uss_last"], row["uss_most"]) == (104.5, 295.5, 300)
    assert change(row["rss_first"], row["rss_last"]) == "+25%"
    assert len(row["seconds"]) == len(row["rss"]) == 301


async def test_a_client_sends_requests_of_every_kind_and_erases_full_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "ENOUGH", 20)
    sent: Counter[str] = Counter()

    async def answer(request: httpx.Request) -> httpx.Response:
        await soak.asyncio.sleep(0)
        path = request.url.path.replace("/v1/users/soak-0-", "").lstrip("0123456789")
        sent[f"{request.method} {path}"] += 1
        if request.method in ("POST", "PATCH"):
            for line in request.content.splitlines():
                orjson.loads(line)
        return httpx.Response(200, json={})

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://there") as http:
        client = Client(http, 0, seed=1)
        for job in client._jobs:
            await job("soak-0-1")
        with pytest.raises(TimeoutError):
            async with soak.asyncio.timeout(1.0):
                await client.run()
    assert {path.partition("/memories/m")[0] for path in sent} == {
        "POST /v1/embeddings",
        "POST /memories",
        "POST /memories/search",
        "PATCH ",
        "GET /memories",
        "GET /export",
        "POST /import",
        "DELETE ",
        "DELETE /memories",
    }
    assert client.answers["erase 200"] > 0
    assert sum(client.answers.values()) > 20


async def test_a_request_without_an_answer_ends_the_benchmark() -> None:
    with pytest.raises(httpx.ConnectError):
        await measure("http://127.0.0.1:9", Plan(5, 5), Sampler(psutil.Process()), seed=1)


def found() -> dict[str, Any]:
    process = Process("embedder", 7, [0.0, 10.0, 20.0, 30.0], [MIB * n for n in (50, 80, 90, 88)], [MIB] * 4)
    answers = {"search 200": 1200, "search 429": 3, "add_one 201": 9}
    figures = [process.figures(Plan(10, 20))]
    return {"kind": "soak", **provenance(), "warm_up_s": 10, "duration_s": 20, "processes": figures, "answers": answers}


def test_the_report_names_processes_and_answers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = report.save(found(), tmp_path / "soak.json")
    assert {path.name for path in written} >= {"soak.md", "soak.svg"}
    text = (tmp_path / "soak.md").read_text()
    assert "| embedder | 80.0 | 88.0 | 90.0 | +10% | 1.00 | 1.00 | 1.00 | +0% |" in text
    assert "| search | 1,203 | 200: 1,200, 429: 3 |" in text
    assert "| add one | 9 | 201: 9 |" in text
    assert "![Memory of each process over time](soak.svg)" in text
