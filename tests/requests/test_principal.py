"""Who makes a request, and the key that it carries."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from deployments.requests.principal import ANYONE, Principal, key_in
from store import Key

KEY = f"ms_0123456789abcdef_{64 * 'a'}"
OTHER = f"ms_0123456789abcdef_{64 * 'b'}"


def carried(*headers: tuple[str, str]) -> str | None:
    return key_in(Headers(raw=[(name.lower().encode(), value.encode("latin-1")) for name, value in headers]))


def test_a_principal_has_what_its_key_has() -> None:
    key = Key("0123456789abcdef", "acme", "ann", ("read", "write"), "phone", datetime(2026, 1, 1, tzinfo=UTC))
    principal = Principal.of_key(key)
    assert principal == Principal("acme", "ann", frozenset(["read", "write"]), "0123456789abcdef")
    assert [principal.may(scope) for scope in ("read", "write", "admin")] == [True, True, False]
    assert [principal.reaches(user) for user in ("ann", "Ann", "ann ", "bob", "")] == [True, False, False, False, False]
    assert not principal.reaches_all


def test_a_key_of_no_user_reaches_all_users() -> None:
    principal = Principal.of_key(Key("0", "acme", None, ("admin",), None, datetime(2026, 1, 1, tzinfo=UTC)))
    assert principal.reaches_all and principal.reaches("ann") and principal.reaches("bob")
    assert [principal.may(scope) for scope in ("read", "write", "admin")] == [False, False, True]


def test_without_keys_everybody_is_the_default_tenant() -> None:
    assert Principal("default", None, frozenset(["read", "write", "admin"]), None) == ANYONE
    assert ANYONE.reaches_all


def test_a_principal_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        ANYONE.tenant = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "header",
    [
        ("Authorization", f"Bearer {KEY}"),
        ("Authorization", f"bearer {KEY}"),
        ("Authorization", f"TOKEN {KEY}"),
        ("Authorization", f"  Bearer   {KEY} "),
        ("X-API-Key", KEY),
        ("x-api-key", f" {KEY} "),
    ],
)
def test_a_key_is_read_from_each_header(header: tuple[str, str]) -> None:
    assert carried(header) == KEY


def test_a_request_without_these_headers_carries_no_key() -> None:
    assert carried() is None
    assert carried(("Cookie", f"key={KEY}"), ("Proxy-Authorization", f"Bearer {KEY}")) is None


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer ", f"Basic {KEY}", KEY, f"Bearer{KEY}", f"Bearer\t{KEY}"])
def test_another_authorization_is_nobodys_key(value: str) -> None:
    assert carried(("Authorization", value)) == ""


def test_one_key_may_be_sent_twice_but_two_are_nobodys() -> None:
    bearer, api_key = ("Authorization", f"Bearer {KEY}"), ("X-API-Key", KEY)
    assert carried(bearer, api_key) == carried(bearer, bearer) == carried(api_key, api_key) == KEY
    assert carried(bearer, ("X-API-Key", OTHER)) == ""
    assert carried(api_key, ("X-API-Key", OTHER)) == ""
    assert carried(bearer, ("Authorization", f"Bearer {OTHER}")) == ""
    assert carried(api_key, ("Authorization", "Basic eDp5")) == ""


VALUES = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=60)


@given(st.lists(st.tuples(st.sampled_from(["authorization", "x-api-key"]), VALUES), max_size=3))
def test_no_header_makes_the_parser_fail(headers: list[tuple[str, str]]) -> None:
    found = carried(*headers)
    assert (found is None) == (headers == [])
    assert found is None or any(found in value for _, value in headers)


@given(VALUES.map(lambda value: value.strip(" ")), st.sampled_from(["Bearer", "bEaReR", "Token"]), st.integers(1, 3))
def test_whatever_is_sent_behind_the_scheme_is_the_key(key: str, scheme: str, spaces: int) -> None:
    assert carried(("Authorization", scheme + " " * spaces + key)) == key
