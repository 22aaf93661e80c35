"""What all bodies and queries have in common, and how they are parsed and validated.

A body is parsed and validated in one pass by pydantic's own JSON reader. The first violation becomes an
`InvalidRequest` whose `param` is the path of the field (`memories.3.text`). If a body has room for millions of
violations, validation stops at the first one, since pydantic would make an error of each.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core.core_schema import ChainSchema, any_schema, chain_schema, dict_schema, literal_schema

from deployments.errors import InvalidRequest

Body = TypeVar("Body", bound=BaseModel)


class Wire(BaseModel):
    """A body or a query: unknown fields are refused, and no value is converted to another type."""

    # A field's docstring is its description in the OpenAPI document.
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), use_attribute_docstrings=True)


def _refuse_unknown_field(name: str) -> str:
    raise unknown_field(name)


def unknown_field(path: str) -> InvalidRequest:
    """The error of a field that a body does not have."""
    return InvalidRequest("unknown field", path, "unknown_field")


def body_config(**rules: Any) -> ConfigDict:
    """The config of a body; `rules` are rules of JSON Schema about more than one field."""
    return ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False, **rules})


def required(name: str, kind: str) -> dict[str, Any]:
    """JSON Schema: the field is given, and is not null."""
    return {"required": [name], "properties": {name: {"type": kind}}}


class RequestBody(Wire):
    """A body. Validation stops at its first unknown field.

    Pydantic would collect the ValueErrors of a validator; it lets other errors pass.
    """

    model_config = body_config()
    __pydantic_extra__: dict[Annotated[str, AfterValidator(_refuse_unknown_field)], Any]


class Nested:
    """Annotates a body within another.

    Its first unknown field becomes a wrong key of a mapping, whose path pydantic knows.
    """

    def __get_pydantic_core_schema__(self, body: type[RequestBody], handler: GetCoreSchemaHandler) -> ChainSchema:
        known = dict_schema(literal_schema([*body.model_fields]), any_schema(), fail_fast=True)
        return chain_schema([known, handler(body)])

    def __get_pydantic_json_schema__(self, schema: ChainSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(chain_schema(schema["steps"][1:]))


class NoQuery(Wire):
    """The query of a route that takes no parameters."""


def check(model: type[Body], values: Mapping[str, Any]) -> Body:
    """Validate the arguments of a handle call. Raises InvalidRequest as `parse` does."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _first_violation(error) from error


def parse(model: type[Body], raw: bytes) -> Body:
    """Parse and validate a request body in one pass. Raises InvalidRequest with the path of the first wrong field."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise _first_violation(error) from error


def parse_query(model: type[Body], values: Mapping[str, str]) -> Body:
    """Validate the parameters of a query. Raises InvalidRequest as `parse` does."""
    try:
        return model.model_validate_strings(values)
    except ValidationError as error:
        raise _first_violation(error) from error


def _first_violation(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_input=False)[0]
    kind, path = first["type"], ".".join(str(part) for part in first["loc"])
    if kind == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {first['ctx']['error']}.", None, "invalid_json")
    if kind == "extra_forbidden":
        return unknown_field(path)
    if kind == "literal_error" and first["loc"][-1] == "[key]":  # `Nested`
        return unknown_field(path.removesuffix(".[key]"))
    if kind == "missing":
        return InvalidRequest("is required", path, "missing_field")
    message = str(first["ctx"]["error"]) if kind == "value_error" else first["msg"]
    return InvalidRequest(message, path or None)
