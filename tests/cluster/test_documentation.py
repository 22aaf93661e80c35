"""The examples of README.md and docs/ that need a running server (tests/docs/blocks.py says how they are compared)."""

from pathlib import Path

import pytest

from tests.cluster.server import Server
from tests.docs.blocks import PAGES, differences, needs_server


@pytest.mark.parametrize("page", [one for one in PAGES if needs_server(one.read_text())], ids=lambda one: one.name)
def test_a_page_shows_what_its_examples_print(page: Path, server: Server) -> None:
    assert differences(page, server.folder, server.url, server.ray_address()) == []
