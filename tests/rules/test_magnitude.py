from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradguide import Magnitude
from gradguide.rules.magnitude import LogNorms, clip, observe, shrink, threshold

NORMS = st.floats(1e-30, 1e30)


def fresh() -> LogNorms:
    return LogNorms(*(torch.zeros(1, dtype=torch.float64) for _ in range(3)))


def scalar(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


@given(st.floats(0, 1e30), NORMS)
def test_clipping_brings_the_norm_down_to_the_bound(norm: float, bound: float) -> None:
    factor = float(clip(scalar(norm), scalar(bound)))
    assert 0 < factor <= 1
    assert factor * norm <= bound * (1 + 1e-12)
    assert factor == 1 or math.isclose(factor * norm, bound, rel_tol=1e-9)


@given(st.lists(NORMS, min_size=1, max_size=40))
def test_the_threshold_is_sound_from_the_first_step(norms: list[float]) -> None:
    seen = fresh()
    assert math.isinf(float(threshold(seen)))
    for norm in norms:
        seen = observe(seen, scalar(norm))
        bound = float(threshold(seen))
        assert math.isfinite(bound)
        # The winsorised mean exceeds all norms only if they decreased. It is never below the smallest.
        assert bound >= min(norms) * (1 - 1e-9)


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=30), st.floats(1e-12, 1e12))
def test_the_threshold_scales_with_the_gradients(norms: list[float], scale: float) -> None:
    a, b = fresh(), fresh()
    for norm in norms:
        a, b = observe(a, scalar(norm)), observe(b, scalar(norm * scale))
    assert math.isclose(float(threshold(a)) * scale, float(threshold(b)), rel_tol=1e-6)


def test_a_spike_is_clipped_at_step_two_and_does_not_move_the_threshold_far() -> None:
    seen = observe(fresh(), scalar(1.0))
    bound = float(threshold(seen))
    assert 1.5 < bound < 20
    for _ in range(8):
        seen = observe(seen, scalar(1.0))
    before = float(threshold(seen))
    assert before < 4.0
    assert float(clip(scalar(1e6), threshold(seen))) == pytest.approx(before / 1e6)
    after = float(threshold(observe(seen, scalar(1e6))))
    assert after < 2 * before


def test_a_zero_norm_says_nothing() -> None:
    seen = observe(fresh(), scalar(2.0))
    assert all(torch.equal(a, b) for a, b in zip(observe(seen, scalar(0.0)), seen, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(observe(fresh(), scalar(0.0)), fresh(), strict=True))


def test_scopes_do_not_mix() -> None:
    both = LogNorms(*(torch.zeros(2, dtype=torch.float64) for _ in range(3)))
    alone = fresh()
    for norm in (1.0, 2.0, 0.5):
        both = observe(both, torch.tensor([norm, 1e9 * norm], dtype=torch.float64))
        alone = observe(alone, scalar(norm))
    assert torch.equal(threshold(both)[:1], threshold(alone))


def test_bounds_in_effect() -> None:
    assert Magnitude().bound == 1.0
    assert math.isinf(Magnitude(adaptive=True).bound)
    assert Magnitude(adaptive=True, max_norm=3.0).bound == 3.0


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
        Magnitude(**options)  # type: ignore[arg-type]
