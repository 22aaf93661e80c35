"""The OpenAPI document: what a route takes, what it answers (deployments/api/answers.py), and how it fails.

The routes read, check and shape for themselves (deployments/api/http.py): FastAPI sees none of it, and is told here.
"""

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from deployments.api import answers
from deployments.requests.fields import HeldId
from deployments.requests.origin import MAX_KEY_LENGTH

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": answers.ErrorAnswer,
        "description": "400 wrong input, 404 not there, 405 no such method, 409 conflict, 413 too large a body, "
        "429 too much work is queued (with Retry-After)",
    },
    "5XX": {
        "model": answers.ErrorAnswer,
        "description": "500 failed, 502 and 504 a remote model failed, 503 a part is not there (with Retry-After)",
    },
}
"""How every route fails."""

TIMES: dict[str, Any] = {
    "headers": {
        name: {"description": f"milliseconds {spent}", "schema": {"type": "number"}}
        for name, spent in (
            ("x-queue-time", "in the queue of the device"),
            ("x-tokenization-time", "until tokenized"),
            ("x-inference-time", "of the forward"),
            ("x-total-time", "in the gateway"),
        )
    }
}
"""What an answer with vectors says of the time that it took."""

_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Under it the write is made once, and for an hour answered as the first time.",
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_LENGTH},
}


def takes(
    *,
    body: type[BaseModel] | None = None,
    optional_body: bool = False,
    query: type[BaseModel] | None = None,
    idempotency_key: bool = False,
) -> dict[str, Any]:
    """`openapi_extra` of a route: its JSON body, its query, and whether it is a write that a client may name."""
    extra: dict[str, Any] = {}
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        extra["requestBody"] = {"required": not optional_body, "content": {"application/json": {"schema": schema}}}
    parameters = [] if query is None else _parameters(query)
    if idempotency_key:
        parameters.append(_IDEMPOTENCY_KEY)
    if parameters:
        extra["parameters"] = parameters
    return extra


def _parameters(query: type[BaseModel]) -> list[dict[str, Any]]:
    """A parameter that is an object is JSON in the query."""
    made = []
    for name, schema in query.model_json_schema()["properties"].items():
        is_json = any(branch.get("type") == "object" for branch in schema.get("anyOf", [schema]))
        how = {"content": {"application/json": {"schema": schema}}} if is_json else {"schema": schema}
        made.append({"name": name, "in": "query", "required": False, **how})
    return made


def complete(api: FastAPI, bodies: Iterable[type[BaseModel]]) -> None:
    """Add to the document the schemas that `takes` refers to, and what ids in a path look like."""
    _, definitions = models_json_schema(
        [(model, "validation") for model in bodies], ref_template="#/components/schemas/{model}"
    )
    identifier = TypeAdapter(HeldId).json_schema()
    generate = api.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        for operations in document["paths"].values():
            for operation in operations.values():
                for parameter in operation.get("parameters", []):
                    if parameter["in"] == "path" and parameter["name"] in ("user_id", "memory_id"):
                        parameter["schema"] = identifier
        return document

    api.openapi = openapi  # type: ignore[method-assign]
