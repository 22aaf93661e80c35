"""Whether fresh items go first, and how old a fresh item may be."""

from deployments.patience import _MAX_CALLERS, _OLDEST_FIRST_EVERY, Patience, PatienceOfCallers


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
    patience = PatienceOfCallers()
    found = []
    for _ in range(10 * _OLDEST_FIRST_EVERY):
        for _ in range(9):
            patience.gave_up("", 1.0)
        assert patience.fresh_s("", None) == 0.25
        found.append(patience.takes_oldest)
        patience.served([""])
    assert found.count(True) == 10


def test_an_item_with_a_deadline_of_its_own_is_judged_by_it() -> None:
    patience = impatient(waited_s=1.0)
    assert patience.fresh_s(own_s=8.0) == 2.0
    assert patience.fresh_s(own_s=0.01) == 0.05
    assert Patience().fresh_s(own_s=8.0) is None


def test_short_deadlines_of_some_callers_say_nothing_about_those_without_one() -> None:
    patience = Patience()
    for _ in range(1000):
        patience.gave_up(None)
    assert patience.is_short
    assert patience.fresh_s() is None
    assert patience.fresh_s(own_s=8.0) == 2.0
    patience.gave_up(1.0)
    assert patience.fresh_s() == 0.25


def test_a_caller_with_a_name_is_judged_by_its_own_calls() -> None:
    patience = PatienceOfCallers()
    for _ in range(20):
        patience.gave_up("key:ann", 0.2)
    assert patience.is_short
    assert [patience.fresh_s(caller, None) for caller in ("key:ann", "key:bob", "request:1")] == [0.05, None, None]
    for number in range(20):
        patience.gave_up(f"request:{number}", 4.0)
    assert [patience.fresh_s(caller, None) for caller in ("key:ann", "key:bob", "request:99")] == [0.05, None, 1.0]
    patience.served(["key:ann"] * 500)
    assert [patience.fresh_s(caller, None) for caller in ("key:ann", "request:99")] == [None, 1.0]


def test_a_bounded_number_of_callers_is_remembered() -> None:
    patience = PatienceOfCallers()
    for number in range(3 * _MAX_CALLERS):
        for _ in range(20):
            patience.gave_up(f"key:{number}", 1.0)
    fresh_s = [patience.fresh_s(f"key:{number}", None) for number in range(3 * _MAX_CALLERS)]
    assert fresh_s == [None] * (2 * _MAX_CALLERS) + [0.25] * _MAX_CALLERS
