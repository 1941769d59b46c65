import pytest

from zk0bot.report.interval import build_rate, separated


def test_the_interval_is_wilsons() -> None:
    # Published values: R binom::binom.wilson(8, 10) and (110, 120).
    rate = build_rate(8, 10)
    assert (rate.value, rate.low, rate.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    rate = build_rate(110, 120)
    assert (rate.low, rate.high) == pytest.approx((0.8533, 0.9540), abs=1e-3)


def test_the_ends_of_the_scale_are_exact() -> None:
    nothing, everything = build_rate(0, 40), build_rate(40, 40)
    assert nothing.low == 0.0
    assert everything.high == 1.0
    assert nothing.high == pytest.approx(1 - everything.low)


@pytest.mark.parametrize(("successes", "episodes"), [(0, 0), (-1, 3), (4, 3)])
def test_impossible_counts_are_refused(successes: int, episodes: int) -> None:
    with pytest.raises(ValueError, match="no rate"):
        build_rate(successes, episodes)


def test_separated_has_a_direction_and_needs_a_gap() -> None:
    assert separated(build_rate(110, 120), build_rate(70, 120))
    assert not separated(build_rate(70, 120), build_rate(110, 120))
    assert not separated(build_rate(72, 120), build_rate(65, 120))
