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

from store import InvalidInput, Memory
from store.log import filter_sql, filters
from store.log.database import Log
from store.log.reading import with_contents
from store.log.rows import dump_metadata, micros, thread_key
from store.log.schema import contents, memories, users
from tests.repetitions import repetitions

CREATED = datetime(2026, 1, 1, tzinfo=UTC)
UPDATED = datetime(2026, 2, 1, 12, 30, tzinfo=UTC)
_MISSING = object()


FIELDS = ("id", "user_id", "text", "version", "created_at", "updated_at", "expires_at", "happened_at", "thread")
TIMES = ("created_at", "updated_at", "expires_at", "happened_at")


def matches(filter: dict[str, Any], memory: Memory) -> bool:
    """Whether a filter matches a memory, evaluated in plain Python."""
    return all(_part(key, value, memory) for key, value in filter.items())


def _part(key: str, value: Any, memory: Memory) -> bool:
    if key == "AND":
        return all(matches(inner, memory) for inner in value)
    if key == "OR":
        return any(matches(inner, memory) for inner in value)
    if key == "NOT":
        return not matches(value, memory)
    operators = value if isinstance(value, dict) else {"eq": value}
    found = _value(key, memory)
    return all(_holds(key, found, op, operand) for op, operand in operators.items())


def _value(key: str, memory: Memory) -> Any:
    if key == "happened_at":
        return memory.happened_at or memory.created_at
    if key in FIELDS:
        return getattr(memory, key)
    key = key.removeprefix("metadata.")
    if "\\" not in key and key in memory.metadata:
        return memory.metadata[key]
    found: Any = memory.metadata
    for name in [name.replace("\0", ".") for name in key.replace("\\.", "\0").split(".")]:
        if not isinstance(found, dict) or name not in found:
            return _MISSING
        found = found[name]
    return found


def _holds(key: str, found: Any, op: str, operand: Any) -> bool:
    if key in TIMES and op != "exists":
        operand = [_time(item) for item in operand] if isinstance(operand, list) else _time(operand)
    match op:
        case "eq":
            return _equal(found, operand)
        case "ne":
            return not _equal(found, operand)
        case "in":
            return _is_in(found, operand)
        case "nin":
            return not _is_in(found, operand)
        case "exists":
            is_absent = key in ("expires_at", "thread") and found is None
            return (found is not _MISSING and not is_absent) == operand
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


def _is_in(found: Any, operands: list[Any]) -> bool:
    return any(_equal(one, operand) for one in (found if isinstance(found, list) else [found]) for operand in operands)


def _time(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value)


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


_KEYS = ("a", "b", "c", "a.b", "a.b.c", "a.0", "ä ö", "0", "k8s.io/app")
_ESCAPED = ("a\\.b", "a.b\\.c", "a\\.b.c", "a\\.b\\.c", "metadata\\.a", "a.k8s\\.io/app")
_PREFIXED = ("metadata.a", "metadata.a.b", "metadata.id", "metadata.text", "metadata.metadata", "metadata.metadata.a")
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
    st.sampled_from(["a", "a", "b", "c", "0", "ä ö", "a.b", "a.b.c", "k8s.io/app", "id", "metadata", "metadata.a"]),
    st.recursive(
        _scalars,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.sampled_from(["a", "b", "c", "0", "b.c", "k8s.io/app"]), inner, max_size=2),
        ),
        max_leaves=4,
    ),
    max_size=4,
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
_moments = st.one_of(st.none(), _times.map(datetime.fromisoformat))
_time_operators = st.one_of(
    st.tuples(st.sampled_from(["eq", "ne", "gt", "gte", "lt", "lte"]), _times),
    st.tuples(st.sampled_from(["in", "nin"]), st.lists(_times, max_size=2)),
    st.tuples(st.just("exists"), st.booleans()),
)
_expiry_operators = st.one_of(
    _time_operators,
    st.tuples(st.sampled_from(["eq", "ne"]), st.none()),
    st.tuples(st.sampled_from(["in", "nin"]), st.lists(st.one_of(st.none(), _times), max_size=2)),
)


def _exact(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """An operator of a field that has no order, and its operand."""
    return st.one_of(
        st.tuples(st.sampled_from(["eq", "ne"]), values),
        st.tuples(st.sampled_from(["in", "nin"]), st.lists(values, max_size=3)),
        st.tuples(st.just("exists"), st.booleans()),
    )


def _tests(keys: tuple[str, ...], operators: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda key, ops: {key: dict(ops)}, st.sampled_from(keys), st.lists(operators, min_size=1, max_size=2)
    )


_versions = st.integers(0, 9)
_leaves = st.one_of(
    st.builds(lambda key, value: {key: value}, st.sampled_from(_KEYS), _scalars),
    *(_tests(keys, _operators) for keys in (_KEYS, _ESCAPED, _PREFIXED)),
    _tests(("id",), _exact(st.sampled_from(["0", "1", "2", "ann"]))),
    _tests(("user_id",), _exact(st.sampled_from(["ann", "bob", "0"]))),
    _tests(("text",), st.one_of(_exact(_texts), st.tuples(st.sampled_from(["contains", "icontains"]), _texts))),
    _tests(
        ("version",),
        st.one_of(_exact(_versions), st.tuples(st.sampled_from(["gt", "gte", "lt", "lte"]), _versions)),
    ),
    _tests(("created_at", "updated_at", "happened_at"), _time_operators),
    _tests(("thread",), _exact(st.sampled_from([None, "talk", "Talk", "0"]))),
    _tests(("expires_at",), _expiry_operators),
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


def _memory(
    number: int,
    metadata: dict[str, Any],
    text: str = "",
    expires_at: datetime | None = None,
    placed: tuple[datetime | None, str | None] = (None, None),
) -> Memory:
    happened_at, thread = placed
    return Memory(
        str(number),
        ("ann", "bob")[number % 2],
        text,
        metadata,
        CREATED,
        UPDATED,
        expires_at,
        version=number + 1,
        happened_at=happened_at,
        thread=thread,
    )


def _memories(documents: list[dict[str, Any]]) -> list[Memory]:
    return [_memory(number, document) for number, document in enumerate(documents)]


def _insert(connection: Connection, inserted: list[Memory]) -> None:
    """Insert memories, whose labels are their positions in the list."""
    connection.execute(
        insert(users),
        [
            {"uid": uid, "tenant": "t", "user_id": name}
            | dict.fromkeys(("version", "epoch", "live", "removed_version", "erased_at"), 0)
            for uid, name in ((1, "ann"), (2, "bob"))
        ],
    )
    rows = [
        {
            "label": label,
            "uid": 1 if memory.user_id == "ann" else 2,
            "key": label.to_bytes(8, "big"),
            "version": memory.version,
            "event": "added",
            "created_at": micros(memory.created_at, ""),
            "updated_at": micros(memory.updated_at, ""),
            "expires_at": None if memory.expires_at is None else micros(memory.expires_at, ""),
            "deleted": 0,
            "content_hash": b"",
            "id": memory.id,
            "happened_at": None if memory.happened_at is None else micros(memory.happened_at, ""),
            "thread": None if memory.thread is None else thread_key(memory.thread),
        }
        for label, memory in enumerate(inserted)
    ]
    connection.execute(insert(memories), rows)
    said = [
        {
            "blank": 0,
            "uid": 1 if memory.user_id == "ann" else 2,
            "version": memory.version,
            "model": 1,
            "vector_crc": 0,
            "text": memory.text,
            "metadata": dump_metadata(memory.metadata, "metadata")[0],
            "embedding": b"",
        }
        for memory in inserted
    ]
    connection.execute(insert(contents), said)


def _matching(filter: dict[str, Any], connection: Connection) -> Any:
    statement = select(memories.c.label).select_from(with_contents(1))
    return statement.where(filter_sql.condition(filter, connection.dialect.name))


@pytest.fixture
def log(url: str) -> Any:
    opened = Log.open(url)
    yield opened
    opened.close()


@settings(
    max_examples=repetitions(150, quick=40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    described=st.lists(
        st.tuples(_metadata, _texts, _moments, st.tuples(_moments, st.sampled_from([None, "talk", "Talk"]))),
        min_size=1,
        max_size=8,
    ),
    tried=st.lists(_filters, min_size=1, max_size=4),
)
def test_sql_and_python_agree(log: Log, described: list[Any], tried: list[dict[str, Any]]) -> None:
    inserted = [_memory(number, *each) for number, each in enumerate(described)]
    with log.write() as connection:
        for table in (users, memories, contents):
            connection.execute(delete(table))
        _insert(connection, inserted)
        for filter in tried:
            found = connection.execute(_matching(filter, connection)).scalars()
            assert set(found) == {n for n, memory in enumerate(inserted) if matches(filter, memory)}, filter


def _expect(log: Log, inserted: list[Memory], filter: dict[str, Any], expected: list[int]) -> None:
    """Check that a filter matches the memories at these positions, in SQL and in Python."""
    with log.write() as connection:
        _insert(connection, inserted)
        statement = _matching(filter, connection).order_by(memories.c.label)
        assert list(connection.execute(statement).scalars()) == expected
    assert [n for n, memory in enumerate(inserted) if matches(filter, memory)] == expected


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
    documents: list[dict[str, Any]] = [
        {"color": "red", "tags": ["x", "y"]},
        {"color": "green", "size": 3},
        {"tags": ["x"], "flag": None, "size": True},
        {"source": {"app": "mail"}, "tags": "y"},
    ]
    _expect(log, _memories(documents), filter, expected)


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        ({"NOT": {"id": "keep"}}, [1, 2]),
        ({"id": {"in": ["keep", "b"]}}, [0, 1]),
        ({"id": {"nin": ["keep", "b"]}}, [2]),
        ({"metadata.id": "keep"}, [2]),
        ({"metadata.id": {"exists": True}}, [2]),
        ({"user_id": "ann"}, [0, 1]),
        ({"user_id": {"ne": "ann"}}, [2]),
        ({"text": {"contains": "tea"}}, [0]),
        ({"text": {"icontains": "TEA"}}, [0, 1]),
        ({"text": "Tea time"}, [1]),
        ({"NOT": {"text": {"contains": "tea"}}}, [1, 2]),
        ({"version": 3}, [1]),
        ({"version": {"gt": 2}}, [1, 2]),
        ({"version": {"nin": [3, 4]}}, [0]),
        ({"metadata.version": "3"}, [2]),
        ({"expires_at": None}, [0, 2]),
        ({"expires_at": {"exists": True}}, [1]),
        ({"expires_at": {"lt": "2027-01-01T00:00:00Z"}}, [1]),
        ({"expires_at": {"ne": "2026-06-01T00:00:00Z"}}, [0, 2]),
        ({"expires_at": {"in": [None, "2026-06-01T02:00:00+02:00"]}}, [0, 1, 2]),
        ({"text.lang": "en"}, [0]),
    ],
)
def test_a_field_of_the_memory_is_not_metadata(log: Log, filter: dict[str, Any], expected: list[int]) -> None:
    inserted = [
        Memory("keep", "ann", "I drink tea.", {"text": {"lang": "en"}}, CREATED, UPDATED, None, 2),
        Memory("b", "ann", "Tea time", {}, CREATED, UPDATED, datetime(2026, 6, 1, tzinfo=UTC), 3),
        Memory("c", "bob", "Rain", {"id": "keep", "version": "3"}, CREATED, UPDATED, None, 4),
    ]
    _expect(log, inserted, filter, expected)


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        ({"gen_ai.system": "openai"}, [0, 1]),
        ({"gen_ai.system": {"ne": "openai"}}, [2, 3, 4]),
        ({"gen_ai.system": {"nin": ["openai"]}}, [2, 3, 4]),
        ({"NOT": {"gen_ai.system": "openai"}}, [2, 3, 4]),
        ({"gen_ai.system": {"exists": True}}, [0, 1, 2, 3]),
        ({"gen_ai.system": None}, [3]),
        ({"gen_ai.system": {"in": [None, "other"]}}, [2, 3]),
        ({"gen_ai\\.system": "openai"}, [0]),
        ({"metadata.gen_ai.system": "openai"}, [0, 1]),
        ({"k8s.io/app": {"ne": "web"}}, [1, 2, 3, 4]),
        ({"labels.k8s.io/app": "web"}, []),
        ({"labels.k8s\\.io/app": "web"}, [1]),
        ({"labels.k8s\\.io/app": {"contains": "we"}}, [1]),
    ],
)
def test_a_key_with_dots_is_a_whole_key_before_it_is_a_path(
    log: Log, filter: dict[str, Any], expected: list[int]
) -> None:
    documents: list[dict[str, Any]] = [
        {"gen_ai.system": "openai", "k8s.io/app": "web"},
        {"gen_ai": {"system": "openai"}, "labels": {"k8s.io/app": "web"}},
        {"gen_ai.system": "other", "gen_ai": {"system": "openai"}},
        {"gen_ai.system": None, "gen_ai": {"system": "openai"}},
        {},
    ]
    _expect(log, _memories(documents), filter, expected)


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        ({"metadata.a": 1}, [0]),
        ({"metadata.metadata.a": 1}, [1, 2]),
        ({"metadata\\.a": 1}, [2]),
        ({"metadata.metadata": {"exists": True}}, [1]),
        ({"metadata.AND": True}, [3]),
        ({"metadata.created_at": "yesterday"}, [3]),
    ],
)
def test_the_prefix_metadata_is_the_metadata_of_the_memory(
    log: Log, filter: dict[str, Any], expected: list[int]
) -> None:
    documents: list[dict[str, Any]] = [
        {"a": 1},
        {"metadata": {"a": 1}},
        {"metadata.a": 1},
        {"AND": True, "created_at": "yesterday"},
    ]
    _expect(log, _memories(documents), filter, expected)


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        ({"tags": {"in": ["x", "q"]}}, [0, 3]),
        ({"tags": {"nin": ["x", "q"]}}, [1, 2, 4, 5, 6]),
        ({"NOT": {"tags": {"in": ["x", "q"]}}}, [1, 2, 4, 5, 6]),
        ({"tags": {"in": [2, None]}}, [1, 4]),
        ({"tags": {"in": [2.0]}}, [1]),
        ({"tags": {"in": ["2"]}}, []),
        ({"tags": {"in": []}}, []),
        ({"tags": "x"}, [3]),
        ({"tags": {"ne": "x"}}, [0, 1, 2, 4, 5, 6]),
        ({"tags": {"contains": "x"}}, [0, 3, 5]),
        ({"tags": {"gt": "a"}}, [3, 5]),
    ],
)
def test_in_is_true_for_a_list_with_one_of_the_values(log: Log, filter: dict[str, Any], expected: list[int]) -> None:
    documents: list[dict[str, Any]] = [
        {"tags": ["x", "y"]},
        {"tags": [True, 2]},
        {"tags": []},
        {"tags": "x"},
        {"tags": [None, ["x"], {"x": "x"}]},
        {"tags": "xylophone"},
        {},
    ]
    _expect(log, _memories(documents), filter, expected)


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
        ({"NOT": {"id": {"gt": "a"}}}, "filter.NOT.id.gt"),
        ({"id": {"contains": "a"}}, "filter.id.contains"),
        ({"id": 7}, "filter.id"),
        ({"id": None}, "filter.id"),
        ({"id": {"in": ["a", 7]}}, "filter.id.in.1"),
        ({"id": {"in": "a"}}, "filter.id.in"),
        ({"user_id": {"lte": "a"}}, "filter.user_id.lte"),
        ({"text": {"gte": "a"}}, "filter.text.gte"),
        ({"text": {"contains": 1}}, "filter.text.contains"),
        ({"text": "\0"}, "filter.text"),
        ({"version": "3"}, "filter.version"),
        ({"version": 3.0}, "filter.version"),
        ({"version": True}, "filter.version"),
        ({"version": {"icontains": "3"}}, "filter.version.icontains"),
        ({"version": {"lt": 2**63}}, "filter.version.lt"),
        ({"expires_at": "never"}, "filter.expires_at"),
        ({"expires_at": {"gt": None}}, "filter.expires_at.gt"),
        ({"expires_at": {"exists": None}}, "filter.expires_at.exists"),
        ({"happened_at": None}, "filter.happened_at"),
        ({"happened_at": "yesterday"}, "filter.happened_at"),
        ({"thread": 7}, "filter.thread"),
        ({"thread": {"in": ["a", 7]}}, "filter.thread.in.1"),
        ({"thread": {"gt": "a"}}, "filter.thread.gt"),
        ({"thread": {"contains": "a"}}, "filter.thread.contains"),
        ({"created_at": None}, "filter.created_at"),
        ({"metadata": "a"}, "filter.metadata"),
        ({"metadata": {"source": "mail"}}, "filter.metadata"),
        ({"metadata.": 1}, "filter.metadata."),
        ({"a\\b": 1}, "filter.a\\b"),
        ({"a\\\\.b": 1}, "filter.a\\\\.b"),
    ],
)
def test_an_error_has_the_path_of_the_invalid_value(filter: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        filters.check(filter)
    assert caught.value.param == param


def test_an_error_says_which_operators_a_field_takes() -> None:
    with pytest.raises(InvalidInput) as caught:
        filters.check({"id": {"gt": "a"}})
    assert caught.value.message == "is not an operator for `id`, which takes eq, ne, in, nin, exists"


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
        _insert(connection, _memories([{"k": str(n)} for n in range(50)] + [{"k": 7}, {"k": None}]))
        names = [str(n) for n in range(7, 5000)]
        found = set(connection.execute(_matching({"k": {"in": [*names, None]}}, connection)).scalars())
        assert found == {*range(7, 50), 51}
        found = set(connection.execute(_matching({"k": {"nin": names}}, connection)).scalars())
        assert found == {*range(7), 50, 51}
        longest = [*names, *("x" for _ in range(25_000 - len(names)))]
        found = set(connection.execute(_matching({"k": {"in": longest}}, connection)).scalars())
        assert found == set(range(7, 50))
        found = set(connection.execute(_matching({"id": {"in": longest}}, connection)).scalars())
        assert found == set(range(7, 52))


def test_conditions_are_bounded() -> None:
    filters.check({"a": {"in": list(range(255))}})
    with pytest.raises(InvalidInput, match="at most 256"):
        filters.check({"a": {"in": list(range(256))}})
    with pytest.raises(InvalidInput, match="at most 256"):
        filters.check({"OR": [{"a": n} for n in range(257)]})
    with pytest.raises(InvalidInput, match="at most 256"):
        filters.check({"created_at": {"nin": ["2026-01-01T00:00:00Z"] * 25_600}})


@pytest.mark.parametrize(
    "filter",
    [
        {"k.k": {"in": list(range(255))}},
        {"OR": [{"k.k": {"icontains": str(n)}} for n in range(64)]},
        {"AND": [{"k.k": {"nin": [str(m) for m in range(99)]}} for _ in range(64)]},
    ],
    ids=["list of integers", "substrings", "lists of strings"],
)
def test_a_large_and_deep_filter_can_be_run(log: Log, filter: dict[str, Any]) -> None:
    for _ in range(15):
        filter = {"NOT": filter}
    inserted = _memories([{"k.k": 3}, {"k": {"k": ["3"]}}, {"k": "3"}])
    _expect(log, inserted, filter, [n for n, memory in enumerate(inserted) if matches(filter, memory)])


def test_a_path_may_be_as_deep_as_metadata(log: Log) -> None:
    document: Any = 1
    for _ in range(32):
        document = {"a": document}
    with log.write() as connection:
        _insert(connection, _memories([document, {"a": 1}]))
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
