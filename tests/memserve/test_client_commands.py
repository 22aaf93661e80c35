"""The subcommands of `memserve` that embed texts and use memories."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.shell_completion
import numpy as np
import pytest
from click.testing import CliRunner, Result
from pyarrow import parquet

import memserve
from memserve import command
from tests.memserve.transports import Server, vectors_of

SERVER = 'pip install "memserve[server]"'
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def variables(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSERVE_URL", server.url)
    monkeypatch.delenv("MEMSERVE_API_KEY", raising=False)


@pytest.fixture
def client(server: Server) -> Iterator[memserve.Client]:
    with memserve.Client(server.url) as client:
        for user in client.users():
            client.delete_user(user.user_id)
        yield client


def run(*arguments: str, stdin: str = "", status: int = 0) -> Result:
    result = CliRunner().invoke(command.memserve, list(arguments), input=stdin, prog_name="memserve")
    assert result.exit_code == status, result.output
    return result


def objects(result: Result) -> list[Any]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_add_search_and_users(client: memserve.Client) -> None:
    assert [row.split()[1] for row in run("add", "-u", "anna", "Anna skis.", "Anna rows.").stdout.splitlines()] == [
        "status",
        "added",
        "added",
    ]
    head, best, _ = run("search", "-u", "anna", "Anna skis.").stdout.splitlines()
    assert head.split() == ["score", "text", "created", "id"]
    assert "Anna skis." in best
    (found,) = objects(run("search", "-u", "anna", "rows", "--mode", "words", "--json"))
    assert (found["text"], found["score"]) == ("Anna rows.", 1.0)
    assert run("search", "-u", "nobody", "rows", "--json").stdout == ""
    assert run("users").stdout.splitlines()[1].split()[:2] == ["anna", "2"]
    client.add("ben", ["Ben sings."])
    assert [one["user_id"] for one in objects(run("users", "--json"))] == ["anna", "ben"]
    assert [one["user_id"] for one in objects(run("users", "--json", "--limit", "1"))] == ["anna"]
    assert [one["user_id"] for one in objects(run("users", "--json", "--prefix", "b"))] == ["ben"]


def test_add_reads_lines_from_standard_input(client: memserve.Client) -> None:
    options = ["--metadata", '{"source": "notes"}', "--thread", "t", "--json"]
    added = objects(run("add", "-u", "anna", *options, stdin="Tea.\n\nCoffee [red].\n"))
    assert [one["status"] for one in added] == ["added", "added"]
    memories = [*client.list("anna", order="created_at")]
    assert [(one.text, one.metadata, one.thread) for one in memories] == [
        ("Tea.", {"source": "notes"}, "t"),
        ("Coffee [red].", {"source": "notes"}, "t"),
    ]
    again = objects(run("add", "-u", "anna", *options, "--skip-duplicates", "Tea."))
    assert [one["status"] for one in again] == ["unchanged"]
    assert "Coffee [red]." in run("search", "-u", "anna", "Coffee", "--filter", '{"source": "notes"}').stdout


def test_export_and_import(client: memserve.Client, tmp_path: Path) -> None:
    run("add", "-u", "anna", "Anna skis.")
    file = tmp_path / "anna.ndjson"
    run("export", "-u", "anna", str(file))
    assert run("export", "-u", "anna").stdout == file.read_text()
    assert objects(run("import", "-u", "ben", str(file), "--json")) == [{"imported": 1, "unchanged": 0}]
    imported = run("import", "-u", "ben", stdin=file.read_text()).stdout
    assert imported.split() == ["imported", "unchanged", "0", "1"]


def test_embed_writes_three_formats(tmp_path: Path) -> None:
    texts = ["tea", "two words", "ä"]
    source = tmp_path / "texts.txt"
    source.write_text("tea\n\ntwo words\r\nä")
    expected = vectors_of(texts)
    rows = objects(run("embed", str(source)))
    assert [row["text"] for row in rows] == texts
    assert np.array_equal(np.array([row["embedding"] for row in rows], np.float32), expected)
    assert objects(run("embed", stdin="tea\n")) == rows[:1]
    run("embed", str(source), "-o", f"{tmp_path}/vectors.npy")
    assert np.array_equal(np.load(tmp_path / "vectors.npy"), expected)
    run("embed", str(source), str(source), "-o", f"{tmp_path}/table.parquet", "--dimensions", "4")
    table = parquet.read_table(tmp_path / "table.parquet")
    assert table["text"].to_pylist() == texts * 2
    assert np.array(table["embedding"].to_pylist(), np.float32).shape == (6, 4)
    run("embed", str(source), "-o", f"{tmp_path}/any", "--format", "npy", "--input-type", "query")
    assert np.load(tmp_path / "any").shape == (3, 32)
    assert run("embed", stdin="").stdout == ""


def test_a_folder_is_used_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSERVE_MODEL__PROVIDER", "fake")
    monkeypatch.setenv("MEMSERVE_MODEL__NAME", "fake")
    folder = str(tmp_path / "memories")
    run("add", "--local", folder, "-u", "anna", "Anna skis.")
    assert [one["text"] for one in objects(run("search", "--local", folder, "-u", "anna", "skis", "--json"))] == [
        "Anna skis."
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["add", "-u", "", "x"], 1, "memserve add: user_id: must be a string of 1 to 256 characters\n"),
        (["add", "-u", "anna", " "], 1, "memserve add: memories.0.text: must not be empty\n"),
        (["search", "-u", "anna", "x", "--filter", '{"n": {"near": 1}}'], 1, "memserve search: filter.n.near: "),
        (["import", "-u", "anna", "no-such-file"], 1, "memserve import: [Errno 2] No such file"),
        (["users", "--url", "http://127.0.0.1:1"], 1, "memserve users: The server cannot be reached: "),
        (["users", "--url", "nonsense"], 1, "memserve users: "),
        (["search", "-u", "anna", "x", "--filter", "[1]"], 2, "'[1]' is not a JSON object."),
        (["search", "-u", "anna", "x", "--filter", "{"], 2, "'{' is not JSON: "),
        (["search", "x"], 2, "Missing option '-u'"),
        (["embed", "no-such-file"], 2, "no-such-file"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    arguments: list[str], status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memserve.retries.FIRST_DELAY_S", 0.001)
    result = run(*arguments, status=status)
    assert message in result.stderr
    assert status == 2 or len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["embed", "add", "search", "import", "export", "users", "top", "completion"])
def test_every_help_has_an_example(name: str) -> None:
    assert "Example" in run(name, "--help").stdout


def test_a_missing_package_is_reported_in_one_line(tmp_path: Path) -> None:
    code = "import sys; sys.modules[{!r}] = None; sys.argv[1:] = {!r}; from memserve.__main__ import main; main()"
    for package, arguments, advice in (
        ("pyarrow", ["embed", "-o", f"{tmp_path}/x.parquet"], 'parquet needs it: pip install "memserve[parquet]"'),
        ("sqlalchemy", ["users", "--local", str(tmp_path)], f"this command needs the server: {SERVER}"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.format(package, arguments)],
            cwd=ROOT,
            env={**os.environ, "MEMSERVE_MODEL__PROVIDER": "fake"},
            input="tea\n",
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (
            1,
            f"memserve {arguments[0]}: {package} is not installed; {advice}\n",
        )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click.shell_completion.BashComplete, "_check_version", lambda *_: None)
    assert "_MEMSERVE_COMPLETE" in run("completion", shell).stdout


def test_commands_and_options_are_completed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "memserve"],
        cwd=ROOT,
        env={**os.environ, "_MEMSERVE_COMPLETE": "bash_complete", "COMP_WORDS": "memserve se", "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["plain,search", "plain,serve"]
