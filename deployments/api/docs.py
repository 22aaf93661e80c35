"""The page `/docs`: Swagger UI, which shows the OpenAPI document and sends requests.

Guarantees: the page loads nothing from another server, and its content security policy lets it do so to nobody. It
sends requests to this server alone, and may not be shown inside another page.
"""

from importlib.util import find_spec
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # the icons in its style sheet
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>memserve</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" href="docs/favicon.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_START = "SwaggerUIBundle({url: 'openapi.json', dom_id: '#swagger-ui', deepLinking: true, validatorUrl: null});\n"
_FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")
PATHS = frozenset({"/docs", "/docs/start.js", *(f"/docs/{name}" for name in _FILES)})


def routes() -> list[Route]:
    """The page, and the files that it loads."""
    spec = find_spec("fastapi_offline")  # not imported: only its files are used
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).with_name("static")

    async def get_page(_: Request) -> Response:
        return HTMLResponse(_PAGE, headers=_HEADERS)

    async def get_start(_: Request) -> Response:
        return Response(_START, media_type="text/javascript", headers=_HEADERS)

    async def get_file(request: Request) -> Response:
        return FileResponse(folder / request.scope["path"].rpartition("/")[2], headers=_HEADERS)

    return [
        Route("/docs", get_page),
        Route("/docs/start.js", get_start),
        *(Route(f"/docs/{name}", get_file) for name in _FILES),
    ]
