"""When a request is sent again."""

import pytest

from memserve import errors
from memserve.retries import CONNECTION_ATTEMPTS, Retries


class Clock:
    """Seconds, which pass when they are slept."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def retries(timeout_s: float | None, chance: float = 0.0) -> tuple[Retries, Clock]:
    clock = Clock()
    return Retries(timeout_s, clock=clock, chance=lambda: chance), clock


BUSY = errors.RateLimited("busy", 429, None, "overloaded", 2.0)
AWAY = errors.NotReached("away")
NOT_READY = errors.Unavailable("not ready", 503)


def test_retry_after_is_honoured_and_never_shortened() -> None:
    assert [retries(60, chance)[0].delay_s(BUSY) for chance in (0.0, 0.5, 1.0)] == [2.0, 2.25, 2.5]


def test_without_retry_after_the_delay_doubles_up_to_a_limit() -> None:
    tries, _ = retries(None)
    assert [tries.delay_s(NOT_READY) for _ in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_the_timeout_bounds_all_attempts_together() -> None:
    tries, clock = retries(5.0)
    assert tries.remaining_s == 5.0
    clock.now += tries.delay_s(BUSY)
    clock.now += tries.delay_s(BUSY)
    assert tries.remaining_s == 1.0
    with pytest.raises(errors.RateLimited) as caught:
        tries.delay_s(BUSY)
    assert caught.value is BUSY


def test_a_server_that_is_away_is_tried_a_few_times() -> None:
    tries, _ = retries(None)
    for _ in range(CONNECTION_ATTEMPTS - 1):
        tries.delay_s(AWAY)
    with pytest.raises(errors.NotReached):
        tries.delay_s(AWAY)


@pytest.mark.parametrize(
    "error",
    [
        errors.BadRequest("no", 400),
        errors.NotFound("no", 404),
        errors.Conflict("no", 409),
        errors.ServerError("no", 500),
        errors.DeadlineExceeded("late", 504),
        errors.TimedOut("late"),
    ],
)
def test_other_errors_are_raised_at_once(error: errors.MemserveError) -> None:
    with pytest.raises(type(error)) as caught:
        retries(60)[0].delay_s(error)
    assert caught.value is error
