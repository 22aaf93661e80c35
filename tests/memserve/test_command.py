"""The command line `memserve`: what it prints, its exit status, and what it imports."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

import memserve
from deployments.__main__ import main as deployments_main
from deployments.serving import launch
from deployments.serving.ray_internals import ENVIRONMENT
from memserve import command

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"ray", "torch", "httpx", "numpy", "sqlalchemy", "store", "deployments"}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command.memserve, list(arguments), prog_name="memserve")


def python(code: str, *options: str) -> "subprocess.CompletedProcess[str]":
    """A fresh interpreter."""
    return subprocess.run([sys.executable, *options, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump({"applications": [{"args": {"model": {"provider": "fake"}}}]}))
    return path


@pytest.mark.parametrize("code", ["import memserve", "import memserve.command"])
def test_importing_memserve_imports_nothing_heavy(code: str) -> None:
    result = python(f"import sys; {code}; print(*{{name.partition('.')[0] for name in sys.modules}})")
    assert result.returncode == 0, result.stderr
    assert HEAVY & set(result.stdout.split()) == set()


def test_the_package_is_typed() -> None:
    assert (ROOT / "memserve" / "py.typed").exists()


def test_the_version() -> None:
    assert run("--version").output == f"memserve, version {memserve.__version__}\n"


@pytest.mark.parametrize(
    "path",
    [
        *("", "serve", "check", "env", "keys", "log"),
        *(f"keys {name}" for name in ("create", "list", "revoke")),
        *(f"log {name}" for name in ("stats", "verify", "export", "import", "compact", "reembed")),
    ],
)
def test_every_help_has_an_example_and_no_broken_line(path: str) -> None:
    result = run(*path.split(), "--help")
    assert result.exit_code == 0
    assert f"Usage: memserve {path}".strip() in result.output
    assert "Example" in result.output or path in ("keys", "log")


def test_check_reports_whether_a_config_file_is_valid(config: Path) -> None:
    result = run("check", str(config))
    assert (result.exit_code, result.output) == (0, f"{config} is valid\n")
    config.write_text("applications: [{args: {modle: {}}}]")
    result = run("check", str(config))
    assert (result.exit_code, result.stderr) == (1, f"memserve: {config}: modle: unknown setting\n")


def test_serve_refuses_a_wrong_config_file_in_one_line(tmp_path: Path) -> None:
    result = run("serve", f"{tmp_path}/none.yaml")
    assert (result.exit_code, result.stderr) == (1, f"memserve: {tmp_path}/none.yaml: No such file or directory\n")


@pytest.mark.parametrize("status", [0, 1])
def test_serve_ends_with_the_status_of_the_server(config: Path, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Path] = []

    def serve(path: Path) -> int:
        served.append(path)
        return status

    monkeypatch.setattr(launch, "serve", serve)
    assert run("serve", str(config)).exit_code == status
    assert run("serve").exit_code == status
    assert deployments_main([str(config)]) == status
    assert served == [config, Path("serve_config.yaml"), config]


def test_serve_and_check_work_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = ROOT / "deployments" / "serve_config.yaml"
    served: list[Path] = []
    monkeypatch.setattr(launch, "serve", lambda path: served.append(path) or 0)
    assert run("serve").exit_code == 0
    assert deployments_main([]) == 0
    assert served == [packaged, packaged]
    result = run("check")
    assert (result.exit_code, result.output) == (0, f"{packaged} is valid\n")


def test_env_prints_the_variables_for_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("env")
    assert result.exit_code == 0
    assert all(f"export {name}=" in result.output for name in ENVIRONMENT)
    assert deployments_main(["--environment"]) == 0
    assert capsys.readouterr().out == result.output


@pytest.mark.parametrize(
    ("arguments", "missing", "status"),
    [(["serve"], "psutil", 1), (["check"], "yaml", 1), (["log", "stats", "--log", "sqlite:///x"], "sqlalchemy", 2)],
)
def test_a_missing_server_is_reported_in_one_line(arguments: list[str], missing: str, status: int) -> None:
    result = python(
        f"import sys; sys.modules[{missing!r}] = None; from memserve.__main__ import main; "
        f"sys.argv[1:] = {arguments!r}; main()"
    )
    name = " ".join(arguments[:2]) if arguments[0] == "log" else arguments[0]
    assert (result.returncode, result.stderr) == (
        status,
        f'memserve {name}: {missing} is not installed; this command needs the server: pip install "memserve[server]"\n',
    )


def test_a_wrong_option_exits_with_2() -> None:
    assert run("serve", "--port", "1").exit_code == 2
    assert run("log", "stats").exit_code == 2
    assert run("nothing").exit_code == 2
