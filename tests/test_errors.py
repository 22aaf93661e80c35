"""Every error survives pickling with what it carries, and has one place in the table to HTTP."""

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
    assert (str(again), again.position, again.field, again.code) == ("a message", 3, "text", "a_code")
    assert again.param == "3.text"
    assert again.args == error.args


def test_extra_arguments_survive_too() -> None:
    overloaded = pickle.loads(pickle.dumps(errors.Overloaded("busy", retry_after_s=3.5)))
    assert overloaded.retry_after_s == 3.5
    assert pickle.loads(pickle.dumps(errors.UpstreamFailed("late", status=504))).status == 504


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (errors.InvalidRequest("m"), 400, "invalid_request_error"),
        (errors.NotFound("m"), 404, "not_found_error"),
        (errors.Conflict("m"), 409, "conflict_error"),
        (errors.TooLarge("m"), 413, "invalid_request_error"),
        (errors.Overloaded("m"), 429, "rate_limit_error"),
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


def test_a_long_name_is_cut_on_the_wire() -> None:
    name = "x" * errors.MAX_SAID
    answered = errors.to_http(errors.InvalidRequest(f"Unknown field {name}.", name + "y")).body()["error"]
    assert answered["message"] == f"Unknown field {name[:1009]}…"
    assert answered["param"] == name[:1023] + "…"
    assert errors.to_http(errors.InvalidRequest(name, name)).body()["error"]["param"] == name
