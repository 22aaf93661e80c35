"""The examples of README.md and docs/ that need a running server (tests/docs/blocks.py says how they are compared)."""

from pathlib import Path

import pytest

from tests.cluster.server import Server
from tests.docs.blocks import CLIENTS_PAGE, PAGES, differences, environment_of, needs_server

HERE = [page for page in PAGES if page != CLIENTS_PAGE and needs_server(page.read_text())]


@pytest.mark.parametrize("page", HERE, ids=lambda page: page.name)
def test_a_page_shows_what_its_examples_print(page: Path, server: Server) -> None:
    assert differences(page, server.folder, server.url, environment=environment_of(server.ray_address())) == []
