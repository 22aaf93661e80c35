"""Checks answers against the OpenAPI document: the server must answer and accept only what the document describes."""

import copy
import gzip
import re
from typing import Any

import httpx
import orjson
from jsonschema import Draft202012Validator


class Document:
    """An OpenAPI document.

    Args:
        content: as `/openapi.json` has it.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = copy.deepcopy(content)
        for schema in self._content["components"]["schemas"].values():
            if schema.get("type") == "object":
                schema.setdefault("additionalProperties", False)  # later versions may add fields, this one must not
        # The path with the most fixed text first: /v1/users/{user_id}/memories/search is not a memory's path.
        self._paths = sorted(
            ((_pattern(path), operations) for path, operations in self._content["paths"].items()),
            key=lambda entry: entry[0].pattern.count("[^/]"),
        )

    def operations(self, request: httpx.Request) -> dict[str, Any]:
        """The descriptions of a request's path, by method; empty if the path is not served."""
        path = request.url.raw_path.split(b"?")[0].decode("ascii")
        found: dict[str, Any]
        for pattern, found in self._paths:
            if pattern.fullmatch(path):
                return found
        return {}

    def check(self, request: httpx.Request, answer: httpx.Response) -> None:
        """Raise AssertionError unless an answer, which has been read, is as described."""
        if request.url.path == "/openapi.json" or request.url.path.startswith("/docs"):
            return
        operations = self.operations(request)
        operation = operations.get(request.method.lower())
        status = str(answer.status_code)
        if operation is None:
            assert status[0] == "4", f"{request.method} {request.url} is answered {status}, and not described"
            schema: dict[str, Any] = {"$ref": "#/components/schemas/ErrorAnswer"}
            for other in operations.values():
                schema = self._response(other["responses"]["400"])["content"]["application/json"]["schema"]
        else:
            assert status in operation["responses"], f"{request.method} {request.url}: {status} not described"
            content = self._response(operation["responses"][status]).get("content", {})
            if not content:
                assert not answer.content
                return
            media_type = answer.headers["content-type"].split(";")[0]
            assert media_type in content, f"{request.method} {request.url}: {media_type} not described"
            if media_type != "application/json":
                return
            schema = content[media_type]["schema"]
            if answer.is_success:
                self._check_body(request, operation)
        self._validate(answer.content, schema)

    def _check_body(self, request: httpx.Request, operation: dict[str, Any]) -> None:
        """Check a body that was accepted."""
        described = operation.get("requestBody", {}).get("content", {}).get("application/json")
        if described and request.content:
            packed = "gzip" in request.headers.get("content-encoding", "").lower()
            self._validate(gzip.decompress(request.content) if packed else request.content, described["schema"])

    def _response(self, described: dict[str, Any]) -> dict[str, Any]:
        """The description of an answer, which may be a reference to one that several operations share."""
        found: dict[str, Any] = described
        if "$ref" in described:
            found = self._content["components"]["responses"][described["$ref"].rpartition("/")[2]]
        return found

    def _validate(self, data: bytes, schema: dict[str, Any]) -> None:
        Draft202012Validator({**schema, "components": self._content["components"]}).validate(orjson.loads(data))


def _pattern(path: str) -> re.Pattern[str]:
    pattern = re.escape(path).replace(r"\{model_id\}", ".+")  # the name of a model may hold slashes
    return re.compile(re.sub(r"\\\{[^/]*?\\\}", "[^/]+", pattern))
