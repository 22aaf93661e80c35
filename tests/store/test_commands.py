"""`memserve log` on a log: each command, what it prints, and its exit status."""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psycopg
import pytest
from click.testing import CliRunner, Result

from memserve import command
from store import Append, Imported, LogUnavailable, NewMemory, Store, commands
from store.records import DEFAULT_TENANT as T
from tests.store.conftest import DIM

EYE = np.eye(DIM, dtype=np.float32)


def run(*arguments: str, given: bytes = b"") -> Result:
    """`memserve log` with these arguments and standard input."""
    return CliRunner().invoke(command.memserve, ["log", *arguments], input=given, prog_name="memserve")


def fill(store: Store, user: str = "ann", count: int = 20) -> None:
    made = tuple(NewMemory(str(n), f"{user} {n}", EYE[n % DIM] + n * EYE[0], {"n": n}) for n in range(count))
    store.append([Append(T, user, made, issued_at=store._now())])


@pytest.mark.parametrize("arguments", ["stats", "verify", "compact", "export --user a", "reembed --model a --url b"])
def test_a_log_that_is_not_there_is_not_made(tmp_path: Path, arguments: str) -> None:
    name, *more = arguments.split()
    result = run(name, "--log", f"sqlite:///{tmp_path}/typo.db", *more)
    assert result.exit_code == 2
    assert f"There is no log at {tmp_path}/typo.db" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_log")
def test_a_database_without_a_log_is_left_as_it_is(postgres_url: str) -> None:
    result = run("verify", "--log", postgres_url)
    assert result.exit_code == 2
    assert "holds no log" in result.stderr
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE tablename = 'meta'").fetchone() == (0,)


def test_each_command(store: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    out = tmp_path / "ann.ndjson"
    assert run("export", "--log", url, "--user", "ann", str(out)).exit_code == 0
    assert len(out.read_bytes().splitlines()) == 20
    result = run("import", "--log", url, "--user", "bob", str(out))
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"imported": 20, "unchanged": 0})
    result = run("stats", "--log", url)
    assert (result.exit_code, json.loads(result.stdout)["memories"]) == (0, 40)
    result = run("verify", "--log", url)
    assert (result.exit_code, result.stdout) == (0, "sound\n")

    busy = iter([True])

    def answer(request: httpx.Request) -> httpx.Response:
        if next(busy, False):
            return httpx.Response(503, headers={"Retry-After": "0"})
        asked = json.loads(request.content)
        assert asked["model"] == "new"  # a server of another model refuses it
        vectors = [np.array([len(text), text.count("1") + 1, 5, 1], "<f4") for text in asked["input"]]
        data = [{"index": n, "embedding": b64encode(vector.tobytes()).decode()} for n, vector in enumerate(vectors)]
        return httpx.Response(200, json={"data": data[::-1]})

    real = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **options: real(transport=httpx.MockTransport(answer), **options))
    arguments = ["reembed", "--log", url, "--model", "new", "--url", "http://127.0.0.1:1/"]
    result = run(*arguments)
    assert result.exit_code == 0
    assert "40 memories embedded" in result.stdout
    result = run(*arguments)
    assert result.exit_code == 2
    assert "nothing to do" in result.stderr
    assert run("compact", "--log", url).exit_code == 0
    assert run("verify", "--log", url).exit_code == 0
    assert run("export", "--log", "sqlite:////dev/null/x", "--user", "a").exit_code == 2


def test_without_a_file_memories_go_through_standard_output_and_input(store: Store, url: str) -> None:
    fill(store)
    lines = run("export", "--log", url, "--user", "ann").stdout_bytes
    assert len(lines.splitlines()) == 20
    result = run("import", "--log", url, "--user", "bob", given=lines)
    assert json.loads(result.stdout) == {"imported": 20, "unchanged": 0}
    assert run("export", "--log", url, "--user", "bob").stdout_bytes == lines


def test_verify_prints_each_problem_and_exits_with_1(url: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    monkeypatch.setattr("store.log.maintenance.verify", lambda log, progress: iter(["one", "another"]))
    result = run("verify", "--log", url)
    assert (result.exit_code, result.stdout) == (1, "one\nanother\n2 problems\n")


@pytest.mark.parametrize("name", ["export", "import"])
def test_a_file_error_is_reported_in_one_line(store: Store, url: str, tmp_path: Path, name: str) -> None:
    fill(store)
    result = run(name, "--log", url, "--user", "ann", f"{tmp_path}/no/such.ndjson")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line == f"memserve log {name}: [Errno 2] No such file or directory: '{tmp_path}/no/such.ndjson'"


def test_an_import_reads_its_file_as_it_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = io.BytesIO(b"a line\n" * 1000)
    read: list[int] = []

    class Taking:
        def import_lines(self, tenant: str, user_id: str, lines: Iterator[bytes]) -> Imported:
            for _ in lines:
                read.append(file.tell() // len(b"a line\n"))
            return Imported(len(read), 0)

        def close(self) -> None:
            pass

    monkeypatch.setattr(commands, "_open_store", lambda url, first_line: Taking())
    commands.import_("sqlite:///x", T, "ann", lambda: file)
    assert read == list(range(1, 1001))
    assert json.loads(capsys.readouterr().out) == {"imported": 1000, "unchanged": 0}


def test_a_url_that_cannot_be_read_is_reported_in_one_line(store: Store, url: str) -> None:
    fill(store)
    result = run("reembed", "--log", url, "--model", "new", "--url", "http://HOST:PORT")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line == "memserve log reembed: Invalid port: 'PORT'"


@pytest.mark.parametrize(
    "answer",
    [
        {"content": b"<html>"},
        {"content": b"\xff"},
        {"json": []},
        {"json": {}},
        {"json": {"data": [{"index": 0}]}},
        {"json": {"data": [{"index": 0, "embedding": "AAA"}]}},
        {"json": {"data": []}},
    ],
)
def test_an_answer_that_holds_no_embeddings_names_its_server(answer: dict[str, Any]) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, **answer))
    with httpx.Client(transport=transport, base_url="http://peer:1") as client:
        embed = commands._embed_at(client, "new", None)
        with pytest.raises(LogUnavailable, match="http://peer:1/v1/embeddings"):
            embed(["tea"])


@pytest.mark.parametrize(
    ("header", "pause_s"), [("7", 7.0), ("600", 30.0), ("Fri, 31 Dec 2027 23:59:59 GMT", 1.0), ("-1", 1.0), (None, 1.0)]
)
def test_a_busy_server_is_asked_again(header: str | None, pause_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(commands.time, "sleep", pauses.append)
    answers = iter([httpx.Response(503, headers={"Retry-After": header} if header else {}), httpx.Response(404)])
    transport = httpx.MockTransport(lambda request: next(answers))
    with httpx.Client(transport=transport, base_url="http://peer:1") as client:
        embed = commands._embed_at(client, "new", None)
        with pytest.raises(LogUnavailable, match="answers 404"):
            embed(["tea"])
    assert pauses == [pause_s]


def test_the_default_tenant_is_the_stores() -> None:
    assert command.DEFAULT_TENANT == T
