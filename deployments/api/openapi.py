"""The OpenAPI document: what a route takes, what it answers (deployments/api/answers.py), and how it fails.

The handlers parse requests and build answers themselves (deployments/api/http.py), so FastAPI cannot derive any of this
from them. The document is made from the declarations of the routes.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from deployments.requests.deadlines import HEADER, MAX_TIMEOUT_MS
from deployments.requests.fields import StoredId
from deployments.requests.origin import MAX_KEY_LENGTH

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "description": "400 the request is invalid, 403 a web page of another origin made it, 404 not found, "
        "405 wrong method, 409 conflict, 413 the body is too large, "
        "415 the body is compressed, but not by gzip, 429 too much work is queued (with Retry-After)",
    },
    "5XX": {
        "description": "500 the server failed, 502 a remote model failed, 503 a part of the server is not available "
        "(with Retry-After), 504 the request was queued until its deadline (`deadline_exceeded`), or a remote model "
        "did not answer in time",
    },
}
"""The errors of every route."""

TIMES: dict[str, Any] = {
    "headers": {
        name: {"description": f"milliseconds {spent}", "schema": {"type": "number"}}
        for name, spent in (
            ("x-queue-time", "in the queue of the device"),
            ("x-tokenization-time", "until the inputs were tokenized"),
            ("x-inference-time", "in the model"),
            ("x-total-time", "in the gateway"),
        )
    }
}
"""The headers of an answer with vectors: how long each stage took."""

MEMORY_NOT_FOUND = "the user has no such memory"
WRITE_CONFLICT = (
    "an id has other content (`id_conflict`) or is given twice (`duplicate_id`), or the user or the memory was deleted "
    "after this write was sent (`erased`, `deleted`)"
)

_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "A write with this key is made once. Sent again within an hour, it gets the first answer.",
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_LENGTH},
}
_TIMEOUT = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "description": "Milliseconds. What is still queued when they have passed is not done, and answered with 504.",
    "schema": {"type": "integer", "minimum": 1, "maximum": MAX_TIMEOUT_MS},
}
_PATH_PARAMETER = re.compile(r"{(\w+)(?::path)?}")


def takes(
    *,
    body: type[BaseModel] | None = None,
    optional_body: bool = False,
    query: type[BaseModel] | None = None,
    idempotency_key: bool = False,
) -> dict[str, Any]:
    """`openapi_extra` of a route.

    Args:
        body: its JSON body.
        query: its query.
        idempotency_key: the route takes an Idempotency-Key.
    """
    extra: dict[str, Any] = {}
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        extra["requestBody"] = {"required": not optional_body, "content": {"application/json": {"schema": schema}}}
    parameters = [] if query is None else _query_parameters(query)
    if idempotency_key:
        parameters.append(_IDEMPOTENCY_KEY)
    if parameters:
        extra["parameters"] = parameters
    return extra


def fails(reasons: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: its own errors, by status, in addition to those of every route."""
    return {status: {"description": reason} for status, reason in reasons.items()}


def _query_parameters(query: type[BaseModel]) -> list[dict[str, Any]]:
    """The parameters of a query. A parameter that is an object is JSON in the query."""
    parameters = []
    for name, schema in query.model_json_schema()["properties"].items():
        is_json = any(branch.get("type") == "object" for branch in schema.get("anyOf", [schema]))
        form = {"content": {"application/json": {"schema": schema}}} if is_json else {"schema": schema}
        parameters.append({"name": name, "in": "query", "required": False, **form})
    return parameters


def _path_parameters(path: str) -> list[dict[str, Any]]:
    schemas = {"user_id": TypeAdapter(StoredId).json_schema(), "memory_id": TypeAdapter(StoredId).json_schema()}
    return [
        {"name": name, "in": "path", "required": True, "schema": schemas.get(name, {"type": "string"})}
        for name in _PATH_PARAMETER.findall(path)
    ]


def document_routes(api: FastAPI, declare: Callable[[], Iterable[APIRoute]], bodies: Iterable[type[BaseModel]]) -> None:
    """Have the application document the declared routes, and the schemas of the bodies that `takes` refers to.

    The routes are declared when the document is first asked for, because FastAPI takes 70 ms to build their schemas.
    """

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            api.openapi_schema = _document(api, list(declare()), bodies)
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]


def _document(api: FastAPI, routes: list[APIRoute], bodies: Iterable[type[BaseModel]]) -> dict[str, Any]:
    document = get_openapi(title=api.title, version=api.version, description=api.description, routes=routes)
    _, definitions = models_json_schema(
        [(model, "validation") for model in bodies], ref_template="#/components/schemas/{model}"
    )
    document["components"]["schemas"].update(definitions["$defs"])
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["parameters"] = [*_path_parameters(path), *operation.get("parameters", []), _TIMEOUT]
    return document
