"""Every test that SECURITY.md names exists, and every promise names one."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "SECURITY.md").read_text()
PROMISES = TEXT[TEXT.index("## Promises") : TEXT.index("**Limits of erasure.**")]
NAMED = re.findall(r"\[`(test_\w+)`\]\((tests/[\w/]+\.py)\)", PROMISES)


@cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_named_test_exists() -> None:
    assert [f"{path}::{name}" for name, path in NAMED if name not in functions_of(path)] == []


def test_every_promise_names_a_test() -> None:
    rows = [line for line in PROMISES.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 20
    assert [row for row in rows if not re.search(r"\[`test_\w+`\]\(tests/", row.split(" | ")[-1])] == []
    assert sum(row.count("[`test_") for row in rows) == len(NAMED)
