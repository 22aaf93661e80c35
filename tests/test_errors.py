"""Errors survive pickling, get the path of their field, and are mapped to one HTTP status each."""

import pickle

import pytest

import store.errors as store_errors
from deployments import errors

ALL = [
    *(value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.MemserveError)),
    *(
        value
        for value in vars(store_errors).values()
        if isinstance(value, type) and issubclass(value, store_errors.StoreError)
    ),
]


@pytest.mark.parametrize("cls", ALL)
def test_errors_survive_pickling(cls: type[errors.MemserveError]) -> None:
    error = cls("a message", "text", "a_code", 3)
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))
    assert type(again) is cls
    assert (again.message, again.position, again.field, again.code) == ("a message", 3, "text", "a_code")
    assert (again.param, str(again)) == ("3.text", "3.text: a message")
    assert again.args == error.args


def test_extra_arguments_survive_too() -> None:
    overloaded = pickle.loads(pickle.dumps(errors.Overloaded("busy", retry_after_s=3.5)))
    assert overloaded.retry_after_s == 3.5
    assert pickle.loads(pickle.dumps(errors.UpstreamFailed("late", status=504))).status == 504


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (errors.InvalidRequest("m"), 400, "invalid_request_error"),
        (errors.Unauthorized("m"), 401, "authentication_error"),
        (errors.Forbidden("m"), 403, "permission_error"),
        (errors.ModelNotFound("m"), 404, "not_found_error"),
        (errors.TooLarge("m"), 413, "invalid_request_error"),
        (errors.Overloaded("m"), 429, "rate_limit_error"),
        (errors.DeadlineExceeded("m"), 504, "timeout_error"),
        (errors.EmbeddingFailed("m"), 500, "server_error"),
        (errors.Unavailable("m"), 503, "unavailable_error"),
        (errors.ModelUnavailable("m"), 503, "unavailable_error"),
        (errors.ShuttingDown("m"), 503, "unavailable_error"),
        (errors.UpstreamFailed("m", status=504), 504, "upstream_error"),
        (store_errors.InvalidInput("m"), 400, "invalid_request_error"),
        (store_errors.NotFound("m"), 404, "not_found_error"),
        (store_errors.Conflict("m"), 409, "conflict_error"),
        (store_errors.ModelMismatch("m"), 409, "conflict_error"),
        (store_errors.LogUnavailable("m"), 503, "unavailable_error"),
        (store_errors.LogDamaged("m"), 500, "server_error"),
        (ValueError("inner detail"), 500, "server_error"),
    ],
)
def test_the_table_to_http(error: Exception, status: int, kind: str) -> None:
    answer = errors.to_http(error)
    assert (answer.status, answer.type) == (status, kind)
    assert set(answer.body()["error"]) == {"message", "type", "param", "code"}
    assert (answer.retry_after_s is not None) == (status in (429, 503))
    assert "inner detail" not in answer.message


def test_a_long_path_is_shortened_on_the_wire() -> None:
    path = "x" * errors.MAX_CHARACTERS
    answered = errors.to_http(errors.InvalidRequest("unknown field", path + "y")).body()["error"]
    assert answered["param"] == path[:1023] + "…"
    assert answered["message"] == f"{path[:1023]}…: unknown field"
    answered = errors.to_http(errors.InvalidRequest(path + "y", path)).body()["error"]
    assert (answered["message"], answered["param"]) == (f"{path}: {path[:1023]}…", path)


def at(field: str | None = None, position: int | None = None) -> errors.InvalidRequest:
    return errors.InvalidRequest("must not be empty", field, "a_code", position)


@pytest.mark.parametrize(
    ("error", "name", "in_list", "path"),
    [
        (at("text", 3), "memories", True, "memories.3.text"),
        (at(None, 3), "input", True, "input.3"),
        (at(None, 0), "input", False, "input"),
        (at("text", 0), "", False, "text"),
        (at("user_id", 3), "memories", True, "user_id"),
        (at("dimensions"), "input", True, "dimensions"),
        (at(), "input", True, None),
    ],
)
def test_an_error_gets_its_path_at_the_edge(
    error: errors.InvalidRequest, name: str, in_list: bool, path: str | None
) -> None:
    with pytest.raises(errors.InvalidRequest) as raised, errors.located(name, in_list=in_list, beside={"user_id"}):
        raise error
    assert (raised.value.param, raised.value.message, raised.value.code) == (path, "must not be empty", "a_code")
    assert raised.value.position is None


def test_an_error_follows_its_item_through_lists() -> None:
    with (
        pytest.raises(errors.UpstreamFailed) as raised,
        errors.located("memories"),
        errors.renumbered([5, 7, 9], "text"),
        errors.renumbered(range(1, 3)),
    ):
        raise errors.UpstreamFailed("late", None, "timeout", 1, 504)
    assert (raised.value.param, raised.value.code, raised.value.status) == ("memories.9.text", "timeout", 504)
