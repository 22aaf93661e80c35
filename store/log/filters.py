"""The filter grammar, and its translation to SQL with the same meaning on SQLite and PostgreSQL.

    filter    {"key": value}                    same as {"key": {"eq": value}}; several keys must all hold
              {"key": {"gte": 3, "lt": 9}}      several operators must all hold
              {"AND": [filter, ...]}  {"OR": [filter, ...]}  {"NOT": filter}
    key       a path into the metadata (`source.app`), or `created_at`, `updated_at` (RFC 3339 times)
    operator  eq ne gt gte lt lte in nin contains icontains exists

A value equals one of the same JSON type; two integers are compared exactly, other numbers as doubles, strings by
code points. `gt` and its like hold between numbers or between strings. `ne` and `nin` are what `eq` and `in` are not,
so they hold where the key is missing; every other operator does not. `contains` finds a substring in a string or an
element in a list, `icontains` the same for strings in lower case. `exists` tells a key that is there, even if null.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from datetime import datetime
from typing import Any

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
_MAX_LEAVES = 256
_MAX_PATH = 32  # metadata is not nested deeper
_STRINGS_A_LEAF = 100  # a list of strings or times is one condition, a long one several


def condition(filter: Filter, dialect: str, param: str = "filter") -> Condition:
    """The SQL condition on `memories` and their `contents` that `filter` stands for. It is never NULL.

    Args:
        dialect: `sqlite` or `postgresql`.
        param: path of the filter in its request, the beginning of every error's `param`.

    Raises:
        InvalidInput: with the path of what is wrong: `filter.AND.0.age.foo`.
    """
    return _Translation(_PostgreSQL() if dialect == "postgresql" else _SQLite()).filter(filter, param, 0)


def check(filter: Filter, param: str = "filter") -> None:
    """Raise InvalidInput unless the filter can be used."""
    condition(filter, "sqlite", param)


class _SQLite:
    """JSON in SQLite: a place in a document is a pair of SQL expressions, its type and its value."""

    def at(self, path: tuple[str, ...]) -> Any:
        where = "$" + "".join(f'."{segment}"' for segment in path)
        return func.json_type(contents.c.metadata, where), func.json_extract(contents.c.metadata, where)

    def there(self, place: Any) -> Any:
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
        # SQLite reads the document's number and this text with the same routine, so that equal numbers are equal
        number = cast(literal(repr(value), Text), Double)
        return and_(kind.in_(("integer", "real")), compare(cast(found, Double), number))

    def among(self, place: Any, strings: list[str]) -> Any:
        return and_(place[0] == "text", place[1].in_(strings))

    def is_string(self, place: Any) -> Any:
        return place[0] == "text"

    def within(self, place: Any, needle: str) -> Any:
        return func.instr(place[1], literal(needle, Text)) > 0

    def lower(self, place: Any) -> Any:
        return place[0], func.unicode_lower(place[1])

    def any_element(self, path: tuple[str, ...], test: Callable[[Any], Any]) -> Any:
        where = "$" + "".join(f'."{segment}"' for segment in path)
        element = func.json_each(contents.c.metadata, where).table_valued("type", "value", name="element")
        found = exists().select_from(element).where(test((element.c.type, element.c.value)))
        return and_(self.at(path)[0] == "array", found)


class _PostgreSQL:
    """JSON in PostgreSQL: a place in a document is an expression of type json, which keeps numbers as written."""

    def at(self, path: tuple[str, ...]) -> Any:
        place: Any = cast(contents.c.metadata, JSON)
        for segment in path:  # by text keys only, which never count into an array
            place = place.op("->", return_type=JSON())(literal(segment, Text))
        return place

    def there(self, place: Any) -> Any:
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

    def among(self, place: Any, strings: list[str]) -> Any:
        return and_(func.json_typeof(place) == "string", self._text(place).in_(strings))

    def is_string(self, place: Any) -> Any:
        return func.json_typeof(place) == "string"

    def within(self, place: Any, needle: str) -> Any:
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


class _Translation:
    """Walks one filter; every method raises InvalidInput with the path it was given."""

    def __init__(self, json: Any) -> None:
        self._json = json
        self._leaves = 0

    def filter(self, filter: Any, param: str, depth: int) -> Condition:
        if depth > _MAX_DEPTH:
            raise InvalidInput(f"A filter is at most {_MAX_DEPTH} deep.", param)
        if not isinstance(filter, dict) or not filter:
            raise InvalidInput("A filter is a JSON object that is not empty.", param)
        parts = []
        for key, value in filter.items():
            if not isinstance(key, str):
                raise InvalidInput("A key is a string.", param)
            here = f"{param}.{key}"
            if key in ("AND", "OR"):
                if not isinstance(value, list) or not value:
                    raise InvalidInput(f"{key} takes a list of filters that is not empty.", here)
                inner = [self.filter(item, f"{here}.{n}", depth + 1) for n, item in enumerate(value)]
                parts.append(and_(*inner) if key == "AND" else or_(*inner))
            elif key == "NOT":
                parts.append(not_(self.filter(value, here, depth + 1)))
            else:
                operators = value if isinstance(value, dict) else {"eq": value}
                if not operators:
                    raise InvalidInput("There is no operator.", here)
                for op, operand in operators.items():
                    where = f"{here}.{op}" if isinstance(value, dict) else here
                    parts.append(func.coalesce(self.leaf(key, op, operand, where), false()))
        return and_(*parts)

    def count(self, conditions: int, param: str) -> None:
        self._leaves += conditions
        if self._leaves > _MAX_LEAVES:
            raise InvalidInput(f"A filter has at most {_MAX_LEAVES} conditions.", param)

    def leaf(self, key: str, op: str, operand: Any, param: str) -> Any:
        self.count(1, param)
        if op not in OPERATORS:
            raise InvalidInput(f"The operators of a filter are {', '.join(OPERATORS)}.", param, "unknown_operator")
        if op == "exists" and not isinstance(operand, bool):
            raise InvalidInput("exists takes true or false.", param)
        if op in ("in", "nin") and not isinstance(operand, list):
            raise InvalidInput(f"{op} takes a list.", param)
        if op == "icontains" and not isinstance(operand, str):
            raise InvalidInput("icontains takes a string.", param)
        if key in _TIMES:
            return self.time(key, op, operand, param)
        path = tuple(key.split("."))
        if any(not segment or any(c in '"\\' or c < " " for c in segment) for segment in path) or not _encodable(key):
            raise InvalidInput("A key is a path of names without quotes, backslashes or control characters.", param)
        if len(path) > _MAX_PATH:
            raise InvalidInput(f"A key is a path of at most {_MAX_PATH} names.", param)
        place = self._json.at(path)
        match op:
            case "exists":
                there = self._json.there(place)
                return there if operand else not_(there)
            case "in" | "nin":
                items = _items(_scalar, operand, param)
                strings = [item for item in items if isinstance(item, str)]
                others = [item for item in items if not isinstance(item, str)]
                self.count(len(others) + len(strings) // _STRINGS_A_LEAF, param)
                found = or_(false(), *(self._json.compare(place, "eq", item) for item in others))
                if strings:
                    found = or_(func.coalesce(found, false()), self._json.among(place, strings))
                return found if op == "in" else not_(func.coalesce(found, false()))
            case "ne":
                return not_(func.coalesce(self.equal(place, operand, param), false()))
            case "eq":
                return self.equal(place, operand, param)
            case "contains" | "icontains":
                return self.contains(path, op, operand, param)
        if isinstance(operand, bool) or not isinstance(operand, str | int | float):
            raise InvalidInput(f"{op} takes a number or a string.", param)
        return self._json.compare(place, op, _scalar(operand, param))

    def equal(self, place: Any, operand: Any, param: str) -> Any:
        return self._json.compare(place, "eq", _scalar(operand, param))

    def contains(self, path: tuple[str, ...], op: str, operand: Any, param: str) -> Any:
        operand = _scalar(operand, param)
        json, place = self._json, self._json.at(path)
        if op == "contains":
            element = json.any_element(path, lambda item: json.compare(item, "eq", operand))
            if not isinstance(operand, str):
                return element
            return or_(func.coalesce(element, false()), and_(json.is_string(place), json.within(place, operand)))
        needle = operand.lower()
        element = json.any_element(
            path, lambda item: and_(json.is_string(item), json.compare(json.lower(item), "eq", needle))
        )
        inside = and_(json.is_string(place), json.within(json.lower(place), needle))
        return or_(func.coalesce(element, false()), inside)

    def time(self, key: str, op: str, operand: Any, param: str) -> Any:
        column = _TIMES[key]
        match op:
            case "exists":
                return true() if operand else false()
            case "in" | "nin":
                self.count(len(operand) // _STRINGS_A_LEAF, param)
                found = column.in_(_items(_time, operand, param))
                return found if op == "in" else not_(found)
            case "ne":
                return column != _time(operand, param)
            case "contains" | "icontains":
                raise InvalidInput(f"{op} is for metadata.", param)
        return _COMPARE[op](column, _time(operand, param))


def _items(read: Callable[[Any, str], Any], operand: list[Any], param: str) -> list[Any]:
    """Each item, read. Its path is made for an error only: a key may be as long as its body."""
    items = []
    for number, item in enumerate(operand):
        try:
            items.append(read(item, param))
        except InvalidInput as error:
            raise InvalidInput(str(error), f"{param}.{number}") from error
    return items


def _scalar(value: Any, param: str) -> Any:
    if isinstance(value, str):
        if "\0" in value or not _encodable(value):
            raise InvalidInput("A string holds no NUL characters and is valid Unicode.", param)
    elif isinstance(value, float):
        if type(value) is not float or value - value != 0.0:  # numpy's says `np.float64(0.5)` where SQL wants 0.5
            raise InvalidInput("A number is a finite one of Python's own.", param)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InvalidInput("An integer fits 64 bits.", param)
    elif value is not None and not isinstance(value, int):
        raise InvalidInput("The operand is a string, a number, a boolean or null.", param)
    return value


def _encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _time(value: Any, param: str) -> int:
    try:
        return micros(datetime.fromisoformat(value), param)
    except (TypeError, ValueError) as error:
        raise InvalidInput("A time is an RFC 3339 string with its zone.", param) from error
