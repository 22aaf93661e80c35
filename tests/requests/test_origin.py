"""The origin of a write, by which it is recognised when it arrives again."""

import re
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from starlette.datastructures import Headers

from deployments.errors import InvalidRequest
from deployments.requests.origin import HEADER, KEY_HEADER, Origin, request_id_is_missing

SENT_AT = datetime(2026, 11, 22, 12, 0, 0, 250_000, UTC)
BY_PROXY = f"{int(SENT_AT.timestamp() * 1_000_000)}-e0b1a45e-476e-454b-a591-d78aaa490faa"


def of(
    *headers: tuple[str, str], realm: str = "t", method: str = "POST", target: str = "/a?", body: bytes = b"{}"
) -> Origin:
    raw = [(name.encode(), value.encode()) for name, value in headers]
    return Origin.of_request(realm, Headers(raw=raw), method, target, body)


def test_a_write_that_the_proxy_resends_has_the_same_origin() -> None:
    first, again = of((HEADER, BY_PROXY)), of((HEADER, BY_PROXY))
    assert first == again
    assert first.issued_at == SENT_AT
    assert re.fullmatch("[0-9a-f]{32}", first.write_id)
    assert of((HEADER, BY_PROXY.replace("faa", "fab"))).write_id != first.write_id


def test_the_last_of_several_headers_counts() -> None:
    assert of((HEADER, "mine"), (HEADER, BY_PROXY)) == of((HEADER, BY_PROXY))


@pytest.mark.parametrize("value", ["", "-", "mine", "-5-x", "99999999999999999999-x", "9999999999999999-x", "١٢-x"])
def test_a_time_that_is_missing_or_in_the_future_becomes_now(value: str) -> None:
    before = datetime.now(UTC)
    assert before <= Origin.of_request("t", Headers({HEADER: value.encode().decode("latin-1")}), "POST", "/").issued_at
    assert Origin.of_request("t", Headers({HEADER: "1-x"}), "POST", "/").issued_at < before - timedelta(days=365)


def test_writes_without_a_header_are_all_different() -> None:
    assert of().write_id != of().write_id
    assert Origin.fresh().write_id != Origin.fresh().write_id


def test_a_key_makes_one_write_whatever_the_proxy_adds() -> None:
    first = of((KEY_HEADER, "k"), (HEADER, BY_PROXY))
    assert first.write_id == of((KEY_HEADER, "k"), (HEADER, "1-other")).write_id == of((KEY_HEADER, "k")).write_id
    assert first.issued_at == SENT_AT


def test_another_request_under_the_same_key_is_another_write() -> None:
    key = (KEY_HEADER, "k")
    others = [of(key, method="PATCH"), of(key, target="/b?"), of(key, body=b"{ }"), of((KEY_HEADER, "l"))]
    assert len({of(key).write_id, *(other.write_id for other in others)}) == 5
    assert Origin.of_key("t", "k", "ab", "c").write_id != Origin.of_key("t", "k", "a", "bc").write_id


@pytest.mark.parametrize("header", [(KEY_HEADER, "k"), (HEADER, BY_PROXY)])
def test_the_same_headers_are_another_write_of_another_realm(header: tuple[str, str]) -> None:
    one, other = of(header, realm="1:a"), of(header, realm="1:b")
    assert one.write_id != other.write_id
    assert one.memory_id(0) != other.memory_id(0)


@pytest.mark.parametrize("key", ["", "x" * 256, "ä", "a\tb"])
def test_a_malformed_key_is_refused(key: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Origin.of_request("t", Headers({KEY_HEADER: key}), "POST", "/")
    assert refused.value.param == "Idempotency-Key"


def test_two_keys_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="twice"):
        of((KEY_HEADER, "k"), (KEY_HEADER, "k"))


def test_a_resent_write_makes_the_same_ids() -> None:
    origin = of((HEADER, BY_PROXY))
    made = [origin.memory_id(number) for number in range(3)]
    assert made == [of((HEADER, BY_PROXY)).memory_id(number) for number in range(3)]
    assert len({*made, Origin.fresh().memory_id(0)}) == 4
    assert all(str(uuid.UUID(id)) == id for id in made)


@pytest.mark.parametrize(
    ("headers", "missing"),
    [
        ({"host": "memserve.example"}, True),
        ({"host": "127.0.0.1:8000"}, True),
        ({"host": "[::1]:8000"}, True),
        ({"host": "memserve.example", HEADER: BY_PROXY}, False),
        ({"host": "10.0.0.7:30000"}, False),  # a direct probe of the gateway
        ({"host": "[::1]:30000"}, False),
        ({}, False),
    ],
)
def test_only_a_request_through_haproxy_needs_its_id(headers: dict[str, str], missing: bool) -> None:
    assert request_id_is_missing(Headers(headers), 30_000) is missing
