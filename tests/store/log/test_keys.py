"""Keys: what the log holds of them, who finds them, and what is refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from store import Credential, InvalidInput, Key, NotFound, Store, credential_of
from store.log.schema import keys
from tests.store.conftest import Clock

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
ID = "0123456789abcdef"
SECRET = f"ms_{ID}_{64 * 'a'}"


def find(store: Store, secret: str) -> Key | None:
    credential = credential_of(secret)
    assert credential is not None
    (found,) = store.find_keys([credential])
    return found


def test_a_key_is_found_by_its_secret(store: Store) -> None:
    made = store.create_key("acme", user_id="ann", scopes=("write", "read"), label="Ann’s phone")
    assert made.key == Key(
        made.key.id, "acme", "ann", ("read", "write"), "Ann’s phone", BEGIN + timedelta(milliseconds=1)
    )
    assert re.fullmatch(rf"ms_{made.key.id}_[0-9a-f]{{64}}", made.secret)
    assert find(store, made.secret) == made.key


def test_two_keys_have_nothing_in_common(store: Store) -> None:
    one, other = (store.create_key("acme") for _ in range(2))
    assert one.key.id != other.key.id and one.secret[-64:] != other.secret[-64:]
    assert (one.key.user_id, one.key.scopes, one.key.label) == (None, ("read", "write"), None)


def test_the_log_and_the_values_hold_no_secret(store: Store) -> None:
    made = store.create_key("acme")
    credential = credential_of(made.secret)
    with store.log.read() as connection:
        row = connection.execute(select(keys)).one()
    assert row.digest == hashlib.sha256(made.secret.encode()).digest()
    assert made.secret[-64:] not in repr((row, made, credential))
    assert repr(row.digest) not in repr(credential)


def test_only_the_right_secret_of_an_id_finds_a_key(store: Store) -> None:
    one, other = (store.create_key("acme") for _ in range(2))
    wrong = f"ms_{one.key.id}_{other.secret[-64:]}"
    credentials = [credential_of(secret) for secret in (other.secret, wrong, SECRET, one.secret, one.secret)]
    assert store.find_keys([credential for credential in credentials if credential]) == [
        other.key,
        None,
        None,
        one.key,
        one.key,
    ]
    assert store.find_keys([]) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ms_",
        SECRET[:-1],
        SECRET + "a",
        SECRET + "\n",
        SECRET.upper(),
        SECRET.replace("ms_", "sk_"),
        SECRET.replace("a", "ａ"),
        f"ms_{ID}{64 * 'a'}",
    ],
)
def test_other_texts_are_no_keys(text: str) -> None:
    assert credential_of(text) is None


@given(st.text())
def test_no_text_makes_the_parser_fail(text: str) -> None:
    assert credential_of(text) is None
    assert credential_of(f"ms_{text}") is None


def test_a_credential_has_the_public_id_and_the_digest() -> None:
    assert credential_of(SECRET) == Credential(ID, hashlib.sha256(SECRET.encode()).digest())


def test_a_revoked_key_is_not_found_by_any_store(pair: tuple[Store, Store]) -> None:
    one, other = pair
    made, kept = one.create_key("acme"), one.create_key("acme")
    assert find(other, made.secret) == made.key
    revoked = one.revoke_key("acme", made.key.id)
    assert revoked.revoked_at is not None and revoked.id == made.key.id
    assert [find(store, made.secret) for store in pair] == [None, None]
    assert find(other, kept.secret) == kept.key
    assert other.revoke_key("acme", made.key.id) == revoked  # the time of the first revocation stays


@pytest.mark.parametrize(("tenant", "id"), [("acme", "none"), ("other", "made"), ("acme", "\0")])
def test_a_key_is_revoked_by_its_own_tenant_only(store: Store, tenant: str, id: str) -> None:
    made = store.create_key("acme")
    asked = made.key.id if id == "made" else id
    with pytest.raises(NotFound) as refused:
        store.revoke_key(tenant, asked)
    assert (refused.value.message, refused.value.field) == (f"there is no key {asked!r}", "id")
    assert find(store, made.secret) == made.key


def test_a_key_expires(store: Store, clock: Clock) -> None:
    made = store.create_key("acme", expires_at=BEGIN + timedelta(days=90))
    assert made.key.expires_at == BEGIN + timedelta(days=90)
    clock.now = BEGIN + timedelta(days=90, milliseconds=-2)
    assert find(store, made.secret) == made.key
    assert find(store, made.secret) is None  # the clock has moved by a millisecond
    assert [key.id for key in store.keys("acme").keys] == [made.key.id]


def test_the_last_use_is_kept_to_the_minute(pair: tuple[Store, Store], clock: Clock) -> None:
    one, other = pair
    made, unused = one.create_key("acme"), one.create_key("acme")

    def last_uses(store: Store) -> list[datetime | None]:
        while store.background_step():
            pass
        return [key.used_at for key in one.keys("acme").keys]

    clock.now = BEGIN + timedelta(minutes=7, seconds=59)
    find(other, made.secret)
    assert last_uses(one) == [None, None]  # only the store that found it knows
    assert last_uses(other) == [None, BEGIN + timedelta(minutes=7)]
    clock.now = BEGIN + timedelta(minutes=8, seconds=1)
    found = find(one, made.secret)
    assert found is not None and found.used_at == BEGIN + timedelta(minutes=7)
    assert one._keys._uses != {}
    assert last_uses(one) == [None, BEGIN + timedelta(minutes=8)]
    find(other, made.secret)
    assert other._keys._uses == {}  # the log holds this minute
    assert find(one, f"ms_{unused.key.id}_{64 * '0'}") is None
    assert last_uses(one) == [None, BEGIN + timedelta(minutes=8)]


def test_keys_are_listed_in_pages_the_newest_first(store: Store) -> None:
    made = [store.create_key("acme", label=str(n)).key for n in range(5)]
    store.create_key("other")
    made[3] = store.revoke_key("acme", made[3].id)
    first = store.keys("acme", limit=2)
    second = store.keys("acme", limit=2, cursor=first.next_cursor)
    third = store.keys("acme", limit=2, cursor=second.next_cursor)
    assert [*first.keys, *second.keys, *third.keys] == made[::-1]
    assert third.next_cursor is None
    assert store.keys("acme", limit=5).next_cursor is None
    assert store.keys("nobody").keys == []


def test_a_wrong_page_is_refused(store: Store) -> None:
    for _ in range(2):
        store.create_key("acme")
    with pytest.raises(InvalidInput) as limit:
        store.keys("acme", limit=0)
    assert limit.value.field == "limit"
    following = store.keys("acme", limit=1).next_cursor
    with pytest.raises(InvalidInput) as cursor:
        store.users("acme", cursor=following)
    assert cursor.value.field == "cursor"
    with pytest.raises(InvalidInput) as other:
        store.keys("acme", cursor="x")
    assert other.value.field == "cursor"


@pytest.mark.parametrize(
    ("tenant", "options", "field"),
    [
        ("", {}, "tenant"),
        ("..", {}, "tenant"),
        ("a\nb", {}, "tenant"),
        ("acme", {"user_id": ""}, "user_id"),
        ("acme", {"user_id": "x" * 257}, "user_id"),
        ("acme", {"scopes": ()}, "scopes"),
        ("acme", {"scopes": ("read", "delete")}, "scopes"),
        ("acme", {"scopes": "read"}, "scopes"),
        ("acme", {"scopes": ("admin",), "user_id": "ann"}, "scopes"),
        ("acme", {"label": ""}, "label"),
        ("acme", {"label": "x" * 201}, "label"),
        ("acme", {"label": "a\nb"}, "label"),
        ("acme", {"label": "\ud800"}, "label"),
        ("acme", {"expires_at": BEGIN}, "expires_at"),
        ("acme", {"expires_at": datetime(2099, 1, 1)}, "expires_at"),
    ],
)
def test_a_key_that_cannot_be_made_names_its_field(
    store: Store, tenant: str, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        store.create_key(tenant, **options)
    assert refused.value.field == field
    assert store.keys("acme").keys == []


def test_keys_stay_if_the_model_is_another(open_store: Callable[..., Store]) -> None:
    store = open_store()
    made = store.create_key("acme")
    store.close()
    assert find(open_store(model="another"), made.secret) == made.key
