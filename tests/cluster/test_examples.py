"""Each example is run as its docstring says, in a process of its own, and prints what its docstring says."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.cluster.server import ROOT, Server

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def documented_output(example: Path) -> str:
    """The output that an example's docstring shows."""
    docstring = ast.get_docstring(ast.parse(example.read_text()))
    assert docstring is not None
    _, shown = docstring.split("It prints:\n\n")
    return textwrap.dedent(shown)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_its_docstring_says(server: Server, example: Path) -> None:
    target = server.ray_address() if example.stem == "handle" else server.url
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(example), target]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout.rstrip()) == (0, documented_output(example)), run.stderr
