"""What `python -m deployments` finds on a machine that others use too; tests/cluster/test_launch.py starts it."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from deployments import __main__ as start


@pytest.fixture
def ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> range:
    """The runs of ports, none of which anybody claims or listens on."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(start, "_are_free", lambda _: True)
    return start.GATEWAY_PORTS


def test_a_run_of_ports_is_claimed_once(ports: range) -> None:
    assert [start._claim_gateway_ports() for _ in range(3)] == list(ports[:3])


def test_a_claim_of_another_user_is_passed_over(ports: range, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ = os.open
    theirs = {f"{tempfile.gettempdir()}/memserve-ports-{first}.lock" for first in ports[:2]}

    def refuse(path: str, *options: Any) -> int:
        if path in theirs:
            raise PermissionError(13, "Permission denied", path)
        return open_(path, *options)

    monkeypatch.setattr(os, "open", refuse)
    assert start._claim_gateway_ports() == ports[2]
    theirs |= {f"{tempfile.gettempdir()}/memserve-ports-{first}.lock" for first in ports}
    with pytest.raises(start.CannotStart):
        start._claim_gateway_ports()
