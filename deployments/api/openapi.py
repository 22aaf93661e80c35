"""The OpenAPI document: what a route takes, what it answers (deployments/api/answers.py), and how it fails.

The handlers parse requests and build answers themselves (deployments/api/http.py), so FastAPI cannot derive any of this
from them. The document is made from the declarations of the routes.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from deployments.api import answers
from deployments.api.examples import EXAMPLES
from deployments.errors import HttpError
from deployments.requests.deadlines import HEADER, MAX_TIMEOUT_MS
from deployments.requests.fields import StoredId
from deployments.requests.origin import MAX_KEY_LENGTH

ERRORS: Mapping[int, str] = {
    400: "the request is invalid",
    401: "the key is missing (`missing_key`), or it is unknown, revoked or has expired (`invalid_key`), if `auth.mode` "
    "is `keys`",
    403: "the key does not have the scope (`insufficient_scope`), the tenant would hold more than it may "
    "(`quota_exceeded`), or a web page of another origin made the request (`foreign_host`, `foreign_origin`)",
    404: "there is no such thing, or none that the key may reach",
    408: "the request did not arrive in time",
    413: "the body is too large",
    415: "the body is compressed, but not by gzip (`unsupported_encoding`), or of a type that a web page may send "
    "without asking (`unsupported_type`)",
    429: "too much work is queued (`overloaded`), or the key has used its limit of requests or tokens a minute "
    "(`rate_limit_exceeded`); try again after Retry-After",
    431: "the headers are too large",
    500: "the server failed on this request",
    502: "a remote model failed (`upstream_failed`), or a gateway was lost while it answered (`outcome_unknown`)",
    503: "a part of the server is not available; try again after Retry-After",
    504: "the request was queued until its deadline (`deadline_exceeded`), or a remote model did not answer in time",
}
"""The errors of every route, by status. 413 and 415 are not answered to GET."""

_OF_BODIES = frozenset({413, 415})
_OF_HAPROXY = frozenset({408, 431})  # answered by HAProxy, which does not know TEI's shape
_ERROR_EXAMPLES = (
    HttpError(400, "invalid_request_error", "must not be empty", "memories.3.text", None, None),
    HttpError(
        401, "authentication_error", "This key is unknown here, was revoked or has expired.", None, "invalid_key", None
    ),
    HttpError(
        403, "permission_error", "This request needs a key with the scope `write`.", None, "insufficient_scope", None
    ),
    HttpError(404, "not_found_error", "there is no memory 'tea'", None, None, None),
    HttpError(408, "timeout_error", "The request did not arrive in time.", None, "request_timeout", None),
    HttpError(409, "conflict_error", "the id 'tea' has other content", "id", "id_conflict", None),
    HttpError(413, "invalid_request_error", "The body is larger than 16777216 bytes.", None, "body_too_large", None),
    HttpError(415, "invalid_request_error", "The body has the encoding 'br'.", None, "unsupported_encoding", None),
    HttpError(429, "rate_limit_error", "Too many requests; try again later.", None, "overloaded", 1.0),
    HttpError(431, "invalid_request_error", "The headers are too large.", None, "headers_too_large", None),
    HttpError(500, "server_error", "The server failed on this request.", None, "internal_error", None),
    HttpError(502, "upstream_error", "The remote model failed.", None, "upstream_failed", None),
    HttpError(503, "unavailable_error", "No embedder answers; try again later.", None, "unavailable", 1.0),
    HttpError(504, "timeout_error", "The deadline passed in the queue.", None, "deadline_exceeded", None),
)
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
_ERROR_HEADERS: Mapping[int, Any] = {
    401: {"WWW-Authenticate": {"description": "`Bearer`", "schema": {"type": "string"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}

_SECURITY_SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "A key of memserve, if `auth.mode` is `keys`. `Authorization: Token KEY` is the same.",
    },
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}
_SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"apiKey": []}, {}]

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
    # Printable ASCII; HTTP takes spaces at the ends away.
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_LENGTH, "pattern": "^[!-~]([ -~]*[!-~])?$"},
}
_TIMEOUT = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "description": "Milliseconds. What is still queued when they have passed is not done, and answered with 504.",
    "schema": {"type": "integer", "minimum": 1, "maximum": MAX_TIMEOUT_MS},
}
_ID_EXAMPLES = {"user_id": "anna", "memory_id": "tea", "model_id": "all-MiniLM-L6-v2", "key_id": "5b1c8f02a3d94e67"}
_PATH_PARAMETER = re.compile(r"{(\w+)(?::path)?}")


class ErrorShape(NamedTuple):
    """The body of an error: its schema, and how it is made of an error."""

    answer: Any
    body_of: Callable[[HttpError], Mapping[str, Any]]

    @property
    def name(self) -> str:
        """The name of the schema; a response is named by it and the status."""
        return str(self.answer.__name__)

    def schemas(self) -> dict[str, Any]:
        """The schema of the body, and those that it refers to."""
        schema = TypeAdapter(self.answer).json_schema(ref_template="#/components/schemas/{model}")
        return {**schema.pop("$defs", {}), self.name: schema}

    def content(self, status: int) -> dict[str, Any]:
        """The body of an error with this status, with an example."""
        example = next(error for error in _ERROR_EXAMPLES if error.status == status)
        schema = {"$ref": f"#/components/schemas/{self.name}"}
        return {"application/json": {"schema": schema, "example": self.body_of(example)}}

    def responses(self) -> dict[str, Any]:
        """The errors of every route, by name."""
        return {
            f"{self.name}{status}": {
                "description": description,
                **({"headers": _ERROR_HEADERS[status]} if status in _ERROR_HEADERS else {}),
                "content": self.content(status),
            }
            for status, description in ERRORS.items()
        }


_OPENAI_SHAPE = ErrorShape(answers.ErrorAnswer, HttpError.body)


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


def security(scope: str | None) -> list[dict[str, list[str]]]:
    """The security requirement of a route.

    Args:
        scope: that a key needs, "any" if every key is admitted, None if no key is asked for.
    """
    if scope is None:
        return []
    scopes = [] if scope == "any" else [scope]
    return [{name: scopes for name in requirement} for requirement in _SECURITY]


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
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": schemas.get(name, {"type": "string"}),
            **({"example": _ID_EXAMPLES[name]} if name in _ID_EXAMPLES else {}),
        }
        for name in _PATH_PARAMETER.findall(path)
    ]


def document_routes(
    api: FastAPI,
    declare: Callable[[], Iterable[APIRoute]],
    bodies: Iterable[type[BaseModel]],
    error_shapes: Mapping[str, ErrorShape],
    *,
    needs_key: bool,
) -> None:
    """Have the application document the declared routes, and the schemas of the bodies that `takes` refers to.

    The routes are declared when the document is first asked for, because FastAPI takes 70 ms to build their schemas.

    Args:
        error_shapes: by tag, the shape of errors that is not that of most routes.
        needs_key: whether the server asks for keys.
    """

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            api.openapi_schema = _document(api, list(declare()), bodies, error_shapes)
            if needs_key:
                _require_key(api.openapi_schema)
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]


def _document(
    api: FastAPI, routes: list[APIRoute], bodies: Iterable[type[BaseModel]], error_shapes: Mapping[str, ErrorShape]
) -> dict[str, Any]:
    document = get_openapi(title=api.title, version=api.version, description=api.description, routes=routes)
    components = document["components"]
    _, definitions = models_json_schema(
        [(model, "validation") for model in bodies], ref_template="#/components/schemas/{model}"
    )
    components["schemas"].update(definitions["$defs"])
    components["securitySchemes"] = _SECURITY_SCHEMES
    document["security"] = _SECURITY
    components["responses"] = {}
    for shape in (_OPENAI_SHAPE, *error_shapes.values()):
        components["schemas"].update(shape.schemas())
        components["responses"].update(shape.responses())
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            (tag,) = operation["tags"]
            operation["parameters"] = [*_path_parameters(path), *operation.get("parameters", []), _TIMEOUT]
            _add_errors(operation, method, error_shapes.get(tag, _OPENAI_SHAPE))
            _add_examples(operation, f"{method.upper()} {path}")
    return document


def _require_key(document: dict[str, Any]) -> None:
    """Leave out the choice of calling an operation without a key, except where that is the only one."""
    operations = [operation for of in document["paths"].values() for operation in of.values()]
    for described in (document, *operations):
        described["security"] = [one for one in described["security"] if one]


def _add_errors(operation: dict[str, Any], method: str, shape: ErrorShape) -> None:
    """Add the errors of every route to an operation, and the shape to its own."""
    responses = operation["responses"]
    for status, answer in responses.items():
        if status >= "400":
            answer["content"] = shape.content(int(status))
    for status in ERRORS:
        if method != "get" or status not in _OF_BODIES:
            of = _OPENAI_SHAPE if status in _OF_HAPROXY else shape
            responses.setdefault(str(status), {"$ref": f"#/components/responses/{of.name}{status}"})
    operation["responses"] = dict(sorted(responses.items()))


def _add_examples(operation: dict[str, Any], name: str) -> None:
    """Add the examples of a body and of the answer to an operation."""
    body, answer = EXAMPLES.get(name, (None, None))
    if body is not None:
        (content,) = operation["requestBody"]["content"].values()
        content["example"] = body
    if answer is not None:
        succeeds = min(operation["responses"])
        *_, content = operation["responses"][succeeds]["content"].values()
        content["example"] = answer
