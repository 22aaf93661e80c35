"""Filters as SQL, with the same meaning on SQLite and PostgreSQL. The grammar is in `filters`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

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

from store.log.filters import FieldTest, Group, MetadataTest, Node, Not, Paths, parsed
from store.log.schema import contents, memories, users
from store.records import Filter

Condition = ColumnElement[bool]
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}
_TEXT_ARRAY = ARRAY(Text)
_VALUES = {
    "id": memories.c.id,
    "user_id": select(users.c.user_id).where(users.c.uid == memories.c.uid).correlate(memories).scalar_subquery(),
    "text": contents.c.text,
    "version": memories.c.version,
    "created_at": memories.c.created_at,
    "updated_at": memories.c.updated_at,
    "expires_at": memories.c.expires_at,
    "happened_at": func.coalesce(memories.c.happened_at, memories.c.created_at),
    "thread": memories.c.thread,
}
"""The fields of the memory itself."""


def condition(filter: Filter, dialect: str) -> Condition:
    """The SQL condition on `memories` and their `contents` that `filter` stands for. It is never NULL.

    Args:
        dialect: `sqlite` or `postgresql`.

    Raises:
        InvalidInput: `field` is the path of the invalid part: `filter.AND.0.age.foo`.
    """
    return _to_sql(parsed(filter), _PostgreSQL() if dialect == "postgresql" else _SQLite())


class _SQLite:
    """JSON in SQLite. A place in a document is a pair of SQL expressions: the type and the value."""

    def at(self, paths: Paths) -> Any:
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

    def any_element(self, paths: Paths, test: Callable[[Any], Any]) -> Any:
        items = func.json_each(contents.c.metadata, self._first(paths))
        element = items.table_valued("type", "value", name="element")
        return exists().select_from(element).where(test((element.c.type, element.c.value)))

    def _first(self, paths: Paths) -> Any:
        """The first path that the document has, or the last."""
        *others, last = ["$" + "".join(f'."{name}"' for name in path) for path in paths]
        return case(*((self._has(path), path) for path in others), else_=last) if others else last

    @staticmethod
    def _has(path: str) -> Any:
        return func.json_type(contents.c.metadata, path).is_not(None)


class _PostgreSQL:
    """JSON in PostgreSQL. A place in a document is an expression of type json, which keeps numbers as written."""

    def at(self, paths: Paths) -> Any:
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

    def any_element(self, paths: Paths, test: Callable[[Any], Any]) -> Any:
        element = func.json_array_elements(self.at(paths)).table_valued("value", name="element").render_derived()
        return exists().select_from(element).where(test(cast(element.c.value, JSON)))


_Json = _SQLite | _PostgreSQL


def _to_sql(node: Node, json: _Json) -> Condition:
    match node:
        case Group(operator, parts):
            conditions = [_to_sql(part, json) for part in parts]
            return and_(*conditions) if operator == "AND" else or_(*conditions)
        case Not(part):
            return not_(_to_sql(part, json))
        case FieldTest():
            return _or_false(_field_test(node, json))
        case MetadataTest():
            return _or_false(_metadata_test(node, json))


def _or_false(test: Any) -> Any:
    return func.coalesce(test, false())


def _field_test(test: FieldTest, json: _Json) -> Any:
    value, operand = _VALUES[test.field], test.operand
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


def _metadata_test(test: MetadataTest, json: _Json) -> Any:
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


def _list_or_value(paths: Paths, element: Callable[[Any], Any], value: Callable[[Any], Any], json: _Json) -> Any:
    """Whether `element` holds for an element of the list at a path; if no list is there, whether `value` holds for it.

    CASE evaluates only the branch that it takes, so that a value that is no list costs nothing more.
    """
    place = json.at(paths)
    return case((json.is_list(place), json.any_element(paths, element)), else_=value(place))


def _in(paths: Paths, operands: list[Any], json: _Json) -> Any:
    strings = [operand for operand in operands if isinstance(operand, str)]
    others = [operand for operand in operands if not isinstance(operand, str)]

    def is_one(place: Any, *branches: tuple[Any, Any]) -> Any:
        equal = or_(false(), *(json.compare(place, "eq", operand) for operand in others))
        if strings:  # the first branch, because most lists of operands are of strings, and so are most values
            branches = ((json.is_string(place), json.is_one_of(json.string(place), strings)), *branches)
        return case(*branches, else_=equal) if branches else equal

    place = json.at(paths)
    return is_one(place, (json.is_list(place), json.any_element(paths, is_one)))


def _contains(paths: Paths, operand: Any, json: _Json) -> Any:
    def has_substring(place: Any) -> Any:
        if not isinstance(operand, str):
            return false()
        return and_(json.is_string(place), json.has_substring(json.string(place), operand))

    return _list_or_value(paths, lambda item: json.compare(item, "eq", operand), has_substring, json)


def _icontains(paths: Paths, operand: str, json: _Json) -> Any:
    needle = operand.lower()

    def equals(item: Any) -> Any:
        return and_(json.is_string(item), json.lower(json.string(item)) == needle)

    def has_substring(place: Any) -> Any:
        return and_(json.is_string(place), json.has_substring(json.lower(json.string(place)), needle))

    return _list_or_value(paths, equals, has_substring, json)
