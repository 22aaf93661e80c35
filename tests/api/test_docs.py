"""/docs needs no other server."""

import re

import httpx
import pytest

from deployments.api import docs
from deployments.api.build import build_api
from tests.local_app import LocalApp


async def test_everything_that_the_page_loads_comes_from_this_server(api: httpx.AsyncClient) -> None:
    page = await api.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert loaded == ["docs/swagger-ui.css", "docs/favicon.png", "docs/swagger-ui-bundle.js", "docs/start.js"]
    types = []
    for name in loaded:
        file = await api.get(f"/{name}")
        assert (file.status_code, len(file.content) > 100 or name.endswith("start.js")) == (200, True)
        types.append(file.headers["content-type"].split(";")[0])
    assert {"/docs", *(f"/{name}" for name in loaded)} == docs.PATHS
    assert types == ["text/css", "image/png", "text/javascript", "text/javascript"]
    assert (await api.get("/openapi.json")).headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", ["/docs", "/docs/start.js", "/docs/swagger-ui-bundle.js"])
async def test_the_policy_admits_this_server_alone(api: httpx.AsyncClient, path: str) -> None:
    headers = (await api.get(path)).headers
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/redoc", "/docs/redoc.standalone.js", "/docs/..%2f__init__.py", "/docs/core.py"])
async def test_no_other_file_is_served(api: httpx.AsyncClient, path: str) -> None:
    assert (await api.get(path)).status_code == 404


async def test_the_page_is_behind_the_door(app: LocalApp) -> None:
    guarded = build_api(app.gateway, app.errors.append, loopback_only=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://evil.example") as http:
        assert (await http.get("/docs")).status_code == 403
