from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradguide import Direction, GradGuide, Magnitude
from gradguide.rules.magnitude import clip, shrink

NORMS = st.floats(1e-30, 1e30)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


@given(st.floats(0, 1e30), NORMS)
def test_clipping_brings_the_norm_down_to_the_bound(norm: float, bound: float) -> None:
    factor = float(clip(scalar(norm), scalar(bound)))
    assert 0 < factor <= 1
    assert factor * norm <= bound * (1 + 1e-12)
    assert factor == 1 or math.isclose(factor * norm, bound, rel_tol=1e-9)


@given(
    update=st.floats(1e-30, 1e30), length=st.floats(0.0, 1e6), numbers=st.integers(1, 10**9), most=st.floats(1e-4, 10)
)
def test_a_shrunk_update_is_within_the_bound_and_no_shorter(
    update: float, length: float, numbers: int, most: float
) -> None:
    factor = float(shrink(scalar(update), scalar(length), scalar(numbers), most))
    allowed = most * max(length, 0.01 * math.sqrt(numbers))
    assert 0.0 < factor <= 1.0
    assert factor * update <= allowed * (1 + 1e-12)
    assert factor == 1.0 or factor * update == pytest.approx(allowed)


def test_parameters_that_start_at_zero_can_leave_it() -> None:
    assert float(shrink(scalar(1e-3), scalar(0.0), scalar(100.0), 0.05)) == 1.0
    assert float(shrink(scalar(0.0), scalar(0.0), scalar(100.0), 0.05)) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 0.0}, r"max_norm must be in \(0, inf\], found 0.0"),
        ({"max_norm": -1}, r"max_norm must be in \(0, inf\], found -1"),
        ({"max_update": 0.0}, r"max_update must be in \(0, inf\), found 0.0"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Magnitude(**options)


def test_none_is_not_a_bound_of_the_gradient() -> None:
    with pytest.raises(TypeError, match=r"max_norm must be a number, found None: math\.inf turns clipping off"):
        Magnitude(max_norm=None)  # type: ignore[arg-type]


def test_options_that_an_earlier_version_pickled_are_not_read_as_others() -> None:
    """It had one field more, so that the bound of the update would be False, which is 0."""
    earlier: Any = Magnitude()
    earlier.__setstate__([1.0, False, 0.05])
    with pytest.raises(TypeError, match="max_update must be a number, found False"):
        GradGuide(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), magnitude=earlier, direction=Direction())
