"""The circumstances of a measurement: commit, processor, card, versions. The host is not named.

python -m benchmarks.machine    # prints them, and the requirements that this environment does not meet
"""

import os
import platform
import re
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "memserve",
    "ray",
    "torch",
    "sentence-transformers",
    "transformers",
    "tokenizers",
    "hnswlib",
    "SQLAlchemy",
    "numpy",
)


def cpu() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpus() -> list[str]:
    """Names of the CUDA devices, as nvidia-smi gives them; torch is not imported."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[:-1]
    except (OSError, subprocess.CalledProcessError):
        return []


def slug(cpu: str, cores: int, gpus: list[str]) -> str:
    """A file name for a kind of machine: the card (or the processor if there is no card) and the number of cores."""
    kind = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b|@.*", " ", (gpus[0] if gpus else cpu).lower())
    count = f"{len(gpus)}x-" if len(gpus) > 1 else ""
    return f"{count}{re.sub(r'[^a-z0-9]+', '-', kind).strip('-') or 'unknown'}-{cores}-cores"


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def provenance(commit: str | None = None) -> dict[str, Any]:
    """The commit, machine, versions, command line and load average of a measurement.

    `dirty` is whether the working tree differs from the commit; None if that is unknown.

    Args:
        commit: the commit, if this copy is not a git repository.
    """
    changed = _git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return {
        "commit": commit or _git("rev-parse", "HEAD") or "unknown",
        "dirty": None if commit or changed is None else bool(changed),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu(),
        "cores": cores(),
        "gpus": gpus(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
        "command": " ".join(["python -m", _program(), *sys.argv[1:]]),
    }


def _program() -> str:
    """The name of the module that `python -m` runs."""
    spec = sys.modules["__main__"].__spec__
    return (spec.name if spec else Path(sys.argv[0]).stem).removesuffix(".__main__")


def missing() -> list[str]:
    """The server's requirements in pyproject.toml that are not installed here, or not in the required version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["server"]]
    return [gap for entry in listed if (gap := _gap(Requirement(entry)))]


def _gap(needed: Requirement) -> str | None:
    found = _version(needed.name)
    if found is None:
        return str(needed)
    return None if needed.specifier.contains(found, prereleases=True) else f"{needed} (installed: {found})"


def stem(found: dict[str, Any]) -> str:
    """`<machine>-<commit>`, with `-dirty` if the tree differed from the commit."""
    name = f"{slug(found['cpu'], found['cores'], found['gpus'])}-{found['commit'][:8]}"
    return f"{name}-dirty" if found["dirty"] else name


if __name__ == "__main__":
    gaps = missing() or "nothing that pyproject.toml lists"
    for key, value in {**provenance(), "not installed, or not in the required version": gaps}.items():
        print(f"{key}: {value}")
