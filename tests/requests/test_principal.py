"""Who makes a request, and the key that it carries."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from deployments.errors import Forbidden, InvalidRequest, Unauthorized
from deployments.requests import arguments
from deployments.requests.principal import ANYONE, Principal, credential_in, key_in
from store import Key, NotFound, credential_of

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


def principal(tenant: str, user_id: str | None) -> Principal:
    return Principal(tenant, user_id, frozenset(["read"]), None)


def test_a_call_has_its_tenant_and_user_from_the_principal() -> None:
    assert principal("acme", None).user("ann") == principal("acme", "ann").user("ann") == ("acme", "ann")
    assert principal("acme", None).whole_tenant == "acme"


def test_a_user_that_may_not_be_reached_is_one_that_never_was() -> None:
    with pytest.raises(NotFound) as refused:
        principal("acme", "ann").user("bob")
    assert (refused.value.message, refused.value.field) == ("there is no user 'bob'", "user_id")


def test_a_principal_of_one_user_may_do_nothing_with_the_whole_tenant() -> None:
    with pytest.raises(Forbidden) as refused:
        _ = principal("acme", "ann").whole_tenant
    assert refused.value.code == "insufficient_scope"


NAMES = st.text(min_size=1, max_size=4)


@given(st.lists(st.tuples(NAMES, st.none() | NAMES), unique=True, max_size=8))
def test_a_realm_is_one_tenant_or_one_user_of_it(reached: list[tuple[str, str | None]]) -> None:
    assert len({principal(*one).realm for one in reached}) == len(reached)


def test_a_realm_is_the_same_whatever_the_key() -> None:
    keys = [Key(id, "acme", "ann", ("read",), None, datetime(2026, 1, 1, tzinfo=UTC)) for id in ("1", "2")]
    assert len({Principal.of_key(key).realm for key in keys}) == 1


def test_a_handle_call_names_its_tenant() -> None:
    assert arguments.principal("default") is ANYONE
    assert arguments.principal("acme") == Principal("acme", None, ANYONE.scopes, None)


@pytest.mark.parametrize("tenant", ["", "..", "a\nb", "x" * 257, None, 1])
def test_a_handle_call_with_a_wrong_tenant_is_refused(tenant: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        arguments.principal(tenant)  # type: ignore[arg-type]
    assert refused.value.field == "tenant"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_key"),
        ({"authorization": "Basic eDp5"}, "invalid_key"),
        ({"authorization": "Bearer sk-1"}, "invalid_key"),
        ({"x-api-key": ""}, "invalid_key"),
        ({"x-api-key": KEY, "authorization": f"Bearer {OTHER}"}, "invalid_key"),
    ],
)
def test_a_request_without_a_usable_key_is_refused(headers: dict[str, str], code: str) -> None:
    with pytest.raises(Unauthorized) as refused:
        credential_in(Headers(headers))
    assert refused.value.code == code
    assert "sk-1" not in str(refused.value) and KEY not in str(refused.value)


def test_the_credential_of_a_request_is_that_of_its_key() -> None:
    assert credential_in(Headers({"x-api-key": KEY})) == credential_of(KEY)


VALUES = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=60)


@given(st.lists(st.tuples(st.sampled_from(["authorization", "x-api-key"]), VALUES), max_size=3))
def test_no_header_makes_the_parser_fail(headers: list[tuple[str, str]]) -> None:
    found = carried(*headers)
    assert (found is None) == (headers == [])
    assert found is None or any(found in value for _, value in headers)


@given(VALUES.map(lambda value: value.strip(" ")), st.sampled_from(["Bearer", "bEaReR", "Token"]), st.integers(1, 3))
def test_whatever_is_sent_behind_the_scheme_is_the_key(key: str, scheme: str, spaces: int) -> None:
    assert carried(("Authorization", scheme + " " * spaces + key)) == key
