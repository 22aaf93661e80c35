"""The door behind HAProxy, which passes the client's Host and Origin on to the gateways."""

import httpx
import pytest


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"host": "evil.example"}, 403, "foreign_host"),
        ({"host": "localhost:1"}, 200, None),
        ({"origin": "https://evil.example"}, 403, "foreign_origin"),
        ({}, 200, None),
    ],
)
def test_haproxy_hides_no_web_page_from_the_gateways(
    http: httpx.Client, headers: dict[str, str], status: int, code: str | None
) -> None:
    answer = http.post("/v1/embeddings", headers=headers, json={"input": "tea"})
    assert answer.status_code == status
    assert answer.json().get("error", {}).get("code") == code
