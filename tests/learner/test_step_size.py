"""How long a step gets, on changes that are known: worked by hand, and for any curve."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from learner.step_size import MAX_TRIES, fit_step


class Way:
    """A way of length 1 along which the change is `of(length)`."""

    def __init__(self, of) -> None:
        self.length = 1.0
        self.measured: list[float] = []
        self._of = of

    def change(self) -> float:
        self.measured.append(self._of(self.length))
        return self.measured[-1]

    def scale(self, factor: float) -> None:
        self.length *= factor

    def fit(self, limit: float, most: float) -> tuple[float, float]:
        kl, length = fit_step(self.change, self.scale, limit, most)
        assert length == pytest.approx(self.length)
        assert kl == self.measured[-1] or math.isnan(kl)
        return kl, length


def test_a_short_step_is_lengthened_to_four_fifths_of_the_limit_with_one_more_pass():
    way = Way(lambda x: 0.001 * x * x)
    kl, length = way.fit(0.02, most=100.0)
    assert (kl, length) == (pytest.approx(0.016), pytest.approx(4.0))
    assert len(way.measured) == 2


def test_a_long_step_is_shortened_to_the_limit():
    way = Way(lambda x: 0.08 * x * x)
    assert way.fit(0.02, most=100.0) == (pytest.approx(0.02), pytest.approx(0.5))


def test_a_step_that_is_about_right_is_kept_and_costs_one_pass():
    way = Way(lambda x: 0.011 * x * x)
    assert way.fit(0.02, most=100.0) == (0.011, 1.0)
    assert len(way.measured) == 1


@pytest.mark.parametrize(("most", "expected"), [(1.0, 1.0), (3.0, 3.0)])
def test_a_step_is_lengthened_by_no_more_than_it_may(most, expected):
    assert Way(lambda x: 1e-5 * x * x).fit(0.02, most)[1] == pytest.approx(expected)


def test_a_step_that_changes_nothing_gets_as_long_as_it_may_and_no_longer():
    assert Way(lambda x: 0.0).fit(0.02, most=300.0) == (0.0, pytest.approx(300.0))


def test_no_length_helps_a_step_that_is_not_a_number():
    way = Way(lambda x: math.nan)
    assert math.isnan(way.fit(0.02, most=4.0)[0])
    assert len(way.measured) == MAX_TRIES + 1


@example(start=2**-8, power=4.0, limit=2**-4, most=4.0)
@example(start=1e-4, power=4.0, limit=1e-2, most=300.0)
@given(
    start=st.floats(1e-9, 10.0),
    power=st.floats(1.0, 4.0),
    limit=st.floats(1e-4, 0.1),
    most=st.floats(1.0, 300.0),
)
def test_a_change_that_grows_with_the_length_ends_under_the_limit_and_near_it(
    start, power, limit, most
):
    way = Way(lambda x: start * x**power)
    kl, length = way.fit(limit, most)
    assert kl <= limit
    assert length <= most * 1.000001
    if start < limit and length < 0.999 * most:
        assert kl > limit / 10, "no shorter than it has to be"
    assert len(way.measured) <= 12
