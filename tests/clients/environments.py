"""Installs each client into a folder of its own under build/clients/, because the packages of clients conflict.

`packages/NAME.txt` holds pip's requirements of a Python client, `packages/NAME.json` the package.json of a Node client.
A folder is made again if that file changes. Python clients must not bring torch: the environments stay small.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = Path(__file__).parent / "packages"
PROGRAMS = Path(__file__).parent / "programs"
FOLDER = Path(__file__).resolve().parents[2] / "build" / "clients"
INSTALL_WITHIN_S = 400.0

# How pip and npm report that they do not reach the server that holds the packages.
_UNREACHABLE = ("WARNING: Retrying (", "ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT")


class CannotInstall(Exception):
    """A client could not be installed. The message is the first error of the package manager."""


class Unreachable(CannotInstall):
    """The package manager does not reach the server that holds the packages."""


def names() -> list[str]:
    """The names of all clients."""
    return sorted(path.stem for path in PACKAGES.iterdir() if path.suffix in (".txt", ".json"))


def folder_of(name: str) -> Path:
    """The folder in which a client is installed."""
    return FOLDER / name


def install(name: str) -> None:
    """Install the packages of a client, unless they are installed. Raises CannotInstall, Unreachable."""
    (packages,) = (path for path in PACKAGES.iterdir() if path.stem == name)
    wanted = hashlib.sha256(packages.read_bytes()).hexdigest()
    folder = folder_of(name)
    stamp = folder / ".installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if packages.suffix == ".json":
        shutil.copy(packages, folder / "package.json")
        _run(["npm", "install", "--no-package-lock", "--no-audit", "--no-fund"], folder)
    else:
        # Without a pip and without compiled files of its own, an environment is made in half the time.
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--quiet", "--no-input"]
        quick = ["--disable-pip-version-check", "--no-compile", "--only-binary", ":all:"]
        _run([*pip, "install", *quick, "-r", str(packages)], folder)
    stamp.write_text(wanted)


def command_of(name: str, program: Path) -> list[str]:
    """The command that runs a program with a client's packages, in the client's folder."""
    if program.suffix == ".mjs":  # a file would look for its packages beside itself, and not in the working directory
        return ["node", "--input-type=module", "-e", program.read_text()]
    return [str(folder_of(name) / "bin" / "python"), str(program)]


def environment() -> dict[str, str]:
    """The environment of a program: without this project's modules, and without a proxy between it and the server."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    return {**kept, "NO_PROXY": "127.0.0.1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


def _run(command: list[str], folder: Path) -> None:
    within: dict[str, Any] = {"cwd": folder, "env": environment(), "timeout": INSTALL_WITHIN_S}
    try:
        done = subprocess.run(command, **within, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CannotInstall(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise CannotInstall(f"not installed within {INSTALL_WITHIN_S:g} s") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "ERR" in line] or done.stderr.splitlines()
        kind = Unreachable if any(sign in done.stderr for sign in _UNREACHABLE) else CannotInstall
        raise kind(said[0] if said else f"{command[0]} ended with {done.returncode}")
