"""An update of Adam that is not measured was within its bound, whatever gradients came before."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from gradguide.ops.tensors import TensorList
from gradguide.step.adam_bound.host import AdamBound
from gradguide.step.buckets import Bucket

LEAST = 0.01
ONE = torch.ones(1, dtype=torch.float64)


def bucket_of(held: list[nn.Parameter]) -> list[Bucket]:
    return [Bucket(parameters=list(held), values=TensorList(held), groups=[0] * len(held))]


def step(base: Optimizer, gradients: list[Tensor]) -> float:
    """Make a step of the base alone, and return the length of its update over that of the parameters."""
    held = base.param_groups[0]["params"]
    before = torch.cat([p.detach().double() for p in held])
    for parameter, gradient in zip(held, gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    base.step()
    update = torch.cat([p.detach().double() for p in held]) - before
    return float(update.norm()) / max(float(before.norm()), LEAST * math.sqrt(len(before)))


KINDS: dict[str, Callable[[int, float, float], float]] = {
    "geometric": lambda t, b1, b2: min((b2 / max(b1, 1e-3)) ** t, 1e12),
    "spike": lambda t, b1, b2: 1e9 if t % 7 == 6 else 1e-12,
    "alternating": lambda t, b1, b2: (-1.0) ** t * (1e-9 if t % 2 else 1e6),
    "growing": lambda t, b1, b2: 10.0 ** min(t, 14),
    "underflow": lambda t, b1, b2: 1e-30 * 10.0 ** min(2 * t, 40),
    "zeros, then one": lambda t, b1, b2: float(t == 11),
    "constant": lambda t, b1, b2: 1e-3,
}


@settings(max_examples=150)
@given(
    kind=st.sampled_from(list(KINDS)),
    betas=st.tuples(st.sampled_from([0.0, 0.5, 0.9, 0.99]), st.sampled_from([0.3, 0.9, 0.95, 0.999])),
    later=st.tuples(st.sampled_from([0.0, 0.9, 0.95]), st.sampled_from([0.95, 0.999])),
    change=st.integers(1, 12),
    options=st.sampled_from([{}, {"amsgrad": True}, {"maximize": True}, {"foreach": True}, {"fused": True}]),
    kind_of=st.sampled_from([Adam, AdamW]),
    length=st.sampled_from([0.0, 1e-3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    decay=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 99),
)
def test_no_gradients_exceed_what_is_proven(
    kind: str, betas: tuple[float, float], later: tuple[float, float], change: int, options: dict[str, Any],
    kind_of: type[Adam], length: float, dtype: torch.dtype, decay: float, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    held = [nn.Parameter((torch.randn(n, generator=generator) * length).to(dtype)) for n in (1, 5)]
    base = kind_of(held, lr=1e-3, betas=betas, weight_decay=decay, **options)
    bound, buckets = AdamBound(), bucket_of(held)
    signs = [torch.randn(len(p), generator=generator) for p in held]
    for t in range(15):
        if t == change:
            base.param_groups[0]["betas"] = later
        gradients = [sign * KINDS[kind](t, *betas) for sign in signs]
        # The base itself says how long the update is. Anything shorter must not be proven.
        needed = step(copy.deepcopy(base), gradients)
        assert not bound.update_is_bounded(base, buckets, ONE, needed * (1 - 1e-6))
        step(base, gradients)
        bound.after_step(base, buckets)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.999)])
def test_the_worst_gradients_come_close_to_it(betas: tuple[float, float]) -> None:
    held = [nn.Parameter(torch.zeros(1, dtype=torch.float64))]
    base = AdamW(held, lr=1e-6, betas=betas, weight_decay=0.0, eps=1e-12)
    bound, buckets = AdamBound(), bucket_of(held)
    for t in range(60):
        gradient = [torch.tensor([(betas[1] / betas[0]) ** t if betas[0] else float(t == 59)])]
        needed = step(copy.deepcopy(base), gradient)
        largest = needed + 1e-6 if t == 59 else 1.0
        assert bound.update_is_bounded(base, buckets, ONE, largest * 1.002)
        step(base, gradient)
        bound.after_step(base, buckets)
    assert needed > 1e-4


def test_the_ratio_is_the_closed_form() -> None:
    b1, b2, steps = 0.9, 0.999, 50
    held = [nn.Parameter(torch.zeros(1))]
    base = AdamW(held, lr=1e-4, betas=(b1, b2), weight_decay=0.0)
    found, buckets = AdamBound(), bucket_of(held)
    for _ in range(steps - 1):
        found.update_is_bounded(base, buckets, ONE, 1.0)
        step(base, [torch.ones(1)])
        found.after_step(base, buckets)
    squares, products, sums = (sum(x**j for j in range(steps)) for x in (b2, b1**2 / b2, b1))
    exact = 1e-4 * math.sqrt(squares * products) / sums / LEAST
    assert not copy_of(found).update_is_bounded(base, buckets, ONE, exact * 1.0001)
    assert found.update_is_bounded(base, buckets, ONE, exact * 1.01 + 1e-6)


def copy_of(bound: AdamBound) -> AdamBound:
    other = copy.copy(bound)
    other._squares = dict(bound._squares)
    return other


def test_of_two_tensors_of_a_group_the_first_counts_too() -> None:
    held = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    base, buckets = AdamW(held, lr=1e-6), bucket_of(held)
    step(base, [torch.ones(3), torch.ones(3)])
    base.state[held[0]]["exp_avg"][1] = math.nan
    assert not AdamBound().update_is_bounded(base, buckets, ONE, 0.1)


def test_a_huge_ratio_in_float64_is_unbounded() -> None:
    held = [nn.Parameter(torch.ones(3, dtype=torch.float64))]
    base, buckets = AdamW(held, lr=1e-6), bucket_of(held)
    step(base, [torch.ones(3)])
    base.state[held[0]]["exp_avg"][1] = 1e200
    assert not AdamBound().update_is_bounded(base, buckets, ONE, 0.1)


def test_a_step_that_failed_does_not_lower_the_ratio() -> None:
    held = [nn.Parameter(torch.ones(3))]
    base, buckets, bound = AdamW(held, lr=1e-6), bucket_of(held), AdamBound()
    step(base, [torch.ones(3)])
    base.state[held[0]]["exp_avg"].fill_(1e3)
    assert not bound.update_is_bounded(base, buckets, ONE, 0.1)
    step(base, [torch.ones(3)])
    bound.after_step(base, buckets)
    # Now the base raises before it writes, so after_step() is not called.
    assert not any(bound.update_is_bounded(base, buckets, ONE, 0.1) for _ in range(100))


@pytest.mark.parametrize("option", [{"betas": (0.9, 1.5)}, {"betas": (-0.5, 0.999)}, {"eps": -1e-8}])
def test_settings_that_the_base_refuses_are_not_proven(option: dict[str, Any]) -> None:
    held = [nn.Parameter(torch.ones(3))]
    base, buckets = AdamW(held, lr=1e-6), bucket_of(held)
    assert AdamBound().update_is_bounded(base, buckets, ONE, 0.1)
    base.param_groups[0].update(option)
    assert not AdamBound().update_is_bounded(base, buckets, ONE, 0.1)
