"""Filters mean the same on SQLite, on PostgreSQL and in the evaluator in plain Python below."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, delete, insert, select

from store import InvalidInput
from store.log import filters
from store.log.database import Log
from store.log.reading import with_contents
from store.log.rows import dump_metadata, micros
from store.log.schema import contents, memories

CREATED = datetime(2026, 1, 1, tzinfo=UTC)
UPDATED = datetime(2026, 2, 1, 12, 30, tzinfo=UTC)
_MISSING = object()


def matches(filter: dict[str, Any], metadata: dict[str, Any]) -> bool:
    """Whether a filter matches, evaluated in plain Python."""
    return all(_part(key, value, metadata) for key, value in filter.items())


def _part(key: str, value: Any, metadata: dict[str, Any]) -> bool:
    if key == "AND":
        return all(matches(inner, metadata) for inner in value)
    if key == "OR":
        return any(matches(inner, metadata) for inner in value)
    if key == "NOT":
        return not matches(value, metadata)
    operators = value if isinstance(value, dict) else {"eq": value}
    found = _time_or_path(key, metadata)
    return all(_holds(found, op, operand, key in ("created_at", "updated_at")) for op, operand in operators.items())


def _time_or_path(key: str, metadata: dict[str, Any]) -> Any:
    if key == "created_at":
        return CREATED
    if key == "updated_at":
        return UPDATED
    found: Any = metadata
    for segment in key.split("."):
        if not isinstance(found, dict) or segment not in found:
            return _MISSING
        found = found[segment]
    return found


def _holds(found: Any, op: str, operand: Any, is_time: bool) -> bool:
    if is_time and op != "exists":
        parse = datetime.fromisoformat
        operand = [parse(item) for item in operand] if isinstance(operand, list) else parse(operand)
    match op:
        case "eq":
            return _equal(found, operand)
        case "ne":
            return not _equal(found, operand)
        case "in":
            return any(_equal(found, item) for item in operand)
        case "nin":
            return not any(_equal(found, item) for item in operand)
        case "exists":
            return (found is not _MISSING) == operand
        case "contains":
            if isinstance(found, list):
                return any(_equal(item, operand) for item in found)
            return isinstance(found, str) and isinstance(operand, str) and operand in found
        case "icontains":
            if isinstance(found, list):
                return any(isinstance(item, str) and item.lower() == operand.lower() for item in found)
            return isinstance(found, str) and operand.lower() in found.lower()
    pair = _comparable(found, operand)
    if pair is None:
        return False
    left, right = pair
    return {"gt": left > right, "gte": left >= right, "lt": left < right, "lte": left <= right}[op]


def _comparable(found: Any, operand: Any) -> tuple[Any, Any] | None:
    if isinstance(found, datetime) or (isinstance(found, str) and isinstance(operand, str)):
        return found, operand
    if any(isinstance(side, bool) or not isinstance(side, int | float) for side in (found, operand)):
        return None
    return (found, operand) if isinstance(found, int) and isinstance(operand, int) else (float(found), float(operand))


def _equal(found: Any, operand: Any) -> bool:
    if isinstance(found, bool) or isinstance(operand, bool) or found is None or operand is None:
        return found is operand
    pair = _comparable(found, operand)
    return pair is not None and pair[0] == pair[1]


_KEYS = ("a", "b", "c", "a.b", "a.b.c", "a.0", "ä ö", "0")
_texts = st.one_of(
    st.sampled_from(["", "a", "A", "ab", "Äb", "äB", "ΑΣ", "ας", "İ", "x'y", "1", "true", "%", "_", "日本", "\n", '"']),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"], max_codepoint=0x24F), max_size=4),
)
_numbers = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**53, 2**53 + 1, -(2**63), 2**63 - 1, 0.1, 1.0, -0.0, 1e16, 1e22, 2.0**53, 5e-324, 1e300, 1.5]),
    st.floats(allow_nan=False, allow_infinity=False),
)
_scalars = st.one_of(st.none(), st.booleans(), _numbers, _texts)
_metadata = st.dictionaries(
    st.sampled_from(["a", "b", "c", "0", "ä ö"]),
    st.recursive(
        _scalars,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["a", "b", "c", "0"]), inner, max_size=2)
        ),
        max_leaves=4,
    ),
    max_size=3,
)
_ordered = st.one_of(_numbers, _texts)
_operators = st.one_of(
    st.tuples(st.sampled_from(["eq", "ne", "contains"]), _scalars),
    st.tuples(st.sampled_from(["gt", "gte", "lt", "lte"]), _ordered),
    st.tuples(st.sampled_from(["in", "nin"]), st.lists(_scalars, max_size=3)),
    st.tuples(st.just("icontains"), _texts),
    st.tuples(st.just("exists"), st.booleans()),
)
_times = st.sampled_from(["2026-01-01T00:00:00Z", "2026-02-01T13:30:00+01:00", "2025-12-31T23:59:59.999999Z"])
_time_operators = st.one_of(
    st.tuples(st.sampled_from(["eq", "ne", "gt", "gte", "lt", "lte"]), _times),
    st.tuples(st.sampled_from(["in", "nin"]), st.lists(_times, max_size=2)),
    st.tuples(st.just("exists"), st.booleans()),
)
_leaves = st.one_of(
    st.builds(lambda key, value: {key: value}, st.sampled_from(_KEYS), _scalars),
    st.builds(lambda key, ops: {key: dict(ops)}, st.sampled_from(_KEYS), st.lists(_operators, min_size=1, max_size=2)),
    st.builds(
        lambda key, ops: {key: dict(ops)},
        st.sampled_from(["created_at", "updated_at"]),
        st.lists(_time_operators, min_size=1, max_size=2),
    ),
)
_filters = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.builds(lambda parts: {"AND": parts}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda parts: {"OR": parts}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda part: {"NOT": part}, inner),
        st.builds(lambda one, other: {**one, **other}, inner, inner),
    ),
    max_leaves=4,
)


def _insert(connection: Connection, documents: list[dict[str, Any]]) -> None:
    rows = [
        {
            "label": number,
            "uid": 1,
            "key": number.to_bytes(8, "big"),
            "version": number,
            "event": "added",
            "created_at": micros(CREATED, ""),
            "updated_at": micros(UPDATED, ""),
            "deleted": 0,
            "content_hash": b"",
            "id": str(number),
        }
        for number in range(len(documents))
    ]
    connection.execute(insert(memories), rows)
    said = [
        {
            "blank": 0,
            "uid": 1,
            "version": number,
            "model": 1,
            "vector_crc": 0,
            "text": "",
            "metadata": dump_metadata(document, "metadata")[0],
            "embedding": b"",
        }
        for number, document in enumerate(documents)
    ]
    connection.execute(insert(contents), said)


def _matching(filter: dict[str, Any], connection: Connection) -> Any:
    statement = select(memories.c.label).select_from(with_contents(1))
    return statement.where(filters.condition(filter, connection.dialect.name))


@pytest.fixture
def log(url: str) -> Any:
    opened = Log.open(url)
    yield opened
    opened.close()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(documents=st.lists(_metadata, min_size=1, max_size=8), tried=st.lists(_filters, min_size=1, max_size=4))
def test_sql_and_python_agree(log: Log, documents: list[dict[str, Any]], tried: list[dict[str, Any]]) -> None:
    with log.write() as connection:
        connection.execute(delete(memories))
        connection.execute(delete(contents))
        _insert(connection, documents)
        for filter in tried:
            found = connection.execute(_matching(filter, connection)).scalars()
            assert set(found) == {n for n, document in enumerate(documents) if matches(filter, document)}, filter


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        ({"color": "red"}, [0]),
        ({"color": {"ne": "red"}}, [1, 2, 3]),
        ({"size": {"gte": 3, "lt": 9}}, [1]),
        ({"tags": {"contains": "x"}}, [0, 2]),
        ({"color": {"icontains": "RE"}}, [0, 1]),
        ({"source.app": "mail"}, [3]),
        ({"source": {"exists": True}}, [3]),
        ({"NOT": {"OR": [{"color": "red"}, {"size": {"in": [3, 4]}}]}}, [2, 3]),
        ({"flag": None}, [2]),
        ({"flag": {"exists": False}}, [0, 1, 3]),
        ({"size": {"gt": "a"}}, []),
        ({"created_at": {"lt": "2026-01-02T00:00:00Z"}, "size": 3.0}, [1]),
    ],
)
def test_examples_of_the_grammar(log: Log, filter: dict[str, Any], expected: list[int]) -> None:
    documents = [
        {"color": "red", "tags": ["x", "y"]},
        {"color": "green", "size": 3},
        {"tags": ["x"], "flag": None, "size": True},
        {"source": {"app": "mail"}, "tags": "y"},
    ]
    with log.write() as connection:
        _insert(connection, documents)
        statement = _matching(filter, connection)
        assert list(connection.execute(statement.order_by(memories.c.label)).scalars()) == expected
    assert [n for n, document in enumerate(documents) if matches(filter, document)] == expected


@pytest.mark.parametrize(
    ("filter", "param"),
    [
        ({"AND": [{"age": {"foo": 1}}]}, "filter.AND.0.age.foo"),
        ({"OR": [{"a": 1}, {"NOT": {"b": {"like": "x"}}}]}, "filter.OR.1.NOT.b.like"),
        ({"AND": []}, "filter.AND"),
        ({"OR": {"a": 1}}, "filter.OR"),
        ({"NOT": [{"a": 1}]}, "filter.NOT"),
        ({}, "filter"),
        ({"a": {}}, "filter.a"),
        ({"a": [1]}, "filter.a"),
        ({"a": {"in": 1}}, "filter.a.in"),
        ({"a": {"in": [1, {}]}}, "filter.a.in.1"),
        ({"a": {"gt": None}}, "filter.a.gt"),
        ({"a": {"gt": True}}, "filter.a.gt"),
        ({"a": {"exists": 1}}, "filter.a.exists"),
        ({"a": {"icontains": 1}}, "filter.a.icontains"),
        ({"a": float("nan")}, "filter.a"),
        ({"a": np.float64(0.5)}, "filter.a"),
        ({"a": {"gt": np.float64(0.5)}}, "filter.a.gt"),
        ({"a": 2**63}, "filter.a"),
        ({"a": "\0"}, "filter.a"),
        ({"a": "\ud800"}, "filter.a"),
        ({'a"b': 1}, 'filter.a"b'),
        ({"a..b": 1}, "filter.a..b"),
        ({"\ud800": 1}, "filter.\ud800"),
        ({1: 2}, "filter"),
        ({"AND": [{None: 2}]}, "filter.AND.0"),
        ({".".join("a" * 33): 1}, "filter." + ".".join("a" * 33)),
        ({"created_at": "yesterday"}, "filter.created_at"),
        ({"created_at": {"gt": "2026-01-01T00:00:00"}}, "filter.created_at.gt"),
        ({"updated_at": {"contains": "2026"}}, "filter.updated_at.contains"),
    ],
)
def test_an_error_has_the_path_of_the_invalid_value(filter: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        filters.check(filter)
    assert caught.value.param == param


@pytest.mark.parametrize("make", [lambda n: {"NOT": n}, lambda n: {"AND": [n]}])
def test_depth_is_bounded(make: Callable[[Any], dict[str, Any]]) -> None:
    filter: dict[str, Any] = {"a": 1}
    for _ in range(16):
        filter = make(filter)
    filters.check(filter)
    with pytest.raises(InvalidInput, match="at most 16 deep"):
        filters.check(make(filter))


def test_long_lists_of_strings(log: Log) -> None:
    with log.write() as connection:
        _insert(connection, [{"k": str(n)} for n in range(50)] + [{"k": 7}, {"k": None}])
        names = [str(n) for n in range(7, 5000)]
        found = set(connection.execute(_matching({"k": {"in": [*names, None]}}, connection)).scalars())
        assert found == {*range(7, 50), 51}
        found = set(connection.execute(_matching({"k": {"nin": names}}, connection)).scalars())
        assert found == {*range(7), 50, 51}


def test_conditions_are_bounded() -> None:
    filters.check({"a": {"in": list(range(255))}})
    with pytest.raises(InvalidInput, match="at most 256"):
        filters.check({"a": {"in": list(range(256))}})
    with pytest.raises(InvalidInput, match="at most 256"):
        filters.check({"OR": [{"a": n} for n in range(257)]})
    with pytest.raises(InvalidInput, match="at most 256"):
        filters.check({"created_at": {"nin": ["2026-01-01T00:00:00Z"] * 25_600}})


def test_a_path_may_be_as_deep_as_metadata(log: Log) -> None:
    document: Any = 1
    for _ in range(32):
        document = {"a": document}
    with log.write() as connection:
        _insert(connection, [document, {"a": 1}])
        found = connection.execute(_matching({".".join("a" * 32): 1}, connection)).scalars()
        assert list(found) == [0]


@pytest.mark.parametrize(
    ("read", "path"),
    [
        (lambda key, items: dump_metadata({key: items}, "metadata"), "metadata.{}.3"),
        (lambda key, items: filters.check({key: {"in": items}}), "filter.{}.in.3"),
    ],
)
def test_a_long_key_does_not_make_its_items_slow(read: Callable[[str, list[str]], Any], path: str) -> None:
    """Making the path of every item took 17 s here. A body can contain a hundred times as many items."""
    key = "k" * (1 << 23)
    began = time.process_time()
    read(key, ["x"] * 25_000)
    assert time.process_time() - began < 5
    with pytest.raises(InvalidInput) as caught:
        read(key, ["x", "x", "x", "\0"])
    assert caught.value.param == path.format(key)
