"""The bounds of bodies, queries and arguments of handle calls, and the paths of violations."""

import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import orjson
import pytest
from pydantic import BaseModel, ValidationError

from deployments.errors import InvalidRequest
from deployments.requests import bodies, tei

SEARCH_OPTIONS = (
    "mode top_k filter min_score explain include_vectors rerank "
    "since until recency_half_life_s context max_tokens order"
)


def violation(model: type[BaseModel], values: Any) -> tuple[str | None, str | None]:
    """`param` and `code` of the error of a body."""
    with pytest.raises(InvalidRequest) as refused:
        bodies.parse(model, orjson.dumps(values))
    return refused.value.param, refused.value.code


def nested(depth: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return dict(value)


@pytest.mark.parametrize(
    ("values", "param", "code"),
    [
        ({"text": "a", "colour": 1}, "colour", "unknown_field"),
        ({"text": 5}, "text", None),
        ({"text": " \n\t"}, "text", None),
        ({"text": "a", "id": 5}, "id", None),
        ({"text": "a", "id": "a\x7fb"}, "id", None),
        ({"text": "a", "id": "x" * 257}, "id", None),
        ({"text": "a", "id": "."}, "id", None),
        ({"memories": [{"text": "a"}, {"text": "a", "id": ".."}]}, "memories.1.id", None),
        ({"text": "a", "metadata": {"k": 2**63}}, "metadata", None),
        ({"text": "a", "metadata": {"k\0": 1}}, "metadata", None),
        ({"text": "a", "metadata": nested(33)}, "metadata", None),
        ({"text": "a", "metadata": [1]}, "metadata", None),
        ({"text": "a", "expires_at": "2030-01-01T00:00:00"}, "expires_at", None),
        ({"text": "a", "expires_at": 1893456000}, "expires_at", None),
        ({"text": "a", "happened_at": "2030-01-01"}, "happened_at", None),
        ({"text": "a", "thread": ""}, "thread", None),
        ({"text": "a", "thread": "x" * 257}, "thread", None),
        ({"text": "a", "thread": "a\nb"}, "thread", None),
        ({"text": "a", "thread": 7}, "thread", None),
        ({"text": "a", "expires_at": "0001-01-01T00:00:00+14:00"}, "expires_at", None),
        ({"text": "a", "expires_at": "9999-12-31T23:59:59-14:00"}, "expires_at", None),
        ({"text": "a", "vector": []}, "vector", None),
        ({"text": "a", "vector": [1.0, "x"]}, "vector.1", None),
        ({"text": "a", "upsert": "yes"}, "upsert", None),
        ({"text": "a", "on_duplicate": "replace"}, "on_duplicate", None),
        ({"memories": [{"text": "a"}, {"id": "1"}]}, "memories.1.text", "missing_field"),
        ({"memories": [{"text": "a", "x": 1}]}, "memories.0.x", "unknown_field"),
        ({"memories": [{"text": "a"}] * 2049}, "memories", None),
        ({"memories": [{"text": "a"}], "text": "b"}, None, None),
    ],
)
def test_a_wrong_field_is_named(values: Any, param: str | None, code: str | None) -> None:
    assert violation(bodies.AddBody, values) == (param, code)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'"text"', b'{"text": NaN}', b'{"text": "\xff"}'])
def test_a_body_that_is_not_a_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        bodies.parse(bodies.AddBody, raw)


@pytest.mark.parametrize(
    "time", ["20301231", "1893456000", "1893456000.5", "", "2030-12-31", "20301231T000000Z", "x", 5]
)
def test_a_time_must_be_written_as_in_rfc_3339(time: Any) -> None:
    for model in (bodies.AddBody, bodies.UpdateBody):
        with pytest.raises(InvalidRequest) as refused:
            bodies.check(model, {"text": "a", "expires_at": time})
        assert str(refused.value) == "expires_at: must be an RFC 3339 time"


@pytest.mark.parametrize(
    "time",
    [
        "2030-12-31T01:00:00+01:00",
        "2030-12-31 00:00:00Z",
        "2030-12-31t00:00:00.000z",
        datetime(2030, 12, 31, tzinfo=UTC),
    ],
)
def test_each_form_of_rfc_3339_is_the_same_time(time: Any) -> None:
    read = bodies.check(bodies.AddBody, {"text": "a", "expires_at": time})
    assert read.expires_at == datetime(2030, 12, 31, tzinfo=UTC)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        bodies.check(bodies.AddBody, {"text": "\ud800"})
    assert refused.value.param == "text"
    with pytest.raises(InvalidRequest):
        bodies.check(bodies.AddBody, {"text": "a", "metadata": {"k": ["\udfff"]}})


def test_white_space_and_nul_may_be_embedded_but_not_remembered() -> None:
    for text in (" ", "\n\t", "\0", "a\0b"):
        assert bodies.check_inputs(text) == text
        assert bodies.check_inputs(["a", text]) == ["a", text]
        assert bodies.parse(bodies.SearchBody, orjson.dumps({"query": text})).query == text
        inputs = tei.SentencesBody(source_sentence=text, sentences=[text])
        assert (inputs.source_sentence, inputs.sentences) == (text, [text])
        assert violation(bodies.AddBody, {"text": text}) == ("text", None)
        assert violation(bodies.UpdateBody, {"text": text}) == ("text", None)
    for model, values, param in (
        (bodies.EmbeddingsBody, {"input": ""}, "input"),
        (bodies.EmbeddingsBody, {"input": ["a", ""]}, "input.1"),
        (bodies.EmbeddingsBody, {"input": []}, "input"),
        (bodies.SearchBody, {"query": ""}, "query"),
        (tei.SimilarityBody, {"inputs": {"source_sentence": "a", "sentences": [""]}}, "inputs.sentences.0"),
    ):
        assert violation(model, values)[0] == param


@pytest.mark.parametrize("token", [2**63, -1, True, 1.0, None])
def test_a_token_id_fits_64_bits(token: Any) -> None:
    for given, param in (
        ([5, token], "input.1"),
        ([[5], [token]], "input.1.0"),
        ([5] * 20_000 + [token], "input.20000"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            bodies.check_inputs(given)
        assert str(refused.value) == f"{param}: must be a token id (a non-negative integer)"
        assert refused.value.param == param
    bodies.check_inputs([2**63 - 1])


@pytest.mark.parametrize("metadata", [{5: 1}, {"a": {5: 1}}, {"a": [{"b": {None: 1}}]}])
def test_keys_that_json_cannot_hold_are_refused_in_calls(metadata: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        bodies.check(bodies.AddBody, {"memories": [{"text": "a", "metadata": metadata}]})
    assert (refused.value.param or "").startswith("memories.0.metadata")


def test_numbers_that_json_cannot_hold_are_refused_in_calls() -> None:
    with pytest.raises(InvalidRequest) as refused:
        bodies.check(bodies.AddBody, {"text": "a", "metadata": {"k": math.inf}})
    assert refused.value.param == "metadata"
    with pytest.raises(InvalidRequest) as refused:
        bodies.check(bodies.SearchBody, {"vector": [math.nan]})
    assert refused.value.param == "vector.0"


def test_a_valid_body_is_not_changed() -> None:
    metadata = {**nested(31), "n": -(2**63), "x": 1e300, "none": None, "list": [1, "ü", True]}
    body = bodies.parse(
        bodies.AddBody,
        orjson.dumps({"text": " a ", "metadata": metadata, "expires_at": "2030-01-01T01:00:00+01:00"}),
    )
    (item,) = body.items()
    assert (item.text, item.metadata) == (" a ", metadata)
    assert item.expires_at == datetime(2030, 1, 1, tzinfo=UTC)
    assert item.expires_at.tzinfo is UTC


def test_an_update_distinguishes_null_from_a_missing_field() -> None:
    assert bodies.parse(bodies.UpdateBody, b'{"expires_at": null}').changes() == {"expires_at": None}
    assert bodies.parse(bodies.UpdateBody, b'{"text": "a"}').changes() == {"text": "a"}
    east = datetime(2030, 1, 1, 3, tzinfo=timezone(timedelta(hours=3)))
    given = bodies.check(bodies.UpdateBody, {"expires_at": east, "if_version": 3}).changes()
    assert given == {"expires_at": datetime(2030, 1, 1, tzinfo=UTC), "if_version": 3}


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({}, None),
        ({"if_version": 1}, None),
        ({"text": None}, None),
        ({"metadata": None, "if_version": 1}, None),
        ({"text": "a", "if_version": 0}, "if_version"),
        ({"text": "a", "if_version": "1"}, "if_version"),
        ({"id": "b", "text": "a"}, "id"),
        ({"vector": []}, "vector"),
        ({"metadata": {}, "metadata_merge": {}}, "metadata_merge"),
    ],
)
def test_a_wrong_update_is_named(values: Any, param: str | None) -> None:
    assert violation(bodies.UpdateBody, values)[0] == param


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "1001"}, "limit"),
        ({"limit": "ten"}, "limit"),
        ({"limit": ""}, "limit"),
        ({"order": "text"}, "order"),
        ({"cursor": ""}, "cursor"),
        ({"cursor": "a b"}, "cursor"),
        ({"filter": ""}, "filter"),
        ({"filter": "{"}, "filter"),
        ({"filter": "[]"}, "filter"),
        ({"filter": "null"}, "filter"),
        ({"filter": '{"n": 18446744073709551616}'}, "filter"),
        ({"offset": "3"}, "offset"),
    ],
)
def test_a_wrong_parameter_is_named(values: dict[str, str], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        bodies.parse_query(bodies.ListQuery, values)
    assert refused.value.param == param


def test_a_query_is_read_from_strings() -> None:
    values = {"limit": "7", "filter": '{"n": {"gte": 3}, "s": "3"}', "order": "-updated_at"}
    query = bodies.parse_query(bodies.ListQuery, values)
    assert query.model_dump() == {
        "limit": 7,
        "cursor": None,
        "filter": {"n": {"gte": 3}, "s": "3"},
        "order": "-updated_at",
    }
    assert bodies.parse_query(bodies.GetQuery, {"include_vectors": "true"}).include_vectors


@pytest.mark.parametrize("model", [bodies.AddBody, bodies.AddManyBody])
def test_a_body_full_of_wrong_values_is_refused_at_the_first(model: type[BaseModel]) -> None:
    """Errors of all would take 250 times the bytes of the body: one body of 16 MiB would exhaust a gateway's memory."""
    memory = {"user_id": "ann", "text": "a", "vector": ["x"] * 16_384}
    if model is bodies.AddBody:
        del memory["user_id"]
    for values in ({"memories": [memory] * 8}, {"memories": [1] * 2048}):
        with pytest.raises(ValidationError) as refused:
            model.model_validate_json(orjson.dumps(values))
        assert refused.value.error_count() == 1
    with pytest.raises(ValidationError) as refused:
        bodies.SearchBody.model_validate_json(orjson.dumps({"vector": ["x"] * 16_384}))
    assert refused.value.error_count() == 1


UNKNOWN = {f"unknown{n}": n for n in range(1000)}


@pytest.mark.parametrize(
    ("model", "values", "param"),
    [
        (bodies.AddBody, {"text": "a", **UNKNOWN}, "unknown0"),
        (bodies.AddBody, {"memories": [{"text": "a"}, {"text": "a", **UNKNOWN}] * 9}, "memories.1.unknown0"),
        (bodies.AddManyBody, {"memories": [{"user_id": "ann", **UNKNOWN}] * 9}, "memories.0.unknown0"),
        (bodies.EmbeddingsBody, {"input": "a", **UNKNOWN}, "unknown0"),
        (bodies.SearchBody, {"query": "a", **UNKNOWN}, "unknown0"),
        (bodies.UpdateBody, UNKNOWN, "unknown0"),
        (bodies.DeleteBody, {**UNKNOWN, "filter": {}}, "unknown0"),
    ],
)
def test_a_body_full_of_unknown_fields_is_refused_at_the_first(model: type[BaseModel], values: Any, param: str) -> None:
    """Errors of all took a gateway 6 s and 2 GB for a body of 16 MiB."""
    try:
        model.model_validate_json(orjson.dumps(values))
    except ValidationError as error:
        assert error.error_count() == 1
    except InvalidRequest as error:
        assert error.param == param
    assert violation(model, values) == (param, "unknown_field")


def test_the_document_of_a_body_takes_known_fields_only() -> None:
    schema = bodies.AddBody.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["NewMemoryBody"]["additionalProperties"] is False
    assert schema["properties"]["memories"]["anyOf"][0]["items"] == {"$ref": "#/$defs/NewMemoryBody"}
    kinds = bodies.EmbeddingsBody.model_json_schema()["properties"]["input"]["anyOf"]
    token_ids = {"items": {"type": "integer", "minimum": 0}, "type": "array", "minItems": 1}
    assert kinds[0] == {"type": "string", "minLength": 1} and kinds[2] == token_ids


@pytest.mark.parametrize(
    ("model", "values", "nulls"),
    [
        (
            bodies.EmbeddingsBody,
            {"input": "a"},
            "model encoding_format dimensions user input_type truncate output_dtype",
        ),
        (
            bodies.AddBody,
            {"text": "a"},
            "id metadata created_at expires_at vector happened_at thread memories on_duplicate duplicate_score upsert",
        ),
        (
            bodies.AddBody,
            {"memories": [{"text": "a"}]},
            "text id metadata created_at expires_at vector happened_at thread on_duplicate duplicate_score upsert",
        ),
        (bodies.AddManyBody, {"memories": [{"text": "a", "user_id": "ann"}]}, "on_duplicate duplicate_score upsert"),
        (
            bodies.UserMemoryBody,
            {"text": "a", "user_id": "ann"},
            "id metadata created_at expires_at vector happened_at thread",
        ),
        (
            bodies.SearchBody,
            {"query": "a"},
            f"vector {SEARCH_OPTIONS}",
        ),
        (
            bodies.SearchBody,
            {"vector": [1.0]},
            f"query {SEARCH_OPTIONS}",
        ),
        (tei.EmbedBody, {"inputs": "a"}, "truncate truncation_direction prompt_name normalize dimensions parameters"),
        (tei.SimilarityBody, {"inputs": {"source_sentence": "a", "sentences": ["b"]}}, "parameters"),
        (tei.PromptBody, {}, "truncate truncation_direction prompt_name"),
        (
            bodies.RerankBody,
            {"query": "a", "documents": ["b"]},
            "model top_n return_documents max_tokens_per_doc",
        ),
        (
            tei.RankBody,
            {"query": "a", "texts": ["b"]},
            "truncate truncation_direction raw_scores return_text",
        ),
        (tei.TokenizeBody, {"inputs": "a"}, "add_special_tokens"),
        (tei.DecodeBody, {"ids": [1]}, "skip_special_tokens"),
    ],
)
def test_null_stands_for_the_default_of_every_field_that_has_one(
    model: type[BaseModel], values: dict[str, Any], nulls: str
) -> None:
    names = nulls.split()
    assert {name for name, field in model.model_fields.items() if not field.is_required()} <= {*names, *values}
    plain = bodies.parse(model, orjson.dumps(values))
    given = {**values, **dict.fromkeys(names)}
    for read in (bodies.parse(model, orjson.dumps(given)), bodies.check(model, given)):
        assert read.model_dump() == plain.model_dump()
    properties = model.model_json_schema()["properties"]
    assert [name for name in names if {"type": "null"} not in properties[name]["anyOf"]] == []


def test_null_in_a_memory_of_a_list_stands_for_the_default() -> None:
    nulls = dict.fromkeys(["id", "metadata", "created_at", "expires_at", "vector", "happened_at", "thread"])
    body = bodies.parse(bodies.AddBody, orjson.dumps({"memories": [{"text": "a", **nulls}]}))
    assert body.items()[0].model_dump() == {"text": "a", **nulls, "metadata": {}}


def test_null_in_an_update_changes_nothing_but_the_expiry() -> None:
    raw = b'{"text": null, "metadata": {"k": null}, "expires_at": null, "if_version": null}'
    assert bodies.parse(bodies.UpdateBody, raw).changes() == {"metadata": {"k": None}, "expires_at": None}
    removed = {"happened_at": None, "thread": None}
    assert bodies.parse(bodies.UpdateBody, b'{"happened_at": null, "thread": null}').changes() == removed
