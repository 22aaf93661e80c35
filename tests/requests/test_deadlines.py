"""The deadline of a request, from its header or from `timeout_s=` of a handle call."""

import time
from typing import Any

import pytest
from starlette.datastructures import Headers

from deployments.errors import InvalidRequest
from deployments.fair_queue import deadline_of_request
from deployments.requests.deadlines import HEADER, deadline_in, until, within


def headers(*values: str) -> Headers:
    return Headers(raw=[(HEADER.encode(), value.encode("latin-1")) for value in values])


def test_the_header_sets_the_deadline_while_the_request_is_answered() -> None:
    before = time.monotonic()
    with until(deadline_in(headers("1500"))):
        deadline = deadline_of_request.get()
    assert deadline is not None
    assert before + 1.5 <= deadline <= time.monotonic() + 1.5
    assert deadline_of_request.get() is None


def test_without_a_header_or_a_timeout_there_is_no_deadline() -> None:
    with until(deadline_in(headers())), within(None):
        assert deadline_of_request.get() is None


@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "abc", "1e3", " 5", "²", "86400001", "9" * 400])
def test_a_header_that_is_no_positive_number_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        deadline_in(headers(value))
    assert (refused.value.field, refused.value.message) == (HEADER, "must be a whole number from 1 to 86400000")


def test_a_header_given_twice_is_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        deadline_in(headers("5", "5"))
    assert (refused.value.field, refused.value.message) == (HEADER, "must not be given twice")


@pytest.mark.parametrize("value", [0, -1.0, True, "5", float("nan"), float("inf")])
def test_a_timeout_that_is_no_positive_number_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused, within(value):
        pass
    assert (refused.value.field, refused.value.message) == ("timeout_s", "must be a positive number")


def test_a_timeout_sets_the_deadline() -> None:
    before = time.monotonic()
    with within(2):
        deadline = deadline_of_request.get()
    assert deadline is not None
    assert before + 2 <= deadline <= time.monotonic() + 2
