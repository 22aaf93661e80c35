"""The lists that are written by hand in the pages are complete."""

import re

from tests.docs.blocks import ROOT


def test_operations_names_every_metric() -> None:
    metrics = set(re.findall(r'"(memserve_\w+)"', (ROOT / "deployments" / "metrics.py").read_text()))
    assert len(metrics) >= 13
    page = (ROOT / "docs" / "operations.md").read_text()
    assert {name for name in metrics if f"`{name}`" not in page} == set()


def test_index_and_site_lead_to_every_page() -> None:
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")}
    index = (ROOT / "docs" / "index.md").read_text()
    by_hand = {page for page in pages if not page.startswith("benchmarks/")} - {"index.md"}
    assert {page for page in by_hand if f"]({page})" not in index} == set()
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert {page for page in pages if f": {page}\n" not in navigation} == set()
