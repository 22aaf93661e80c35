"""The keys that a gateway has looked up: when the log is asked again, and what happens if it does not answer."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from deployments.calls import keys as calls_keys
from deployments.calls.keys import FRESH_S, REFRESH_S, RETRY_S, UNCHECKED_S, WAIT_S, KnownKeys
from deployments.errors import Overloaded, Unavailable
from store import Credential, Key, LogUnavailable

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def key(id: str = "a") -> Key:
    return Key(id, "acme", None, ("read",), None, BEGIN)


def credential(id: str = "a", secret: str = "s") -> Credential:
    return Credential(id, f"{id} {secret}".encode())


OLD = AttributeError("a store of an older version has no such method")


class Log:
    """The log, which has the keys of `found`. Lookups wait for `gate`, and fail with `error`, if there is one.

    Attributes:
        asked: the ids of all lookups so far.
        at: seconds on the clock.
    """

    def __init__(self, *keys: Key) -> None:
        self.found = {key.id: key for key in keys}
        self.asked: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.at = 100.0
        self.known = KnownKeys(self._find, clock=lambda: self.at, now=lambda: BEGIN + timedelta(seconds=self.at - 100))

    async def _find(self, sought: Credential, found_before: bool) -> Key | None:
        assert found_before is (sought.id in self.known._found)
        self.asked.append(sought.id)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        found = self.found.get(sought.id)
        return found if found is not None and sought == credential(sought.id) else None

    async def find(self, id: str = "a", secret: str = "s") -> Key | None:
        return await self.known.find(credential(id, secret))

    async def settle(self) -> None:
        """Let lookups in the background end."""
        for _ in range(5):
            await asyncio.sleep(0)


async def test_a_key_is_looked_up_once_while_it_is_fresh() -> None:
    log = Log(key())
    assert [await log.find() for _ in range(3)] == [key()] * 3
    log.at += REFRESH_S - 0.1
    assert await log.find() == key()
    assert log.asked == ["a"]


async def test_requests_that_come_together_share_a_lookup() -> None:
    log = Log(key())
    assert await asyncio.gather(*(log.find() for _ in range(50))) == [key()] * 50
    assert log.asked == ["a"]


async def test_a_key_in_use_is_looked_up_again_while_its_requests_go_on() -> None:
    log = Log(key())
    await log.find()
    log.at += REFRESH_S
    log.gate.clear()
    assert await log.find() == await log.find() == key()
    assert log.asked == ["a"]  # the lookup has not begun: no request waited for it
    await log.settle()
    assert log.asked == ["a", "a"]
    log.gate.set()
    await log.settle()
    log.at += REFRESH_S - 0.1
    await log.find()
    await log.settle()
    assert log.asked == ["a", "a"]


async def test_a_revoked_key_is_refused_within_five_seconds() -> None:
    log = Log(key())
    await log.find()
    del log.found["a"]
    log.at += FRESH_S - 0.001  # a key that is used seldom: nothing has looked it up again
    assert await log.find() == key()
    await log.settle()
    assert await log.find() is None
    log.found["b"] = key("b")
    await log.find("b")
    del log.found["b"]
    log.at += FRESH_S
    assert await log.find("b") is None


async def test_the_age_of_a_key_counts_from_the_beginning_of_its_lookup() -> None:
    log = Log(key())
    log.gate.clear()
    first = asyncio.create_task(log.find())
    await log.settle()
    log.at += 4.0  # the lookup has read the log, and its answer is on its way
    log.gate.set()
    assert await first == key()
    del log.found["a"]
    log.at += 1.0
    assert await log.find() is None


async def test_a_credential_of_no_key_is_remembered_for_five_seconds() -> None:
    log = Log()
    assert [await log.find() for _ in range(3)] == [None] * 3
    assert log.asked == ["a"]
    log.at += FRESH_S
    log.found["a"] = key()
    assert await log.find() == key()


async def test_a_wrong_secret_of_a_known_key_needs_no_lookup() -> None:
    log = Log(key())
    assert await log.find() == key()
    assert await log.find(secret="wrong") is None
    assert log.asked == ["a"]


async def test_a_wrong_secret_displaces_no_key() -> None:
    log = Log(key())
    log.gate.clear()
    waiting = asyncio.gather(log.find(), log.find(secret="wrong"))
    await log.settle()
    log.gate.set()
    assert await waiting == [key(), None]
    assert await log.find() == key()
    assert log.asked == ["a", "a"]


async def test_any_number_of_unknown_credentials_displaces_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_keys, "MAX_REFUSED", 10)
    log = Log(key())
    await log.find()
    for number in range(30):
        assert await log.find(f"no key {number}") is None
    assert await log.find() == key()
    assert (len(log.asked), len(log.known._refused), len(log.known._found)) == (31, 10, 1)


async def test_the_keys_that_were_not_used_for_longest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_keys, "MAX_KEYS", 2)
    log = Log(key("a"), key("b"), key("c"))
    for id in ("a", "b", "a", "c"):
        await log.find(id)
    assert list(log.known._found) == ["a", "c"]


async def test_a_key_expires_between_lookups() -> None:
    log = Log(replace(key(), expires_at=BEGIN + timedelta(seconds=1)))
    assert await log.find() is not None
    log.at += 0.999
    assert await log.find() is not None
    log.at += 0.001
    assert await log.find() is None
    assert log.asked == ["a"]


@pytest.mark.parametrize("error", [LogUnavailable("away"), Unavailable("away"), Overloaded("busy"), OLD])
async def test_known_keys_work_on_without_the_log_and_others_do_not(error: Exception) -> None:
    log = Log(key(), key("b"))
    await log.find()
    log.error = error
    log.at += FRESH_S
    assert await log.find() == key()
    with pytest.raises(Unavailable) as refused:
        await log.find("b")
    assert (refused.value.code, refused.value.retry_after_s) == ("keys_unavailable", 1.0)
    log.error = None
    assert await log.find("b") == key("b")


async def test_a_key_that_was_revoked_without_the_log_is_refused_when_the_log_is_back() -> None:
    log = Log(key())
    await log.find()
    log.error = LogUnavailable("away")
    log.at += FRESH_S
    assert await log.find() == key()
    log.error = None
    del log.found["a"]
    assert await log.find() == key()  # it is not looked up again at once
    log.at += RETRY_S
    assert await log.find() is None


async def test_a_lookup_that_fails_in_an_unknown_way_is_made_again_after_a_pause(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = Log(key())
    await log.find()
    log.error = OLD
    log.at += FRESH_S
    assert [await log.find() for _ in range(10)] == 10 * [key()]
    assert log.asked == ["a", "a"]
    (record,) = caplog.records
    assert record.getMessage().startswith("A key could not be looked up\nbuiltins.AttributeError\n")
    log.error = None
    del log.found["a"]
    log.at += RETRY_S
    assert await log.find() is None


async def test_lookups_of_other_keys_that_fail_delay_no_revocation() -> None:
    log = Log(key())
    await log.find()
    log.error = Overloaded("busy")
    with pytest.raises(Unavailable):
        await log.find("no key")
    log.error = None
    del log.found["a"]
    log.at += FRESH_S
    assert await log.find() is None


async def test_a_key_is_not_used_unchecked_for_ever() -> None:
    log = Log(key())
    await log.find()
    log.error = LogUnavailable("away")
    log.at += UNCHECKED_S - 0.1
    assert await log.find() == key()
    log.at += 0.1
    with pytest.raises(Unavailable):
        await log.find()


async def test_a_key_that_expires_without_the_log_is_refused() -> None:
    log = Log(replace(key(), expires_at=BEGIN + timedelta(seconds=6)))
    await log.find()
    log.error = LogUnavailable("away")
    log.at += FRESH_S
    assert await log.find() is not None
    log.at += 1.0
    assert await log.find() is None


async def test_no_request_waits_long_for_a_log_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def wait(_: Sequence[asyncio.Task[None]], **limit: float) -> None:
        waits.append(limit["timeout"])
        await log.settle()

    log = Log(key())
    await log.find()
    log.gate.clear()
    log.at += FRESH_S
    monkeypatch.setattr(asyncio, "wait", wait)
    assert await log.find() == key()
    log.at += WAIT_S / 2
    assert await log.find() == key()
    log.at += WAIT_S / 2
    assert await log.find() == key()
    assert waits == [WAIT_S, WAIT_S / 2]
    with pytest.raises(Unavailable):
        await log.find("b")
    assert log.asked == ["a", "a", "b"]
    del log.found["a"]
    log.gate.set()
    await log.settle()
    assert await log.find() is None  # the lookup went on, and has brought the revocation


async def test_a_lookup_goes_on_if_the_request_that_began_it_is_cancelled() -> None:
    log = Log(key())
    log.gate.clear()
    first, second = asyncio.create_task(log.find()), asyncio.create_task(log.find())
    await log.settle()
    first.cancel()
    log.gate.set()
    assert await second == key()
    assert log.asked == ["a"]


async def test_a_forgotten_key_is_looked_up_again() -> None:
    log = Log(key())
    await log.find()
    log.known.forget("a")
    log.known.forget("never known")
    del log.found["a"]
    assert await log.find() is None
