"""Runs the examples of README.md and docs/ and compares what they print with what the page shows.

Two kinds of blocks are run, in the order of the page:

- A ``console`` block. A line that begins with `$ ` is a command, which continues on the next line if it ends in a
  backslash. The lines below it are what the command prints; none if it prints nothing.
- A ``python`` or ``js`` block that is directly followed by an ``output`` block: a program of its own, and what it
  prints.

Other blocks are not run. Some things differ from run to run. In a page a UUID stands for any UUID, a time for any time,
and a number with three decimals or more for any number within 0.02 of it. `...` stands for anything within a line, and
a line of only `...` for any lines. White space in JSON does not count, so that a long answer can be broken over lines.

The examples of one page share a folder. `http://127.0.0.1:8000` is replaced by the server that is tested, which is also
the default of `memserve.Client`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLIENTS_PAGE = ROOT / "docs" / "clients.md"  # its programs need other packages: tests/clients runs them
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
SERVER = "http://127.0.0.1:8000"
TIMEOUT_S = 60.0
TOLERANCE = 0.02  # bfloat16 on one machine and float32 on another

_OF_A_SERVER = (SERVER, "get_app_handle", "Client()", ".in_cluster()")

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z"
_NUMBER = r"-?\d+\.\d{3,}(?:e-?\d+)?"
_VARYING = re.compile(rf"(?P<any>\.\.\.)|(?P<uuid>{_UUID})|(?P<time>{_TIME})|(?P<number>{_NUMBER})")


@dataclass(frozen=True)
class Example:
    """One command or program of a page.

    Attributes:
        line: of the page, counted from 1.
        language: `bash`, `python` or `js`.
        section: the heading above it, of the second level.
    """

    line: int
    language: str
    source: str
    output: str
    section: str = ""


def examples(page: str) -> list[Example]:
    """The commands and programs of a page, in its order."""
    found: list[Example] = []
    fences = list(_FENCE.finditer(page))
    for number, fence in enumerate(fences):
        line = page[: fence.start()].count("\n") + 1
        content = re.sub(rf"^{fence[1]}", "", fence[3], flags=re.MULTILINE)
        section = ["", *_SECTION.findall(page[: fence.start()])][-1]
        if fence[2] == "console":
            found += _commands(content, line + 1, section)
        if fence[2] == "output":
            before = fences[number - 1] if number else None
            if before is None or before[2] not in ("python", "js") or page[before.end() : fence.start()].strip():
                raise ValueError(f"line {line}: an output block must directly follow a program")
            first = page[: before.start()].count("\n") + 2
            source = re.sub(rf"^{before[1]}", "", before[3], flags=re.M)
            found.append(Example(first, before[2], source, content, section))
    return found


def _commands(content: str, line: int, section: str) -> Iterator[Example]:
    lines = content.splitlines()
    if not lines or not lines[0].startswith("$ "):
        raise ValueError(f"line {line}: a console block must begin with a command")
    at = 0
    while at < len(lines):
        first = at
        while lines[at].endswith("\\"):
            at += 1
        at += 1
        command = "\n".join(lines[first:at]).removeprefix("$ ")
        shown = at
        while at < len(lines) and not lines[at].startswith("$ "):
            at += 1
        yield Example(line + first, "bash", command, "\n".join(lines[shown:at]), section)


def needs_server(page: str) -> bool:
    """Whether an example of a page is about a running server."""
    return any(name in one.source for one in examples(page) for name in _OF_A_SERVER)


def run(
    example: Example, folder: Path, server: str, environment: Mapping[str, str], python: str = sys.executable
) -> str:
    """What an example prints; with its standard error if it fails. Node finds the packages of `folder`."""
    source = example.source.replace(SERVER, server)
    interpreters = {"bash": ["bash", "-c"], "python": [python, "-c"], "js": ["node", "--input-type=module", "-e"]}
    command = [*interpreters[example.language], source]
    variables = {**environment, "MEMSERVE_URL": server}
    done = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    failed = done.stderr if done.returncode else ""
    return (done.stdout + failed).replace(server, SERVER)


def environment_of(ray_address: str = "") -> dict[str, str]:
    """The environment in which a page expects its examples to run: that of memserve."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return {**environment, "RAY_ADDRESS": ray_address} if ray_address else environment


def differences(
    page: Path,
    folder: Path,
    server: str = SERVER,
    section: str | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    python: str = sys.executable,
) -> list[str]:
    """Run the examples of a page, in its order. Returns where it shows something else than they print.

    Args:
        page: of README.md or docs/.
        folder: the working directory.
        server: the URL of the server that is tested.
        section: only the examples below this heading.
        environment: by default memserve's.
        python: the interpreter of Python programs.
    """
    found = []
    for example in examples(page.read_text()):
        if section not in (None, example.section):
            continue
        printed = run(example, folder, server, environment or environment_of(), python)
        if not matches(example.output, printed):
            found.append(f"{page.name}:{example.line} prints:\n{printed}")
    return found


def matches(expected: str, printed: str) -> bool:
    """Whether a program printed what a page shows; see the module for what may differ."""
    expected, printed = expected.strip(), printed.strip()
    if expected.startswith(("{", "[")):
        expected, printed = re.sub(r"\s", "", expected), re.sub(r"\s", "", printed)
    pattern, numbers = "", []
    at = 0
    for varying in _VARYING.finditer(expected):
        pattern += re.escape(expected[at : varying.start()])
        at = varying.end()
        if varying["any"]:
            alone = re.search(r"(^|\n)$", expected[: varying.start()]) and re.match(r"\n|$", expected[at:])
            pattern += "(?s:.*?)" if alone else ".*?"
        elif varying["uuid"]:
            pattern += _UUID
        elif varying["time"]:
            pattern += _TIME
        else:
            pattern += r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)"
            numbers.append(float(varying["number"]))
    found = re.fullmatch(pattern + re.escape(expected[at:]), printed)
    return found is not None and all(
        abs(float(one) - number) <= TOLERANCE for one, number in zip(found.groups(), numbers, strict=True)
    )
