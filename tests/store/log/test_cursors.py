"""Sealed cursors: each opens for its own list alone, and tells nothing."""

from __future__ import annotations

import base64
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.errors import InvalidInput
from store.log.cursors import Cursors
from store.log.listing import encode_cursor

CURSORS = Cursors("a log")
OF = ("list", "acme", "ann")


def sealed(cursor: str, *of: str, log: str = "a log") -> str:
    found = Cursors(log).seal(cursor, *of)
    assert found is not None
    return found


@given(st.lists(st.text() | st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3), st.lists(st.text(), max_size=4))
def test_a_cursor_opens_for_the_list_that_it_was_made_for(key: list[object], of: list[str]) -> None:
    cursor = encode_cursor("kind", key)
    assert CURSORS.open(CURSORS.seal(cursor, *of), *of) == cursor
    assert Cursors("a log").seal(cursor, *of) == CURSORS.seal(cursor, *of)  # every store of the log


def test_no_page_has_no_cursor() -> None:
    assert (CURSORS.seal(None, *OF), CURSORS.open(None, *OF)) == (None, None)


@pytest.mark.parametrize(
    "other", [("list", "acme", "bob"), ("list", "other", "ann"), ("keys", "acme", "ann"), ("list", "acmeann"), ()]
)
def test_a_cursor_opens_for_no_other_list(other: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput, match="cursor: was made for another list"):
        CURSORS.open(sealed("abc", *OF), *other)


def test_a_cursor_opens_for_no_other_log() -> None:
    with pytest.raises(InvalidInput, match="after: was made for another list"):
        CURSORS.open(sealed("abc", *OF, log="another log"), *OF, field="after")


@given(st.text(max_size=200))
def test_no_text_makes_the_reader_fail(given_: str) -> None:
    with pytest.raises(InvalidInput):
        CURSORS.open(given_, *OF)


def test_a_changed_cursor_is_refused() -> None:
    whole = base64.urlsafe_b64decode(sealed("abc", *OF) + "==")
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        with pytest.raises(InvalidInput):
            CURSORS.open(base64.urlsafe_b64encode(changed).decode().rstrip("="), *OF)


def test_the_number_of_a_row_shows_neither_in_the_text_nor_in_its_length() -> None:
    found = [sealed(encode_cursor("keys", [number]), "keys", "acme") for number in (7, 123_456_789)]
    assert len({len(one) for one in found}) == 1
    assert all(b"123456789" not in base64.urlsafe_b64decode(one + "==") for one in found)


def test_a_cursor_is_sealed_and_opened_in_microseconds() -> None:
    cursor = encode_cursor("-created_at", [1_795_373_580_195_616, 123_456])
    took_s = []
    for _ in range(20):
        began = time.thread_time()
        for _ in range(200):
            CURSORS.open(CURSORS.seal(cursor, *OF), *OF)
        took_s.append((time.thread_time() - began) / 200)
    assert min(took_s) < 20e-6  # about 9 us
