"""Makes a virtual environment for each peer under .venv-peers/, and makes it again if its requirements change.

If an installation fails, the error contains pip's last message. The report gives it as the reason for the missing peer.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import ROOT

REQUIREMENTS = Path(__file__).parent / "requirements"
ENVIRONMENTS = ROOT / ".venv-peers"
INSTALL_WITHIN_S = 1_800.0
_VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"


class CannotInstall(Exception):
    """An environment could not be installed. The message is the last message of pip."""


def python_of(environment: str | None) -> Path:
    """The interpreter of an environment, or of memserve's own environment for None."""
    return ENVIRONMENTS / environment / "bin" / "python" if environment else Path(sys.executable)


def prepare(environment: str | None) -> None:
    """Install the pinned requirements of an environment, unless they are installed. Raises CannotInstall."""
    if environment is None:
        return
    requirements = REQUIREMENTS / f"{environment}.txt"
    pinned = hashlib.sha256(requirements.read_bytes()).hexdigest()
    folder = ENVIRONMENTS / environment
    stamp = folder / ".installed"
    if stamp.exists() and stamp.read_text() == pinned:
        return
    print(f"Installing {environment} into {folder.relative_to(ROOT)} (once)", file=sys.stderr)
    python = python_of(environment)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)])
    stamp.write_text(pinned)


def versions(environment: str | None, packages: tuple[str, ...]) -> dict[str, str]:
    command = [str(python_of(environment)), "-c", _VERSIONS, *packages]
    found: dict[str, str] = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)
    return found


def _run(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=environment, timeout=INSTALL_WITHIN_S
        )
    except subprocess.TimeoutExpired as error:
        raise CannotInstall(f"not installed within {INSTALL_WITHIN_S:g} s") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise CannotInstall(said[-1] if said else f"{command[0]} ended with {done.returncode}")
