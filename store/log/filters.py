"""The filter grammar, and its translation to SQL with the same meaning on SQLite and PostgreSQL.

    filter    {"key": value}                    same as {"key": {"eq": value}}; several keys must all hold
              {"key": {"gte": 3, "lt": 9}}      several operators must all hold
              {"AND": [filter, ...]}  {"OR": [filter, ...]}  {"NOT": filter}
    key       a path into the metadata (`source.app`), or `created_at`, `updated_at` (RFC 3339 times)
    operator  eq ne gt gte lt lte in nin contains icontains exists

Two values are equal only if they have the same JSON type. Two integers are compared exactly, other numbers as doubles,
strings by code points. `gt`, `gte`, `lt` and `lte` hold between two numbers or two strings. `ne` and `nin` are the
negations of `eq` and `in`, so they hold if the key is missing; no other operator does. `contains` finds a substring in
a string or an element in a list. `icontains` does the same for strings and ignores case. `exists` is true if the key
is present, even if its value is null.

A filter is parsed first, which checks it, and then translated.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    Numeric,
    Text,
    and_,
    case,
    cast,
    exists,
    false,
    func,
    literal,
    not_,
    or_,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSON

from store.errors import InvalidInput
from store.log.rows import micros
from store.log.schema import contents, memories
from store.records import Filter

Condition = ColumnElement[bool]
OPERATORS = ("eq", "ne", "gt", "gte", "lt", "lte", "in", "nin", "contains", "icontains", "exists")
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}
_TIMES = {"created_at": memories.c.created_at, "updated_at": memories.c.updated_at}
_TEXT_ARRAY = ARRAY(Text)
_MAX_DEPTH = 16
_MAX_CONDITIONS = 256
_MAX_PATH = 32  # names in a key; metadata is not nested deeper
_STRINGS_PER_CONDITION = 100  # a list of strings or times counts as one condition per 100 of them


@dataclass(frozen=True, slots=True)
class _Group:
    """Several filters of which all, or any, must hold."""

    operator: Literal["AND", "OR"]
    parts: list[_Node]


@dataclass(frozen=True, slots=True)
class _Not:
    part: _Node


@dataclass(frozen=True, slots=True)
class _TimeTest:
    """A test of a memory's `created_at` or `updated_at`. Times are in microseconds."""

    key: str
    operator: str
    operand: Any


@dataclass(frozen=True, slots=True)
class _MetadataTest:
    """A test of the value at a path in the metadata."""

    path: tuple[str, ...]
    operator: str
    operand: Any


_Node = _Group | _Not | _TimeTest | _MetadataTest


def condition(filter: Filter, dialect: str) -> Condition:
    """The SQL condition on `memories` and their `contents` that `filter` stands for. It is never NULL.

    Args:
        dialect: `sqlite` or `postgresql`.

    Raises:
        InvalidInput: `field` is the path of the invalid part: `filter.AND.0.age.foo`.
    """
    return _to_sql(_Parser().parse(filter, "filter", 0), _PostgreSQL() if dialect == "postgresql" else _SQLite())


def check(filter: Filter) -> None:
    """Raise InvalidInput unless the filter can be used."""
    _Parser().parse(filter, "filter", 0)


class _Parser:
    """Checks one filter and counts its conditions. Every method raises InvalidInput about the path that it is given."""

    def __init__(self) -> None:
        self._conditions = 0

    def parse(self, filter: Any, path: str, depth: int) -> _Node:
        if depth > _MAX_DEPTH:
            raise InvalidInput(f"must be at most {_MAX_DEPTH} deep", path)
        if not isinstance(filter, dict) or not filter:
            raise InvalidInput("must be a JSON object that is not empty", path)
        parts: list[_Node] = []
        for key, value in filter.items():
            if not isinstance(key, str):
                raise InvalidInput("must have keys that are strings", path)
            here = f"{path}.{key}"
            if key in ("AND", "OR"):
                if not isinstance(value, list) or not value:
                    raise InvalidInput("must be a list of filters that is not empty", here)
                inner = [self.parse(item, f"{here}.{n}", depth + 1) for n, item in enumerate(value)]
                parts.append(_Group("AND" if key == "AND" else "OR", inner))
            elif key == "NOT":
                parts.append(_Not(self.parse(value, here, depth + 1)))
            elif not isinstance(value, dict):
                parts.append(self._test(key, "eq", value, here))
            elif not value:
                raise InvalidInput("must have an operator", here)
            else:
                parts += [self._test(key, op, operand, f"{here}.{op}") for op, operand in value.items()]
        return _Group("AND", parts)

    def _test(self, key: str, op: str, operand: Any, path: str) -> _Node:
        self._count(1, path)
        if op not in OPERATORS:
            raise InvalidInput(f"must be one of the operators {', '.join(OPERATORS)}", path, "unknown_operator")
        if key in _TIMES:
            if op in ("contains", "icontains"):
                raise InvalidInput("is an operator for metadata, not for times", path)
            return _TimeTest(key, op, self._operand(op, operand, _read_time, path))
        return _MetadataTest(_split_key(key, path), op, self._operand(op, operand, _read_scalar, path))

    def _operand(self, op: str, operand: Any, read: Callable[[Any, str], Any], path: str) -> Any:
        match op:
            case "exists":
                if not isinstance(operand, bool):
                    raise InvalidInput("must be true or false", path)
                return operand
            case "in" | "nin":
                if not isinstance(operand, list):
                    raise InvalidInput("must be a list", path)
                strings = sum(isinstance(item, str) for item in operand)
                self._count(len(operand) - strings + strings // _STRINGS_PER_CONDITION, path)
                return _read_items(read, operand, path)
            case "icontains":
                if not isinstance(operand, str):
                    raise InvalidInput("must be a string", path)
            case "gt" | "gte" | "lt" | "lte":
                if isinstance(operand, bool) or not isinstance(operand, str | int | float):
                    raise InvalidInput("must be a number or a string", path)
        return read(operand, path)

    def _count(self, conditions: int, path: str) -> None:
        self._conditions += conditions
        if self._conditions > _MAX_CONDITIONS:
            raise InvalidInput(f"exceeds the limit: a filter has at most {_MAX_CONDITIONS} conditions", path)


def _split_key(key: str, path: str) -> tuple[str, ...]:
    names = tuple(key.split("."))
    if not _is_unicode(key) or any(not name or any(c in '"\\' or c < " " for c in name) for name in names):
        message = "must be names joined by dots, without quotes, backslashes and control characters"
        raise InvalidInput(message, path)
    if len(names) > _MAX_PATH:
        raise InvalidInput(f"must have at most {_MAX_PATH} names", path)
    return names


def _read_items(read: Callable[[Any, str], Any], operand: list[Any], path: str) -> list[Any]:
    """Read each item. Its path is made only for an error: a key may be as long as the request's body."""
    items = []
    for number, item in enumerate(operand):
        try:
            items.append(read(item, path))
        except InvalidInput as error:
            raise error.at(f"{path}.{number}") from error
    return items


def _read_scalar(value: Any, path: str) -> Any:
    if isinstance(value, str):
        if "\0" in value or not _is_unicode(value):
            raise InvalidInput("must be valid Unicode without NUL characters", path)
    elif isinstance(value, float):
        if type(value) is not float:  # the repr of numpy's subclass is `np.float64(0.5)`, which is not SQL
            raise InvalidInput("must be a Python float", path)
        if not math.isfinite(value):
            raise InvalidInput("is not finite", path)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InvalidInput("must be an integer of at most 64 bits", path)
    elif value is not None and not isinstance(value, int):
        raise InvalidInput("must be a string, a number, a boolean or null", path)
    return value


def _read_time(value: Any, path: str) -> int:
    try:
        return micros(datetime.fromisoformat(value), path)
    except (TypeError, ValueError) as error:
        raise InvalidInput("must be an RFC 3339 time with a zone", path) from error


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class _SQLite:
    """JSON in SQLite. A place in a document is a pair of SQL expressions: the type and the value."""

    def at(self, path: tuple[str, ...]) -> Any:
        place = _json_path(path)
        return func.json_type(contents.c.metadata, place), func.json_extract(contents.c.metadata, place)

    def is_present(self, place: Any) -> Any:
        return place[0].is_not(None)

    def compare(self, place: Any, op: str, value: Any) -> Any:
        kind, found = place
        compare = _COMPARE[op]
        if value is None:
            return kind == "null"
        if isinstance(value, bool):
            return kind == ("true" if value else "false")
        if isinstance(value, str):
            return and_(kind == "text", compare(found, value))
        if isinstance(value, int):
            exact = and_(kind == "integer", compare(found, literal(value, BigInteger)))
            return or_(exact, and_(kind == "real", compare(found, cast(literal(value, BigInteger), Double))))
        # SQLite converts the document's number and this text by the same routine, so that equal numbers are equal.
        number = cast(literal(repr(value), Text), Double)
        return and_(kind.in_(("integer", "real")), compare(cast(found, Double), number))

    def is_one_of(self, place: Any, strings: list[str]) -> Any:
        return and_(place[0] == "text", place[1].in_(strings))

    def is_string(self, place: Any) -> Any:
        return place[0] == "text"

    def has_substring(self, place: Any, needle: str) -> Any:
        return func.instr(place[1], literal(needle, Text)) > 0

    def lower(self, place: Any) -> Any:
        return place[0], func.unicode_lower(place[1])

    def any_element(self, path: tuple[str, ...], test: Callable[[Any], Any]) -> Any:
        items = func.json_each(contents.c.metadata, _json_path(path))
        element = items.table_valued("type", "value", name="element")
        found = exists().select_from(element).where(test((element.c.type, element.c.value)))
        return and_(self.at(path)[0] == "array", found)


def _json_path(path: tuple[str, ...]) -> str:
    return "$" + "".join(f'."{name}"' for name in path)


class _PostgreSQL:
    """JSON in PostgreSQL. A place in a document is an expression of type json, which keeps numbers as written."""

    def at(self, path: tuple[str, ...]) -> Any:
        place: Any = cast(contents.c.metadata, JSON)
        for name in path:  # as text keys: an integer key would be an index into an array
            place = place.op("->", return_type=JSON())(literal(name, Text))
        return place

    def is_present(self, place: Any) -> Any:
        return place.is_not(None)

    def compare(self, place: Any, op: str, value: Any) -> Any:
        kind, written = func.json_typeof(place), self._text(place)
        compare = _COMPARE[op]
        if value is None:
            return kind == "null"
        if isinstance(value, bool):
            return and_(kind == "boolean", written == ("true" if value else "false"))
        if isinstance(value, str):
            return and_(kind == "string", compare(written.collate("C"), literal(value, Text).collate("C")))
        double = compare(cast(written, Double), cast(literal(repr(float(value)), Text), Double))
        if isinstance(value, int):
            exact = compare(cast(written, Numeric), literal(value, BigInteger))
            double = case((written.regexp_match("[.eE]"), double), else_=exact)
        return case((kind == "number", double), else_=false())

    def is_one_of(self, place: Any, strings: list[str]) -> Any:
        return and_(func.json_typeof(place) == "string", self._text(place).in_(strings))

    def is_string(self, place: Any) -> Any:
        return func.json_typeof(place) == "string"

    def has_substring(self, place: Any, needle: str) -> Any:
        return func.strpos(self._text(place), literal(needle, Text)) > 0

    def lower(self, place: Any) -> Any:
        return func.to_json(func.lower(self._text(place).collate("und-x-icu")))

    def any_element(self, path: tuple[str, ...], test: Callable[[Any], Any]) -> Any:
        place = self.at(path)
        items = case((func.json_typeof(place) == "array", place), else_=cast(literal("[]", Text), JSON))
        element = func.json_array_elements(items).table_valued("value", name="element").render_derived()
        return exists().select_from(element).where(test(cast(element.c.value, JSON)))

    @staticmethod
    def _text(place: Any) -> Any:
        return place.op("#>>", return_type=Text())(cast(literal("{}", Text), _TEXT_ARRAY))


_Json = _SQLite | _PostgreSQL


def _to_sql(node: _Node, json: _Json) -> Condition:
    match node:
        case _Group(operator, parts):
            conditions = [_to_sql(part, json) for part in parts]
            return and_(*conditions) if operator == "AND" else or_(*conditions)
        case _Not(part):
            return not_(_to_sql(part, json))
        case _TimeTest():
            return _or_false(_time_test(node))
        case _MetadataTest():
            return _or_false(_metadata_test(node, json))


def _or_false(test: Any) -> Any:
    return func.coalesce(test, false())


def _time_test(test: _TimeTest) -> Any:
    column, operand = _TIMES[test.key], test.operand
    match test.operator:
        case "exists":
            return true() if operand else false()
        case "in":
            return column.in_(operand)
        case "nin":
            return not_(column.in_(operand))
        case "ne":
            return column != operand
    return _COMPARE[test.operator](column, operand)


def _metadata_test(test: _MetadataTest, json: _Json) -> Any:
    place, operand = json.at(test.path), test.operand
    match test.operator:
        case "exists":
            present = json.is_present(place)
            return present if operand else not_(present)
        case "ne":
            return not_(_or_false(json.compare(place, "eq", operand)))
        case "in":
            return _in(place, operand, json)
        case "nin":
            return not_(_or_false(_in(place, operand, json)))
        case "contains":
            return _contains(test.path, operand, json)
        case "icontains":
            return _icontains(test.path, operand, json)
    return json.compare(place, test.operator, operand)


def _in(place: Any, items: list[Any], json: _Json) -> Any:
    strings = [item for item in items if isinstance(item, str)]
    found = or_(false(), *(json.compare(place, "eq", item) for item in items if not isinstance(item, str)))
    return or_(_or_false(found), json.is_one_of(place, strings)) if strings else found


def _contains(path: tuple[str, ...], operand: Any, json: _Json) -> Any:
    element = json.any_element(path, lambda item: json.compare(item, "eq", operand))
    if not isinstance(operand, str):
        return element
    place = json.at(path)
    return or_(_or_false(element), and_(json.is_string(place), json.has_substring(place, operand)))


def _icontains(path: tuple[str, ...], operand: str, json: _Json) -> Any:
    needle, place = operand.lower(), json.at(path)
    element = json.any_element(
        path, lambda item: and_(json.is_string(item), json.compare(json.lower(item), "eq", needle))
    )
    substring = and_(json.is_string(place), json.has_substring(json.lower(place), needle))
    return or_(_or_false(element), substring)
