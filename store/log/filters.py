r"""The filter grammar: a filter is checked and read into a tree, which `filter_sql` translates.

    filter    {"key": value}                    same as {"key": {"eq": value}}; several keys must all hold
              {"key": {"gte": 3, "lt": 9}}      several operators must all hold
              {"AND": [filter, ...]}  {"OR": [filter, ...]}  {"NOT": filter}
    key       a field of the memory itself: id, user_id, text, version, created_at, updated_at, expires_at,
              happened_at, thread; any other key is a key of the metadata, or a path into it (`source.app`)
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
if the memory never expires, and `thread` if it is in none; for `exists` they are then missing. `happened_at` is
`created_at` if the memory does not have it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

from store.errors import InvalidInput
from store.log.rows import micros, thread_key
from store.records import Filter

Paths = tuple[tuple[str, ...], ...]
OPERATORS = ("eq", "ne", "gt", "gte", "lt", "lte", "in", "nin", "contains", "icontains", "exists")
_EXACT = ("eq", "ne", "in", "nin", "exists")
_ORDER = ("gt", "gte", "lt", "lte")
_UNESCAPED_DOT = re.compile(r"(?<!\\)\.")
_NOT_IN_A_NAME = re.compile(r'["\\\x00-\x1f]')
_MAX_DEPTH = 16
_MAX_CONDITIONS = 256
_MAX_PATH = 32  # names in a key; metadata is not nested deeper
_STRINGS_PER_CONDITION = 100  # a list of strings or times counts as one condition per 100 of them


@dataclass(frozen=True, slots=True)
class Group:
    """Several filters of which all, or any, must hold."""

    operator: Literal["AND", "OR"]
    parts: list[Node]


@dataclass(frozen=True, slots=True)
class Not:
    """A filter that must not hold."""

    part: Node


@dataclass(frozen=True, slots=True)
class FieldTest:
    """A test of a field of the memory itself."""

    field: str
    operator: str
    operand: Any


@dataclass(frozen=True, slots=True)
class MetadataTest:
    """A test of the value at a path in the metadata: at the first of `paths` that the memory has."""

    paths: Paths
    operator: str
    operand: Any


Node = Group | Not | FieldTest | MetadataTest


def parsed(filter: Filter) -> Node:
    """The tree of a filter.

    Raises:
        InvalidInput: `field` is the path of the invalid part: `filter.AND.0.age.foo`.
    """
    return _Parser().parse(filter, "filter", 0)


def check(filter: Filter) -> None:
    """Raise InvalidInput unless the filter can be used."""
    parsed(filter)


class _Parser:
    """Checks one filter and counts its conditions. Every method raises InvalidInput about the path that it is given."""

    def __init__(self) -> None:
        self._conditions = 0

    def parse(self, filter: Any, path: str, depth: int) -> Node:
        if depth > _MAX_DEPTH:
            raise InvalidInput(f"must be at most {_MAX_DEPTH} deep", path)
        if not isinstance(filter, dict) or not filter:
            raise InvalidInput("must be a JSON object that is not empty", path)
        parts: list[Node] = []
        for key, value in filter.items():
            if not isinstance(key, str):
                raise InvalidInput("must have keys that are strings", path)
            here = f"{path}.{key}"
            if key in ("AND", "OR"):
                if not isinstance(value, list) or not value:
                    raise InvalidInput("must be a list of filters that is not empty", here)
                inner = [self.parse(item, f"{here}.{n}", depth + 1) for n, item in enumerate(value)]
                parts.append(Group("AND" if key == "AND" else "OR", inner))
            elif key == "NOT":
                parts.append(Not(self.parse(value, here, depth + 1)))
            elif key == "metadata":
                raise InvalidInput("is all of the metadata: name a key in it, as in `metadata.topic`", here)
            elif not isinstance(value, dict):
                parts.append(self._test(key, "eq", value, here))
            elif not value:
                raise InvalidInput("must have an operator", here)
            else:
                parts += [self._test(key, op, operand, f"{here}.{op}") for op, operand in value.items()]
        return Group("AND", parts)

    def _test(self, key: str, op: str, operand: Any, path: str) -> Node:
        self._count(1, path)
        if op not in OPERATORS:
            raise InvalidInput(f"must be one of the operators {', '.join(OPERATORS)}", path, "unknown_operator")
        if key in _FIELDS:
            field = _FIELDS[key]
            if op not in field.operators:
                message = f"is not an operator for `{key}`, which takes {', '.join(field.operators)}"
                raise InvalidInput(message, path)
            read = _or_null(field.read) if field.nullable and op in _EXACT else field.read
            return FieldTest(key, op, self._operand(op, operand, read, path))
        read = _METADATA_READERS.get(op, _read_scalar)
        return MetadataTest(_read_key(key, path), op, self._operand(op, operand, read, path))

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


def _read_key(key: str, path: str) -> Paths:
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


def _read_thread(value: Any, path: str) -> int:
    """The thread with this name, as the log refers to it."""
    return thread_key(_read_string(value, path))


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


class _Field(NamedTuple):
    """What may be asked of a field of the memory itself."""

    operators: tuple[str, ...]
    read: Callable[[Any, str], Any]
    nullable: bool = False


_FIELDS = {
    "id": _Field(_EXACT, _read_string),
    "user_id": _Field(_EXACT, _read_string),
    "text": _Field((*_EXACT, "contains", "icontains"), _read_string),
    "version": _Field((*_EXACT, *_ORDER), _read_integer),
    "created_at": _Field((*_EXACT, *_ORDER), _read_time),
    "updated_at": _Field((*_EXACT, *_ORDER), _read_time),
    "expires_at": _Field((*_EXACT, *_ORDER), _read_time, nullable=True),
    "happened_at": _Field((*_EXACT, *_ORDER), _read_time),
    "thread": _Field(_EXACT, _read_thread, nullable=True),
}
_METADATA_READERS = {"icontains": _read_string, **dict.fromkeys(_ORDER, _read_number_or_string)}
