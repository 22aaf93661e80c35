"""The HTTP form of every request: one row for each, and no other code about one request alone.

The first arguments of a request fill the path, the others are fields of the body by the names given here. Options are
fields of the body, or of the query for GET.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np

from memserve.errors import BadRequest
from memserve.requests import Request, Upload, to_json

NDJSON = "application/x-ndjson"


Options = Mapping[str, Any]
_NAMES = re.compile(r"{(\w+)}")


def _whole(answer: Any, _: Options) -> Any:
    return answer


def _field(name: str) -> Callable[[Any, Options], Any]:
    return lambda answer, _: answer[name]


def _vectors(answer: Mapping[str, Any], options: Options) -> np.ndarray:
    """(n, dim) of base64 or of numbers: float32, or int8 or uint8 if the request asked for it."""
    rows = [entry["embedding"] for entry in answer["data"]]
    if isinstance(rows[0], str):
        values = np.frombuffer(b"".join(map(base64.b64decode, rows)), "<f4")
        return values.reshape(len(rows), -1).astype(np.float32)  # a copy, which the caller may write to
    return np.array(rows, _DTYPES.get(options.get("output_dtype"), np.float32))


_DTYPES: Mapping[Any, type] = {"int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8}


@dataclass(frozen=True, slots=True)
class Route:
    """One row.

    Attributes:
        method, path: of the request; each `{name}` is an argument.
        fields: the fields of the body that the other arguments are.
        result: makes the answer that the handle would give of the route's answer and the request's options.
    """

    method: str
    path: str
    fields: tuple[str, ...] = ()
    result: Callable[[Any, Options], Any] = _whole


_USER = "/v1/users/{user_id}"
_MEMORIES = f"{_USER}/memories"
_MEMORY = f"{_MEMORIES}/{{memory_id}}"

ROUTES: Mapping[str, Route] = {
    "embed": Route("POST", "/v1/embeddings", ("input",), _vectors),
    "rerank": Route("POST", "/v1/rerank", ("query", "documents"), _field("results")),
    "add": Route("POST", _MEMORIES, ("memories",), _field("memories")),
    "add_many": Route("POST", "/v1/memories", ("memories",), _field("memories")),
    "search": Route("POST", f"{_MEMORIES}/search", ("query",), _field("results")),
    "get": Route("GET", _MEMORY),
    "get_many": Route("POST", f"{_MEMORIES}/get", ("ids",)),
    "duplicates": Route("POST", f"{_MEMORIES}/duplicates"),
    "list": Route("GET", _MEMORIES),
    "update": Route("PATCH", _MEMORY),
    "delete": Route("DELETE", _MEMORY),
    "delete_many": Route("DELETE", _MEMORIES, ("ids",)),
    "delete_where": Route("DELETE", _MEMORIES, ("filter",), _field("deleted")),
    "history": Route("GET", f"{_MEMORY}/history"),
    "user": Route("GET", _USER),
    "users": Route("GET", "/v1/users"),
    "delete_user": Route("DELETE", _USER),
    "export": Route("GET", f"{_USER}/export"),
    "import_lines": Route("POST", f"{_USER}/import"),
    "create_key": Route("POST", "/v1/keys"),
    "keys": Route("GET", "/v1/keys"),
    "revoke_key": Route("DELETE", "/v1/keys/{key_id}"),
    "check_ready": Route("GET", "/health/ready"),
}


@dataclass(frozen=True, slots=True)
class HttpForm:
    """A request as it is sent. `body` is JSON, or the lines of an upload."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes | Upload | None


def http_form(request: Request) -> HttpForm:
    """The HTTP form of a request."""
    route = ROUTES[request.name]
    names = _NAMES.findall(route.path)
    path = route.path.format(**{name: _segment(id, name) for name, id in zip(names, request.arguments, strict=False)})
    headers = {} if request.key is None else {"idempotency-key": request.key}
    rest = request.arguments[len(names) :]
    if rest and isinstance(rest[0], Upload):
        return HttpForm(route.method, path, {}, {"content-type": NDJSON}, rest[0])
    fields = {**dict(zip(route.fields, rest, strict=True)), **request.options}
    if route.method == "GET":
        return HttpForm(route.method, path, {name: _parameter(value) for name, value in fields.items()}, headers, None)
    if request.name == "embed" and fields.get("output_dtype", "float") == "float":
        fields = {"encoding_format": "base64", **fields}  # a fifth of the time that numbers take
    if not fields:
        return HttpForm(route.method, path, {}, headers, None)
    return HttpForm(route.method, path, {}, {**headers, "content-type": "application/json"}, to_json(fields))


def _segment(id: Any, name: str) -> str:
    """An id in a path. `.` and `..` are encoded too, since clients remove them from a path."""
    if not isinstance(id, str) or not id:
        raise BadRequest(f"{name}: must be a string of 1 to 256 characters", 400, name)
    quoted = quote(id, safe="", errors="surrogatepass")
    return quoted.replace(".", "%2E") if quoted in (".", "..") else quoted


def _parameter(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
