"""The examples of README.md and docs/ that need no server, and the rules by which examples are found and compared."""

import shutil
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT, Example, differences, examples, matches, needs_server


def test_commands_and_programs_are_found_with_what_they_print() -> None:
    page = (
        "# A page\n\n```console\n$ echo one \\\n    two\none two\n$ true\n$ echo three\nthree\n```\n\n"
        "```sh\nrm x\n```\n\n```python\nprint(1)\n```\n```output\n1\n```\n"
        "## Node\n\n```js\nconsole.log(2)\n```\n\n```output\n2\n```\n"
    )
    assert examples(page) == [
        Example(4, "bash", "echo one \\\n    two", "one two"),
        Example(7, "bash", "true", ""),
        Example(8, "bash", "echo three", "three"),
        Example(17, "python", "print(1)\n", "1\n"),
        Example(25, "js", "console.log(2)\n", "2\n", "Node"),
    ]


def test_an_output_without_a_program_and_a_console_without_a_command_are_refused() -> None:
    with pytest.raises(ValueError, match="line 1: an output block must directly follow a program"):
        examples("```output\n1\n```\n")
    with pytest.raises(ValueError, match="line 5: an output block must directly follow a program"):
        examples("```python\n1\n```\nprints\n```output\n1\n```\n")
    with pytest.raises(ValueError, match="line 2: a console block must begin with a command"):
        examples("```console\nout\n```\n")


@pytest.mark.parametrize(
    ("expected", "printed", "equal"),
    [
        ("one\n", "one", True),
        ("one", "two", False),
        ("", "", True),
        ("", "one", False),
        ("one ... four", "one two three four", True),
        ("one ... four", "one two\nfour", False),
        ("one\n...\nfour", "one\ntwo\nthree\nfour", True),
        ("194c4a54-d6f4-465d-9aa6-eacc0cd28239", "00000000-0000-4000-8000-000000000000", True),
        ("194c4a54-d6f4-465d-9aa6-eacc0cd28239", "none", False),
        ('"2026-11-22T13:24:51.615872Z"', '"2027-01-01T00:00:00Z"', True),
        ("score 0.291736", "score 0.3036", True),
        ("score 0.291736", "score 0.331736", False),
        ("score -0.002", "score 0.0015", True),
        ("version 0.30", "version 0.31", False),
        ('{"a": [1,\n  2]}', '{"a":[1,2]}', True),
        ('{"a": 1}', '{"a":2}', False),
        ('{"error": {"code": "empty_input"}}', '{"error":{"code":"empty_input"}}', True),
    ],
)
def test_what_may_differ_and_what_may_not(expected: str, printed: str, equal: bool) -> None:
    assert matches(expected, printed) is equal


@pytest.mark.parametrize("page", [one for one in PAGES if not needs_server(one.read_text())], ids=lambda one: one.name)
def test_a_page_shows_what_its_examples_print(page: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "serve_config.yaml", tmp_path)
    assert differences(page, tmp_path) == []


def test_differences_name_the_line_and_what_was_printed_there(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ echo one\none\n$ echo two\nthree\n$ ls no-such-file\n```\n")
    first, second = differences(page, tmp_path)
    assert first == "page.md:4 prints:\ntwo\n"
    assert second.startswith("page.md:6 prints:\nls: ")
