"""A gateway that asks for no key does not serve on an address that other machines reach, however it was started."""

from pathlib import Path

import pytest

from deployments import gateway
from deployments.serving import address
from tests.local_app import LocalApp


@pytest.mark.parametrize(
    ("mode", "host", "served"),
    [
        ("loopback", "127.0.0.1", True),
        ("loopback", "localhost", True),
        ("loopback", "0.0.0.0", False),
        ("loopback", "", False),  # Serve's default, if a config file names none
        ("keys", "0.0.0.0", True),
        ("open", "0.0.0.0", True),
    ],
)
async def test_a_gateway_does_not_serve_where_others_reach_it_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, host: str, served: bool
) -> None:
    app = await LocalApp.start(tmp_path, auth={"mode": mode})
    monkeypatch.setattr(gateway, "http_host", lambda: host)
    monkeypatch.setattr(gateway.protocol, "install", lambda: None)
    build = app.gateway.__serve_build_asgi_app__
    if served:
        build()
    else:
        with pytest.raises(ValueError, match=r"^http_options\.host: other machines may reach") as refused:
            build()
        assert str(refused.value) == address.refusal(host)
    await app.stop()
