"""docs/api.md, docs/settings.md and openapi.json are up to date with the code."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))


def test_the_generated_files_are_current_and_need_no_ray() -> None:
    program = (
        "import runpy, sys; sys.argv = ['docs/generate.py', '--check']\n"
        "try: runpy.run_path('docs/generate.py', run_name='__main__')\n"
        "finally: assert 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_a_check_names_an_outdated_file_and_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("old")
    main = GENERATE["main"]
    monkeypatch.setitem(main.__globals__, "ROOT", tmp_path)
    monkeypatch.setitem(main.__globals__, "generated", lambda: {page: "new"})
    assert main(["--check"]) == 1
    assert capsys.readouterr().out == "page.md is out of date: run python docs/generate.py\n"
    assert page.read_text() == "old"
    assert main([]) == 0
    assert page.read_text() == "new"
    assert main(["--check"]) == 0


@pytest.mark.parametrize(
    ("schema", "with_null", "words"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 1000}, True, "integer, 1 to 1000"),
        ({"type": "integer", "minimum": 1024}, True, "integer, at least 1024"),
        ({"type": "number", "exclusiveMinimum": 0.0, "maximum": 1.0}, True, "number, above 0, at most 1"),
        ({"type": "string", "minLength": 1}, True, "string, not empty"),
        ({"type": "string", "format": "date-time"}, True, "time"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, False, "string"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, True, "string or null"),
        ({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}, True, "integer, at least 1, or null"),
        (
            {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                    {"type": "null"},
                ]
            },
            True,
            "string or list of integers or null",
        ),
        ({"enum": ["add", "skip"], "type": "string"}, True, '`"add"`, `"skip"`'),
        (
            {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}, "maxItems": 9},
            True,
            "list of lists of integers, at most 9 items",
        ),
        ({"$ref": "#/components/schemas/NewMemoryBody"}, True, "[NewMemoryBody](#newmemorybody)"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, False, "object of integers"),
    ],
)
def test_a_type_is_shown_with_its_limits(schema: dict[str, Any], with_null: bool, words: str) -> None:
    assert GENERATE["type_of"](schema, with_null=with_null) == words


def test_every_route_and_every_object_it_refers_to_is_on_the_page() -> None:
    document = GENERATE["openapi_document"]()
    page = GENERATE["api_page"](document)
    headings = {line.removeprefix("### ") for line in page.splitlines() if line.startswith("### ")}
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in headings
    anchors = {heading.lower() for heading in headings}
    for name in document["components"]["schemas"]:
        assert f"(#{name.lower()})" not in page or name.lower() in anchors, name


def test_twenty_everyday_settings_come_first() -> None:
    everyday = GENERATE["EVERYDAY"]
    assert len(set(everyday)) == 20
    page = GENERATE["settings_page"](GENERATE["Settings"].model_json_schema())
    first, rest = page.split("## All settings")
    assert [line.split("`")[1] for line in first.splitlines() if line.startswith("| `")] == list(everyday)
    for name in everyday:
        assert f"| `{name}` |" in rest
