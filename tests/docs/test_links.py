"""Relative links between the pages, and from them to files and headings, lead somewhere."""

import re
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT

_FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
DOCUMENTS = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]


def links(text: str) -> list[str]:
    """The relative links of a page."""
    found = (link[1] or link[2] for link in _LINK.finditer(_FENCED.sub("", text)))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(text: str) -> set[str]:
    """The anchors that a link may name after `#`: the headings, as MkDocs and GitHub write them."""
    headings = _HEADING.findall(_FENCED.sub("", text))
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def test_links_and_anchors_are_found() -> None:
    assert links('[a](b.md#c) ![d](e.svg) [f](https://g.h) <img src="i.svg">\n```\n[x](y)\n```\n') == [
        "b.md#c",
        "e.svg",
        "i.svg",
    ]
    assert anchors("# Fast, and safe\n```\n# no heading\n```\n## `memserve log`\n") == {"fast-and-safe", "memserve-log"}


@pytest.mark.parametrize("page", [one for one in DOCUMENTS if one.is_file()], ids=lambda one: one.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for link in links(text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{page.name}: {link}"
