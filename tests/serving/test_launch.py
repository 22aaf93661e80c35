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


def test_haproxys_ports_move_into_the_claimed_run(ports: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to any that are free at the moment: Ray takes some of those before HAProxy starts."""
    names = list(start.HAPROXY_PORTS)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    first = start._environment()
    assert [first[name] for name in names] == ["8404", "9101"]
    monkeypatch.setattr(start, "_are_free", lambda asked: not {8404, 9101} & set(asked))
    second = start._environment()
    assert [second[name] for name in names] == [str(ports[1] + 98), str(ports[1] + 97)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"applications: \xff", "not YAML: 'utf-8' codec can't decode byte 0xff"),
        (b"applications: [{args: {1: 2}}]", "1: unknown setting"),
        (
            b"applications: [{args: {model: {provider: fake}}, deployments: [{name: Store, user_config: 5}]}]",
            "user_config of Store: must be a mapping",
        ),
        (b"{applications: [{args: {model: {provider: fake}}}], http_options: {host: 5}}", "http_options.host: 5 is no"),
    ],
)
def test_a_config_of_a_wrong_kind_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes, message: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_bytes(text)
    assert start.main([str(config)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"memserve: {config}: {message}")
