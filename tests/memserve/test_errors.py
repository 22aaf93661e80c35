"""The errors of the client."""

import inspect
import pickle

import pytest

from memserve import errors

ERRORS = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, errors.MemserveError)]


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_survives_pickling(error: type[errors.MemserveError]) -> None:
    original = error("input.1: must not be empty", 400, "input.1", "empty_input", 1.5)
    copy = pickle.loads(pickle.dumps(original))
    assert (type(copy), str(copy), vars(copy)) == (error, "input.1: must not be empty", vars(original))


@pytest.mark.parametrize("error", ERRORS)
def test_the_tree_in_the_docstring_is_complete(error: type[errors.MemserveError]) -> None:
    assert errors.__doc__ is not None
    assert f" {error.__name__} " in errors.__doc__.replace("\n", " ")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, errors.BadRequest),
        (401, errors.Unauthorized),
        (403, errors.Forbidden),
        (404, errors.NotFound),
        (405, errors.BadRequest),
        (409, errors.Conflict),
        (413, errors.TooLarge),
        (415, errors.BadRequest),
        (429, errors.RateLimited),
        (500, errors.ServerError),
        (502, errors.ServerError),
        (503, errors.Unavailable),
        (504, errors.DeadlineExceeded),
    ],
)
def test_each_status_has_its_error(status: int, error: type[errors.MemserveError]) -> None:
    body = {"error": {"message": "text: no", "type": "x", "param": "text", "code": "y"}}
    found = errors.of_status(status, body, 2.0)
    assert type(found) is error
    assert (str(found), found.status, found.param, found.code, found.retry_after_s) == (
        "text: no",
        status,
        "text",
        "y",
        2.0,
    )


@pytest.mark.parametrize("body", [None, [], {"detail": "x"}, {"error": "x"}, "text"])
def test_an_answer_that_is_not_memserves_has_its_status(body: object) -> None:
    assert str(errors.of_status(502, body)) == "The server answered with status 502."


@pytest.mark.parametrize(
    ("param", "message", "expected"),
    [
        (
            "memories.3.text",
            "memories.3.text: must not be empty",
            ("memories.515.text", "memories.515.text: must not be empty"),
        ),
        ("input.0", "input.0: no", ("input.512", "input.512: no")),
        ("user_id", "user_id: no", ("user_id", "user_id: no")),
        ("filter.a.b", "filter.a.b: no", ("filter.a.b", "filter.a.b: no")),
        (None, "no", (None, "no")),
    ],
)
def test_the_error_of_a_piece_counts_from_the_beginning_of_the_list(
    param: str | None, message: str, expected: tuple[str | None, str]
) -> None:
    found = errors.BadRequest(message, 400, param, "code").in_piece(512)
    assert ((found.param, str(found)), found.code, type(found)) == (expected, "code", errors.BadRequest)
