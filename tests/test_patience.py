"""Whether fresh items go first, and how old a fresh item may be."""

from deployments.patience import _OLDEST_FIRST_EVERY, Patience


def impatient(gave_up: int = 20, waited_s: float = 1.0, batches: int = 1) -> Patience:
    patience = Patience()
    for _ in range(gave_up):
        patience.gave_up(waited_s)
    for _ in range(batches):
        patience.served(1)
    return patience


def test_the_oldest_is_served_first_until_callers_give_up() -> None:
    patience = Patience()
    for _ in range(100):
        assert patience.fresh_s() is None
        patience.served(10)


def test_single_callers_that_go_away_change_nothing() -> None:
    patience = Patience()
    for _ in range(1000):
        patience.gave_up(0.2)
        patience.served(40)
        assert patience.fresh_s() is None


def test_a_quarter_of_the_time_after_which_callers_give_up_is_fresh() -> None:
    assert impatient(waited_s=1.0).fresh_s() == 0.25
    assert impatient(waited_s=8.0).fresh_s() == 2.0
    assert impatient(waited_s=0.001).fresh_s() == 0.05


def test_the_time_follows_the_callers() -> None:
    patience = impatient(waited_s=1.0)
    for _ in range(1000):
        patience.gave_up(4.0)
    fresh_s = patience.fresh_s()
    assert fresh_s is not None
    assert abs(fresh_s - 1.0) < 1e-3  # the rest of an average over 64 items, after 1,000


def test_it_ends_when_callers_no_longer_give_up() -> None:
    patience = impatient(gave_up=1000)
    patience.served(100)
    assert patience.fresh_s() == 0.25
    patience.served(100)
    assert patience.fresh_s() is None


def test_some_batches_take_the_oldest() -> None:
    patience = Patience()
    found = []
    for _ in range(10 * _OLDEST_FIRST_EVERY):
        for _ in range(9):
            patience.gave_up(1.0)
        assert patience.fresh_s() == 0.25
        found.append(patience.takes_oldest)
        patience.served(1)
    assert found.count(True) == 10
