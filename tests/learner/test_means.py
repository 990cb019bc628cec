"""Means over groups and Student's t, by hand and by the tables."""

import pytest

from learner.means import mean_over_groups, student_quantile


def test_students_quantiles_are_those_of_the_tables():
    assert student_quantile(0.99, 7) == pytest.approx(2.998, abs=2e-3)
    assert student_quantile(0.99, 15) == pytest.approx(2.602, abs=1e-3)
    assert student_quantile(0.95, 7) == pytest.approx(1.895, abs=1e-3)
    assert student_quantile(0.999, 7) == pytest.approx(4.785, rel=0.02)
    assert student_quantile(0.5, 9) == pytest.approx(0.0, abs=1e-12)


def test_a_mean_over_groups_is_worked_by_hand():
    # Means 1 (of 0 and 2), then 3, and six of 2: mean 2, squared deviations 1 + 1, s² = 2 / 7,
    # standard error sqrt(2 / 7 / 8) = 0.18898.
    changes = [("a", 0.0), ("a", 2.0), ("b", 3.0), *((name, 2.0) for name in "cdefgh")]
    found = mean_over_groups(changes)
    assert (found.value, found.count) == (2.0, 8)
    assert found.error == pytest.approx(0.18898, abs=1e-5)
    assert found.upper(0.01) == pytest.approx(2 + 2.998 * 0.18898, abs=1e-3)
    assert found.lower(0.01) == pytest.approx(2 - 2.998 * 0.18898, abs=1e-3)


def test_fewer_than_8_groups_say_nothing_however_many_values_they_have():
    assert mean_over_groups([(f"s{i % 7}", -5.0) for i in range(100)]) is None
