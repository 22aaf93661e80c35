"""The types of the fields of bodies and queries, each with its bounds."""

import math
import re
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, GetCoreSchemaHandler, StringConstraints, WithJsonSchema
from pydantic_core import CoreSchema, PydanticUseDefault, from_json
from pydantic_core.core_schema import no_info_after_validator_function, nullable_schema

MAX_PAGE = 1_000
MAX_METADATA_DEPTH = 32
MAX_RERANK_QUERY = 32_768  # characters
_DATE_OF_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ]")

Value = TypeVar("Value")


class _NullIsLeftOut:
    """Annotates a field with a default: null in the request stands for the default, and the JSON schema allows it."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(_default_for_null, nullable_schema(handler(source)))


def _default_for_null(value: Value | None) -> Value:
    if value is None:
        raise PydanticUseDefault
    return value


def _no_control_characters(value: str) -> str:
    if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in value):
        raise ValueError("must not contain control characters")
    return storable_text(value)


def storable_text(value: str) -> str:
    """`value`, if both SQLite and PostgreSQL can hold it. Raises ValueError."""
    if "\0" in value:
        raise ValueError("must not contain NUL")
    return encodable(value)


def encodable(value: str) -> str:
    """`value`, if it is Unicode. Raises ValueError."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be valid Unicode, without half of a surrogate pair") from error
    return value


def _no_dot_segment(value: str) -> str:
    if value in (".", ".."):
        raise ValueError("must not be . or .., which clients remove from a path")
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return storable_text(value)


def _not_empty(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return encodable(value)


def _in_utc(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise ValueError("must carry a time zone (RFC 3339)")
    try:
        return value.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("must lie in the years 1 to 9999 in UTC") from error


def _rfc3339(value: Any) -> Any:
    """`value`, if it is a time. Pydantic would also take digits, as seconds since 1970, and a date alone."""
    if not (isinstance(value, datetime) or (isinstance(value, str) and _DATE_OF_TIME.match(value))):
        raise ValueError("must be an RFC 3339 time")
    return value


def _parsed(value: Any) -> Any:
    """A filter, which in a query is the text of a JSON object."""
    if not isinstance(value, str):
        return value
    try:
        return from_json(value, cache_strings="keys")  # as in bodies; orjson would make floats of large integers
    except ValueError as error:
        raise ValueError("must be a JSON object") from error


def _storable(value: dict[str, Any]) -> dict[str, Any]:
    """`value`, if it comes back from the log unchanged: bounded depth, finite numbers, integers of at most 64 bits."""
    layer: list[Any] = [value]
    for _ in range(MAX_METADATA_DEPTH):
        below: list[Any] = []
        for node in layer:
            if isinstance(node, dict):
                for key in node:
                    if not isinstance(key, str):
                        raise ValueError("must have strings as keys")
                    storable_text(key)
            for child in node.values() if isinstance(node, dict) else node:
                if isinstance(child, str):
                    storable_text(child)
                elif isinstance(child, int):
                    if not -(2**63) <= child < 2**63:
                        raise ValueError("must hold integers of at most 64 bits")
                elif isinstance(child, float):
                    if not math.isfinite(child):
                        raise ValueError("must hold finite numbers only")
                elif isinstance(child, dict | list):
                    below.append(child)
        if not below:
            return value
        layer = below
    raise ValueError(f"must not be nested more than {MAX_METADATA_DEPTH} levels deep")


def _described(pattern: str) -> Any:
    """Describes strings in the JSON schema by a pattern, which a validator checks."""
    return Field(json_schema_extra={"pattern": pattern})


_NO_CONTROLS = r"[^\u0000-\u001f\u007f-\u009f]*$"
# Not white space as Python and JSON Schema define it.
_VISIBLE = r"[^\s\u001c-\u001f\u0085]"

# The type of a field whose default is not null. Clients that send null for what they do not set get the default.
OrNull = Annotated[Value, _NullIsLeftOut()]
Prefix = Annotated[
    str, StringConstraints(max_length=256), AfterValidator(_no_control_characters), _described(f"^{_NO_CONTROLS}")
]
# An id of a user or memory in the log, which may be older than the rules for new ids.
StoredId = Annotated[
    str,
    StringConstraints(min_length=1, max_length=256),
    AfterValidator(_no_control_characters),
    _described(f"^{_NO_CONTROLS}"),
]
# The id of a new user or memory.
NewId = Annotated[StoredId, AfterValidator(_no_dot_segment), _described(rf"^(?!\.\.?$){_NO_CONTROLS}")]
# The name of a conversation.
Thread = StoredId
# The text of a memory.
Text = Annotated[
    str,
    AfterValidator(_not_blank),
    WithJsonSchema({"type": "string", "minLength": 1, "pattern": rf"^[^\u0000]*{_VISIBLE}[^\u0000]*$"}),
]
# A text that is embedded and not stored. White space alone has a vector, and so has NUL.
EmbeddedText = Annotated[str, AfterValidator(_not_empty), WithJsonSchema({"type": "string", "minLength": 1})]
# The text that others are scored for. It is sent with each part of the others, and tokenized whole with each.
RerankQuery = Annotated[
    str,
    StringConstraints(max_length=MAX_RERANK_QUERY),
    AfterValidator(_not_empty),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_RERANK_QUERY}),
]
Metadata = Annotated[dict[str, Any], AfterValidator(_storable)]
Time = Annotated[datetime, Field(strict=False), BeforeValidator(_rfc3339), AfterValidator(_in_utc)]
# Validation stops at the first wrong number: a body has room for millions, and each would get an error of its own.
Vector = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1, max_length=16_384, fail_fast=True)
]
Filter = Annotated[Metadata, Field(json_schema_extra={"minProperties": 1})]
FilterInQuery = Annotated[Filter, BeforeValidator(_parsed)]
Cursor = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,4096}$")]
Limit = Annotated[int, Field(ge=1, le=MAX_PAGE)]
