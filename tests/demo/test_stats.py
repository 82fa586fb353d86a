from __future__ import annotations

import math

import pytest

from gradguide.demo.stats import paired_difference, t_quantile


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)]
)
def test_t_quantile_matches_the_table(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, rel=1e-5)


def test_paired_difference() -> None:
    mean, half = paired_difference([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])
    assert mean == pytest.approx(2.0)
    assert half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert paired_difference([1.0, 1.0], [1.0, 1.0]) == (0.0, 0.0)


def test_one_pair_has_no_interval() -> None:
    mean, half = paired_difference([3.0], [2.0])
    assert mean == 1.0
    assert math.isnan(half)
