"""Write the parts of the documentation that follow from the code: docs/api.md, docs/settings.md and openapi.json.

    python docs/generate.py           write them
    python docs/generate.py --check   change nothing; exit with 1 and name the files that are out of date

The routes are built without Ray and without a server, so this takes a second or two. The output depends on the code
alone.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # import from this tree, not from an installed memserve

from deployments.api.build import build_api  # noqa: E402
from deployments.requests.deadlines import HEADER  # noqa: E402
from deployments.settings import ENV_PREFIX, EVERYDAY, RELOADABLE, Settings  # noqa: E402

Schema = dict[str, Any]

MARK = "<!-- Written by docs/generate.py from the code. Do not edit. -->"

TAGS = {
    "embeddings": ("Embeddings", "The guide is [Embeddings](embeddings.md)."),
    "rerank": ("Reranking", "The guide is [Reranking](reranking.md)."),
    "TEI": (
        "Routes of text-embeddings-inference",
        "For clients of that server. Unknown fields are ignored on these routes. Their errors have the form of "
        "[TeiErrorAnswer](#teierroranswer).",
    ),
    "memories": ("Memories", "The guide is [Memories](memories.md)."),
    "users": ("Users", "The guide is [Memories](memories.md#users)."),
    "keys": ("Keys", "The guide is [Keys](keys.md)."),
    "audit": ("Audit", "The guide is [Operations](operations.md#audit)."),
    "operations": ("Operations", "The guide is [Operations](operations.md)."),
}

API_INTRODUCTION = f"""
All bodies are JSON in UTF-8 unless a route says otherwise. Every route reads a body that is compressed by gzip, with
`Content-Encoding: gzip`; the limits are those of the unpacked body. Times are in RFC 3339 format; answers give them in
UTC. Unknown fields are refused, except on the routes of text-embeddings-inference. If a field may be `null`, `null`
means the same as leaving the field out, unless its description says otherwise. The id of a user or of a memory has 1 to
256 characters, none of them a control character; new ids must not be `.` or `..`. In a path an id is percent-encoded.

Every route takes the header `{HEADER}`, a whole number of milliseconds. What is still queued when they have
passed is not done, and the request is answered 504 with the code `deadline_exceeded`. A write that has been sent to the
store is answered as usual. An import that is answered 504 keeps the lines that were written before, and may be sent
again. An export that has begun ends in the middle, as a broken connection.

A running server has this description at `/docs`, and as an OpenAPI document at `/openapi.json`. The same document is
in the repository as `openapi.json`.
"""

ERRORS_SECTION = """
## Errors

Every 4xx and 5xx answer has the same body, except on the routes of text-embeddings-inference:

```json
{
  "error": {
    "message": "memories.3.text: must not be empty",
    "type": "invalid_request_error",
    "param": "memories.3.text",
    "code": null
  }
}
```

`param` is the path of the invalid field, or null; positions count from 0. `code` is a stable name of the reason, or
null.

| status | `type` | meaning |
|---|---|---|
| 400 | `invalid_request_error` | the request is invalid and would fail again |
| 401 | `authentication_error` | the key is missing, unknown, expired or revoked, if `auth.mode` is `keys` |
| 403 | `permission_error` | the key does not have the scope (`insufficient_scope`) |
| 403 | `permission_error` | a web page made it: its Host is foreign (`foreign_host`) or its origin (`foreign_origin`) |
| 404 | `not_found_error` | there is no such memory, model or route |
| 405 | `invalid_request_error` | the route exists, but not with this method |
| 409 | `conflict_error` | the state of the log contradicts the request: the id is taken, the version is another one |
| 413 | `invalid_request_error` | the body is larger than `gateway.max_body_bytes`, or holds too many inputs |
| 415 | `invalid_request_error` | the body is compressed, but not by gzip (`unsupported_encoding`) |
| 415 | `invalid_request_error` | the body has a type that a web page may send without asking (`unsupported_type`) |
| 429 | `rate_limit_error` | too much work is queued; try again after `Retry-After` seconds |
| 500 | `server_error` | the server failed on this request |
| 502, 504 | `upstream_error` | a remote model failed or did not answer in time |
| 503 | `unavailable_error` | a part of the server is not available; try again after `Retry-After` seconds |
| 504 | `timeout_error` | the request was queued until its deadline, or for `queue.max_wait_s` (`deadline_exceeded`) |

A 503 with the code `outcome_unknown` answers a write that may have been made. Repeat it under the same
`Idempotency-Key`.
"""

SETTINGS_INTRODUCTION = f"""
Each setting has a place under `args:` in serve_config.yaml and an environment variable. `args:` win; an environment
variable fills in what they leave out; the default fills in the rest. `model.name`, for example, is

```yaml
      args:
        model:
          name: BAAI/bge-small-en-v1.5
```

in the file and `{ENV_PREFIX}MODEL__NAME` in the environment, with two underscores for one level. An unknown setting is
refused by its name. The address and port of the server are not settings of memserve but of Ray Serve: `http_options:`
in the same file.

A setting marked *Live* can be changed while the server runs: see [Changing settings](deploy.md#changing-settings).
"""


def main(argv: list[str]) -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python docs/generate.py", description="Write the generated documentation.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is out of date")
    check = parser.parse_args(argv).check
    texts = generated()
    outdated = [path for path, text in texts.items() if not path.is_file() or path.read_text() != text]
    for path in outdated:
        print(f"{path.relative_to(ROOT)} {'is out of date: run python docs/generate.py' if check else 'written'}")
        if not check:
            path.write_text(texts[path])
    return 1 if check and outdated else 0


def generated() -> dict[Path, str]:
    """Every generated file and its content."""
    document = openapi_document()
    return {
        ROOT / "openapi.json": json.dumps(document, indent=2, ensure_ascii=False) + "\n",
        ROOT / "docs" / "api.md": api_page(document),
        ROOT / "docs" / "settings.md": settings_page(Settings.model_json_schema()),
    }


def openapi_document() -> Schema:
    """The document that a server answers at /openapi.json. No route is called, so no service is needed."""
    document: Schema = build_api(object(), on_error=lambda _: None).openapi()  # type: ignore[arg-type]
    return document


# The API.


def api_page(document: Schema) -> str:
    """docs/api.md: every route by its tag, then the objects that bodies and answers are made of."""
    lines = [MARK, "", "# HTTP API", API_INTRODUCTION.rstrip()]
    for tag, (title, text) in TAGS.items():
        lines += ["", f"## {title}", "", text]
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if tag in operation["tags"]:
                    lines += ["", *_route(method, path, operation, document)]
    lines += ["", "## Objects", "", "The objects that bodies and answers are made of."]
    for name in _nested(document):
        lines += ["", f"### {name}", "", *_object(document["components"]["schemas"][name], name)]
    lines += [ERRORS_SECTION.rstrip(), ""]
    return "\n".join(lines)


def _route(method: str, path: str, operation: Schema, document: Schema) -> Iterator[str]:
    yield f"### {method.upper()} {path}"
    yield ""
    yield _prose(operation["description"])
    yield from ("", _key_of(operation["security"]))
    # The introduction of the page describes the header that every route takes.
    if parameters := [one for one in operation["parameters"] if one["name"] != HEADER]:
        yield from ("", "| parameter | in | type | default | meaning |", "|---|---|---|---|---|")
        for parameter in parameters:
            schema = parameter.get("schema") or parameter["content"]["application/json"]["schema"]
            kind = type_of(schema) + (" as JSON" if "content" in parameter else "")
            default = "required" if parameter["required"] else _default(schema)
            yield _row(f"`{parameter['name']}`", parameter["in"], kind, default, _meaning(parameter, schema))
    if body := operation.get("requestBody"):
        ((media_type, content),) = body["content"].items()
        optional = "" if body.get("required") else " (optional)"
        if "$ref" in content["schema"]:
            name = _name_of(content["schema"])
            yield from ("", *_object(document["components"]["schemas"][name], name, f"Body{optional}: "))
        else:
            yield from ("", f"Body{optional}: `{media_type}`.")
    status, answer = _answer(operation)
    yield ""
    if not answer.get("content"):
        yield f"Answer: {status}, without a body."
    else:
        # The route of a streamed answer declares its media type, and FastAPI adds the one that it guesses.
        media_type, content = list(answer["content"].items())[-1]
        if "$ref" in content["schema"]:
            name = _name_of(content["schema"])
            yield from _object(document["components"]["schemas"][name], name, f"Answer: {status}. ")
        else:
            kind = type_of(content["schema"]) if media_type == "application/json" else f"`{media_type}`"
            yield f"Answer: {status}, {kind}."
    if headers := answer.get("headers"):
        said = ", ".join(f"`{name}` ({header['description']})" for name, header in headers.items())
        yield from ("", f"Headers: {said}.")
    # The errors of every route are references; the table at the end of the page describes them.
    answers = operation["responses"].items()
    own = {status: answer for status, answer in answers if status >= "400" and "$ref" not in answer}
    if own:
        yield from ("", "Errors, in addition to those of [every route](#errors):", "")
        yield from (f"- {status}: {answer['description']}" for status, answer in sorted(own.items()))


def _key_of(security: list[dict[str, list[str]]]) -> str:
    """Which key a route needs."""
    if not security:
        return "Needs no key."
    (scopes,) = security[0].values()
    return f"Needs a key with the scope `{scopes[0]}`." if scopes else "Needs any key."


def _answer(operation: Schema) -> tuple[str, Schema]:
    """The status and description of the answer of a request that succeeds."""
    return next((status, answer) for status, answer in operation["responses"].items() if status < "300")


def _object(schema: Schema, name: str, heading: str = "") -> Iterator[str]:
    """What an object is, behind `heading`, and a table of its fields. The names of objects in requests end in Body."""
    in_request = name.endswith("Body")
    # A body's description begins with its route, which the page has in the heading above.
    description = re.sub(r"^`[A-Z]+ /[^`]*`: (.)", lambda found: found[1].upper(), schema.get("description", ""))
    yield heading + _prose(description)
    if rule := _rule(schema):
        yield from ("", rule)
    required = schema.get("required", [])
    titles = ("field", "type", "default", "meaning") if in_request else ("field", "type", "meaning")
    yield from ("", _row(*titles), "|---" * len(titles) + "|")
    for field, of in schema["properties"].items():
        kind = type_of(of)
        if in_request:
            default = "required" if field in required else _default(of)
            yield _row(f"`{field}`", kind, default, of.get("description", ""))
        else:
            meaning = of.get("description", "")
            yield _row(f"`{field}`", kind, meaning if field in required else f"optional; {meaning}".rstrip("; "))


def _rule(schema: Schema) -> str:
    """The fields of a body that exclude each other, if its schema has such rules."""
    for word, quantity in (("oneOf", "exactly one"), ("anyOf", "at least one")):
        if word in schema:
            names = [f"`{branch['required'][0]}`" for branch in schema[word]]
            return f"Give {quantity} of {', '.join(names[:-1])} and {names[-1]}."
    return ""


def _nested(document: Schema) -> list[str]:
    """Names of the objects that a route does not show with its own table, sorted."""
    schemas = document["components"]["schemas"]
    shown = set()
    for operations in document["paths"].values():
        for operation in operations.values():
            contents = [operation.get("requestBody", {}), _answer(operation)[1]]
            for content in contents:
                for media in content.get("content", {}).values():
                    if "$ref" in media["schema"]:
                        shown.add(_name_of(media["schema"]))
    referred = {_name_of(node) for node in _walk(schemas) if "$ref" in node}
    referred |= {_name_of(node) for node in _walk(document["paths"]) if "$ref" in node} - shown
    return sorted((referred - {"ErrorAnswer", "ErrorDetailAnswer"}) & schemas.keys())


def _walk(node: Any) -> Iterator[Schema]:
    if isinstance(node, dict):
        yield node
        for child in node.values():
            yield from _walk(child)
    elif isinstance(node, list):
        for child in node:
            yield from _walk(child)


# The settings.


def settings_page(schema: Schema) -> str:
    """docs/settings.md: the everyday settings first, then all of them by section."""
    settings = dict(_settings(schema))
    lines = [MARK, "", "# Settings", SETTINGS_INTRODUCTION.rstrip()]
    lines += ["", "## Everyday settings", "", "Most servers change none but these.", "", *_settings_head()]
    lines += [_setting(name, settings[name]) for name in EVERYDAY]
    sections: dict[str, list[str]] = {}
    for name in settings:
        sections.setdefault(name.rpartition(".")[0], []).append(name)
    lines += ["", "## All settings"]
    for section, names in sections.items():
        lines += ["", f"### {section or 'General'}", ""]
        if section:
            lines += [_prose(_resolved(schema, schema["properties"][section])["description"]), ""]
        lines += [*_settings_head(), *(_setting(name, settings[name]) for name in names)]
    return "\n".join([*lines, ""])


def _settings(schema: Schema) -> Iterator[tuple[str, Schema]]:
    for name, of in schema["properties"].items():
        section = _resolved(schema, of)
        if "properties" in section:
            for field, value in section["properties"].items():
                yield f"{name}.{field}", value
        else:
            yield name, of


def _resolved(schema: Schema, of: Schema) -> Schema:
    if "$ref" in of:
        found: Schema = schema["$defs"][_name_of(of)]
        return found
    return of


def _settings_head() -> tuple[str, str]:
    return "| setting | type | default | meaning | environment variable |", "|---|---|---|---|---|"


def _setting(name: str, of: Schema) -> str:
    live = any(name in names for names in RELOADABLE.values())
    variable = ENV_PREFIX + name.replace(".", "__").upper()
    meaning = of["description"] + (" *Live.*" if live else "")
    return _row(f"`{name}`", type_of(of, with_null=False), _default(of), meaning, f"`{variable}`")


# Both.


def type_of(schema: Schema, *, with_null: bool = True) -> str:
    """A JSON Schema in words, with its limits but for patterns; without mention of null if `with_null` is False."""
    if "$ref" in schema:
        name = _name_of(schema)
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        branches = [one for one in schema["anyOf"] if one.get("type") != "null"]
        if len(branches) > 1:  # with the limits of each the cell of a table would be unreadable; its meaning has them
            branches = [_without_limits(one) for one in branches]
        kinds = [type_of(one, with_null=with_null) for one in branches]
        kind = " or ".join(kinds)
        has_null = len(kinds) < len(schema["anyOf"])
        return kind + (", or null" if "," in kind else " or null") * (has_null and with_null)
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    match schema.get("type"):
        case "string" if schema.get("format") == "date-time":
            return "time"
        case "string":
            return _within("string", schema, "minLength", "maxLength", "characters")
        case "integer" | "number" as kind:
            return _within(kind, schema, "minimum", "maximum")
        case "array":
            items = _plural(type_of(schema["items"], with_null=with_null))
            return _within(f"list of {items}", schema, "minItems", "maxItems", "items")
        case "object":
            values = schema.get("additionalProperties")
            if not isinstance(values, dict):
                return "object"
            return f"object of {_plural(type_of(values, with_null=with_null))}"
        case "boolean":
            return "boolean"
    raise ValueError(f"no words for {schema}")


def _without_limits(schema: Schema) -> Schema:
    limits = ("minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum")
    found = {name: value for name, value in schema.items() if name not in limits}
    return {**found, "items": _without_limits(found["items"])} if "items" in found else found


def _plural(kind: str) -> str:
    return re.sub(r"^(string|integer|number|object|list)\b", r"\1s", kind)


def _within(kind: str, schema: Schema, least: str, most: str, unit: str = "") -> str:
    """`kind` with its bounds: `integer, 1 to 1000`."""
    low, high = schema.get(least), schema.get(most)
    above = schema.get("exclusiveMinimum")
    if low is not None and high is not None:
        bounds = f"{_number(low)} to {_number(high)}"
    elif above is not None and high is not None:
        bounds = f"above {_number(above)}, at most {_number(high)}"
    elif above is not None:
        bounds = f"above {_number(above)}"
    elif low == 1 and unit:
        return f"{kind}, not empty"
    elif low is not None:
        bounds = f"at least {_number(low)}"
    elif high is not None:
        bounds = f"at most {_number(high)}"
    else:
        return kind
    return f"{kind}, {bounds} {unit}".rstrip()


def _number(value: float) -> str:
    return f"{value:,.10g}" if value >= 10_000 else f"{value:g}"


def _default(schema: Schema) -> str:
    value = schema.get("default")
    return "–" if value is None else f"`{json.dumps(value)}`"


def _meaning(parameter: Schema, schema: Schema) -> str:
    meaning: str = parameter.get("description") or schema.get("description", "")
    return meaning


def _name_of(reference: Schema) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _prose(text: str) -> str:
    """A docstring as a paragraph or several: line breaks within one are not kept."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
