r"""The filter grammar, and its translation to SQL with the same meaning on SQLite and PostgreSQL.

    filter    {"key": value}                    same as {"key": {"eq": value}}; several keys must all hold
              {"key": {"gte": 3, "lt": 9}}      several operators must all hold
              {"AND": [filter, ...]}  {"OR": [filter, ...]}  {"NOT": filter}
    key       a field of the memory itself: id, user_id, text, version, created_at, updated_at, expires_at;
              any other key is a key of the metadata, or a path into it (`source.app`)
    operator  eq ne gt gte lt lte in nin contains icontains exists

A key with dots is the key of that name in the metadata (`gen_ai.system`) if the memory has it, and else the path. With
the dot escaped (`source.k8s\.io/app`) it is a path alone, whose names may contain dots. `metadata.` in front of a key
names the metadata whatever follows, so that `metadata.id` is not the memory's id. If the metadata has a key `metadata`
itself, that is `metadata.metadata`.

Two values are equal only if they have the same JSON type. Two integers are compared exactly, other numbers as doubles,
strings by code points. `gt`, `gte`, `lt` and `lte` hold between two numbers or two strings. `in` is true for a list in
the metadata if it is true for one of its elements; `eq` never is. `ne` and `nin` are the negations of `eq` and `in`, so
they hold if the key is missing; no other operator does. `contains` finds a substring in a string or an element in a
list. `icontains` does the same for strings and ignores case. `exists` is true if the key is present, even if its value
is null.

A field of the memory takes those operators that mean something for it, and operands of its type. `expires_at` is null
if the memory never expires; for `exists` it is then missing.

A filter is parsed first, which checks it, and then translated.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import orjson
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    Numeric,
    Text,
    and_,
    any_,
    case,
    cast,
    exists,
    false,
    func,
    literal,
    not_,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSON

from store.errors import InvalidInput
from store.log.rows import micros
from store.log.schema import contents, memories, users
from store.records import Filter

Condition = ColumnElement[bool]
_Paths = tuple[tuple[str, ...], ...]
OPERATORS = ("eq", "ne", "gt", "gte", "lt", "lte", "in", "nin", "contains", "icontains", "exists")
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}
_EXACT = ("eq", "ne", "in", "nin", "exists")
_ORDER = ("gt", "gte", "lt", "lte")
_UNESCAPED_DOT = re.compile(r"(?<!\\)\.")
_NOT_IN_A_NAME = re.compile(r'["\\\x00-\x1f]')
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
class _FieldTest:
    """A test of a field of the memory itself."""

    field: str
    operator: str
    operand: Any


@dataclass(frozen=True, slots=True)
class _MetadataTest:
    """A test of the value at a path in the metadata: at the first of `paths` that the memory has."""

    paths: _Paths
    operator: str
    operand: Any


_Node = _Group | _Not | _FieldTest | _MetadataTest


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
            elif key == "metadata":
                raise InvalidInput("is all of the metadata: name a key in it, as in `metadata.topic`", here)
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
        if key in _FIELDS:
            field = _FIELDS[key]
            if op not in field.operators:
                message = f"is not an operator for `{key}`, which takes {', '.join(field.operators)}"
                raise InvalidInput(message, path)
            read = _or_null(field.read) if field.nullable and op in _EXACT else field.read
            return _FieldTest(key, op, self._operand(op, operand, read, path))
        read = _METADATA_READERS.get(op, _read_scalar)
        return _MetadataTest(_read_key(key, path), op, self._operand(op, operand, read, path))

    def _operand(self, op: str, operand: Any, read: Callable[[Any, str], Any], path: str) -> Any:
        if op == "exists":
            if not isinstance(operand, bool):
                raise InvalidInput("must be true or false", path)
            return operand
        if op in ("in", "nin"):
            if not isinstance(operand, list):
                raise InvalidInput("must be a list", path)
            strings = sum(isinstance(item, str) for item in operand)
            self._count(len(operand) - strings + strings // _STRINGS_PER_CONDITION, path)
            return _read_items(read, operand, path)
        return read(operand, path)

    def _count(self, conditions: int, path: str) -> None:
        self._conditions += conditions
        if self._conditions > _MAX_CONDITIONS:
            raise InvalidInput(f"exceeds the limit: a filter has at most {_MAX_CONDITIONS} conditions", path)


def _read_key(key: str, path: str) -> _Paths:
    """The paths in the metadata that a key stands for, the one that counts first."""
    key = key.removeprefix("metadata.")
    names = tuple(name.replace("\\.", ".") for name in _UNESCAPED_DOT.split(key))
    if not _is_unicode(key) or any(not name or _NOT_IN_A_NAME.search(name) for name in names):
        message = (
            "must be names joined by dots, without quotes, backslashes and control characters; "
            "a dot in a name is written \\."
        )
        raise InvalidInput(message, path)
    if len(names) > _MAX_PATH:
        raise InvalidInput(f"must have at most {_MAX_PATH} names", path)
    return ((key,), names) if len(names) > 1 and "\\" not in key else (names,)


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


def _read_string(value: Any, path: str) -> Any:
    if not isinstance(value, str):
        raise InvalidInput("must be a string", path)
    return _read_scalar(value, path)


def _read_number_or_string(value: Any, path: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidInput("must be a number or a string", path)
    return _read_scalar(value, path)


def _read_integer(value: Any, path: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInput("must be an integer", path)
    return _read_scalar(value, path)


def _or_null(read: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    return lambda value, path: None if value is None else read(value, path)


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of the memory itself: its value in SQL, and what may be asked of it."""

    value: Any
    operators: tuple[str, ...]
    read: Callable[[Any, str], Any]
    nullable: bool = False


_FIELDS = {
    "id": _Field(memories.c.id, _EXACT, _read_string),
    "user_id": _Field(
        select(users.c.user_id).where(users.c.uid == memories.c.uid).correlate(memories).scalar_subquery(),
        _EXACT,
        _read_string,
    ),
    "text": _Field(contents.c.text, (*_EXACT, "contains", "icontains"), _read_string),
    "version": _Field(memories.c.version, (*_EXACT, *_ORDER), _read_integer),
    "created_at": _Field(memories.c.created_at, (*_EXACT, *_ORDER), _read_time),
    "updated_at": _Field(memories.c.updated_at, (*_EXACT, *_ORDER), _read_time),
    "expires_at": _Field(memories.c.expires_at, (*_EXACT, *_ORDER), _read_time, nullable=True),
}
_METADATA_READERS = {"icontains": _read_string, **dict.fromkeys(_ORDER, _read_number_or_string)}


class _SQLite:
    """JSON in SQLite. A place in a document is a pair of SQL expressions: the type and the value."""

    def at(self, paths: _Paths) -> Any:
        place = self._first(paths)
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
            exact = compare(found, literal(value, BigInteger))
            as_doubles = compare(found, cast(literal(value, BigInteger), Double))
            return case({"integer": exact, "real": as_doubles}, value=kind, else_=false())
        # SQLite converts the document's number and this text by the same routine, so that equal numbers are equal.
        number = cast(literal(repr(value), Text), Double)
        return and_(kind.in_(("integer", "real")), compare(cast(found, Double), number))

    def is_one_of(self, string: Any, strings: list[str]) -> Any:
        if len(strings) == 1:  # faster than a search in a list
            return string == strings[0]
        # One parameter, because the list is in a statement twice and SQLite has at most 32,766 parameters.
        one = func.json_each(orjson.dumps(strings).decode()).table_valued("value", name="one")
        return string.in_(select(one.c.value))

    def is_string(self, place: Any) -> Any:
        return place[0] == "text"

    def is_list(self, place: Any) -> Any:
        return place[0] == "array"

    def string(self, place: Any) -> Any:
        return place[1]

    def lower(self, string: Any) -> Any:
        return func.unicode_lower(string)

    def has_substring(self, string: Any, needle: str) -> Any:
        return func.instr(string, literal(needle, Text)) > 0

    def any_element(self, paths: _Paths, test: Callable[[Any], Any]) -> Any:
        items = func.json_each(contents.c.metadata, self._first(paths))
        element = items.table_valued("type", "value", name="element")
        return exists().select_from(element).where(test((element.c.type, element.c.value)))

    def _first(self, paths: _Paths) -> Any:
        """The first path that the document has, or the last."""
        *others, last = ["$" + "".join(f'."{name}"' for name in path) for path in paths]
        return case(*((self._has(path), path) for path in others), else_=last) if others else last

    @staticmethod
    def _has(path: str) -> Any:
        return func.json_type(contents.c.metadata, path).is_not(None)


class _PostgreSQL:
    """JSON in PostgreSQL. A place in a document is an expression of type json, which keeps numbers as written."""

    def at(self, paths: _Paths) -> Any:
        places = [self._at(path) for path in paths]
        return places[0] if len(places) == 1 else func.coalesce(*places, type_=JSON())

    @staticmethod
    def _at(path: tuple[str, ...]) -> Any:
        place: Any = cast(contents.c.metadata, JSON)
        for name in path:  # as text keys: an integer key would be an index into an array
            place = place.op("->", return_type=JSON())(literal(name, Text))
        return place

    def is_present(self, place: Any) -> Any:
        return place.is_not(None)

    def compare(self, place: Any, op: str, value: Any) -> Any:
        kind, written = func.json_typeof(place), self.string(place)
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

    def is_one_of(self, string: Any, strings: list[str]) -> Any:
        return string == any_(cast(literal(strings, _TEXT_ARRAY), _TEXT_ARRAY))

    def is_string(self, place: Any) -> Any:
        return func.json_typeof(place) == "string"

    def is_list(self, place: Any) -> Any:
        return func.json_typeof(place) == "array"

    def string(self, place: Any) -> Any:
        return place.op("#>>", return_type=Text())(cast(literal("{}", Text), _TEXT_ARRAY))

    def lower(self, string: Any) -> Any:
        return func.lower(string.collate("und-x-icu"))

    def has_substring(self, string: Any, needle: str) -> Any:
        return func.strpos(string, literal(needle, Text)) > 0

    def any_element(self, paths: _Paths, test: Callable[[Any], Any]) -> Any:
        element = func.json_array_elements(self.at(paths)).table_valued("value", name="element").render_derived()
        return exists().select_from(element).where(test(cast(element.c.value, JSON)))


_Json = _SQLite | _PostgreSQL


def _to_sql(node: _Node, json: _Json) -> Condition:
    match node:
        case _Group(operator, parts):
            conditions = [_to_sql(part, json) for part in parts]
            return and_(*conditions) if operator == "AND" else or_(*conditions)
        case _Not(part):
            return not_(_to_sql(part, json))
        case _FieldTest():
            return _or_false(_field_test(node, json))
        case _MetadataTest():
            return _or_false(_metadata_test(node, json))


def _or_false(test: Any) -> Any:
    return func.coalesce(test, false())


def _field_test(test: _FieldTest, json: _Json) -> Any:
    value, operand = _FIELDS[test.field].value, test.operand
    match test.operator:
        case "exists":
            return value.is_not(None) if operand else value.is_(None)
        case "ne":
            return not_(_or_false(_equals(value, operand)))
        case "in":
            return _equals_one_of(value, operand)
        case "nin":
            return not_(_or_false(_equals_one_of(value, operand)))
        case "contains":
            return json.has_substring(value, operand)
        case "icontains":
            return json.has_substring(json.lower(value), operand.lower())
        case "eq":
            return _equals(value, operand)
    return _COMPARE[test.operator](value, operand)


def _equals(value: Any, operand: Any) -> Any:
    return value.is_(None) if operand is None else value == operand


def _equals_one_of(value: Any, operands: list[Any]) -> Any:
    found = value.in_([operand for operand in operands if operand is not None])
    return or_(value.is_(None), found) if None in operands else found


def _metadata_test(test: _MetadataTest, json: _Json) -> Any:
    place, operand = json.at(test.paths), test.operand
    match test.operator:
        case "exists":
            present = json.is_present(place)
            return present if operand else not_(present)
        case "ne":
            return not_(_or_false(json.compare(place, "eq", operand)))
        case "in":
            return _in(test.paths, operand, json)
        case "nin":
            return not_(_or_false(_in(test.paths, operand, json)))
        case "contains":
            return _contains(test.paths, operand, json)
        case "icontains":
            return _icontains(test.paths, operand, json)
    return json.compare(place, test.operator, operand)


def _list_or_value(paths: _Paths, element: Callable[[Any], Any], value: Callable[[Any], Any], json: _Json) -> Any:
    """Whether `element` holds for an element of the list at a path; if no list is there, whether `value` holds for it.

    CASE evaluates only the branch that it takes, so that a value that is no list costs nothing more.
    """
    place = json.at(paths)
    return case((json.is_list(place), json.any_element(paths, element)), else_=value(place))


def _in(paths: _Paths, operands: list[Any], json: _Json) -> Any:
    strings = [operand for operand in operands if isinstance(operand, str)]
    others = [operand for operand in operands if not isinstance(operand, str)]

    def is_one(place: Any, *branches: tuple[Any, Any]) -> Any:
        equal = or_(false(), *(json.compare(place, "eq", operand) for operand in others))
        if strings:  # the first branch, because most lists of operands are of strings, and so are most values
            branches = ((json.is_string(place), json.is_one_of(json.string(place), strings)), *branches)
        return case(*branches, else_=equal) if branches else equal

    place = json.at(paths)
    return is_one(place, (json.is_list(place), json.any_element(paths, is_one)))


def _contains(paths: _Paths, operand: Any, json: _Json) -> Any:
    def has_substring(place: Any) -> Any:
        if not isinstance(operand, str):
            return false()
        return and_(json.is_string(place), json.has_substring(json.string(place), operand))

    return _list_or_value(paths, lambda item: json.compare(item, "eq", operand), has_substring, json)


def _icontains(paths: _Paths, operand: str, json: _Json) -> Any:
    needle = operand.lower()

    def equals(item: Any) -> Any:
        return and_(json.is_string(item), json.lower(json.string(item)) == needle)

    def has_substring(place: Any) -> Any:
        return and_(json.is_string(place), json.has_substring(json.lower(json.string(place)), needle))

    return _list_or_value(paths, equals, has_substring, json)
