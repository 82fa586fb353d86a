"""The proof for a device holds for every step number, and is withdrawn when the state is written by anything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from gradguide import Magnitude
from gradguide.ops.tensors import TensorList
from gradguide.step.adam_bound import device as adam_bound_device
from gradguide.step.adam_bound.device import DeviceAdamBound, largest_correction
from gradguide.step.buckets import Bucket
from tests.step.adam_bound.test_host import KINDS, step


@pytest.fixture(autouse=True)
def small_tensors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam_bound_device, "PAYS", 0)


def bucket_of(held: list[nn.Parameter]) -> list[Bucket]:
    elements = [sum(p.numel() for p in held)]
    return [Bucket(parameters=list(held), values=TensorList(held), groups=[0] * len(held), elements=elements)]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=generator)) for n in (4, 7)]


def stepped(make: Callable[..., Optimizer] = AdamW, **options: Any) -> tuple[Optimizer, list[Bucket], DeviceAdamBound]:
    """Return a base after a step, at a rate at which its update is within the bound for sure."""
    held = parameters()
    base = make(held, **({"lr": 1e-6} | options))
    step(base, [torch.ones_like(p) for p in held])
    return base, bucket_of(held), DeviceAdamBound()


BOUND = Magnitude()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999), (0.9, 0.95), (0.5, 0.3), (0.9, 0.9), (0.99, 0.999)])
def test_no_step_number_has_a_larger_correction(betas: tuple[float, float]) -> None:
    first, second = betas
    found = [math.sqrt(1 - second**t) / (1 - first**t) for t in range(1, 20_000)]
    assert max(found) <= largest_correction(first, second) <= max(*found, 1.0) * (1 + 1e-8)


def test_a_very_slow_average_is_not_proven() -> None:
    assert largest_correction(0.9999, 0.99999) == math.inf


@settings(max_examples=100)
@given(
    kind=st.sampled_from(list(KINDS)),
    betas=st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.9, 0.95, 0.999])),
    make=st.sampled_from([Adam, AdamW]),
    decay=st.sampled_from([0.0, 0.1]),
    length=st.sampled_from([0.0, 1e-3, 1.0]),
    known=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_no_gradients_exceed_what_is_proven(
    kind: str, betas: tuple[float, float], make: type[Adam], decay: float, length: float, known: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    held = [nn.Parameter(torch.randn(n, generator=generator) * length) for n in (1, 5)]
    base = make(held, lr=1e-5, betas=betas, weight_decay=decay)
    buckets, bound = bucket_of(held), DeviceAdamBound()
    signs = [torch.randn(len(p), generator=generator) for p in held]
    step(base, [torch.zeros(len(p)) for p in held])
    smallest = math.inf  # bound at which the proof succeeds at every step
    for candidate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 0.1):
        if DeviceAdamBound().update_is_bounded(base, buckets, Magnitude(max_update=candidate)):
            smallest = candidate
            break
    for t in range(15):
        if t == known:  # after a resume
            bound = DeviceAdamBound()
        proven = smallest < math.inf and bound.update_is_bounded(base, buckets, Magnitude(max_update=smallest))
        made = step(base, [sign * KINDS[kind](t, *betas) for sign in signs])
        bound.after_step()
        assert not proven or made <= smallest


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Count how often the state is measured."""
    counted = Mock(side_effect=adam_bound_device._measured)
    monkeypatch.setattr(adam_bound_device, "_measured", counted)
    return counted


def test_the_proof_outlives_steps_and_ends_with_other_writes(measured: Mock) -> None:
    base, buckets, bound = stepped()
    held = buckets[0].parameters
    for _ in range(3):
        assert bound.update_is_bounded(base, buckets, BOUND)
        step(base, [torch.ones_like(p) for p in held])
        bound.after_step()
    assert measured.call_count == 1
    base.state[held[0]]["exp_avg"].fill_(1e6)  # against a second moment of about 0.004
    for _ in range(2):
        assert not bound.update_is_bounded(base, buckets, BOUND)
        step(base, [torch.ones_like(p) for p in held])
        bound.after_step()
    assert measured.call_count == 2


def test_tensors_that_are_written_at_every_step_are_not_measured_at_every_step(measured: Mock) -> None:
    base, buckets, bound = stepped()
    held = buckets[0].parameters
    found = []
    for t in range(12):
        found.append(bound.update_is_bounded(base, buckets, BOUND))
        step(base, [torch.ones_like(p) for p in held])
        bound.after_step()
        if 2 <= t < 8:
            with torch.no_grad():
                held[0].clamp_(-1.0, 1.0)
    assert found == [True] * 3 + [False] * 6 + [True] * 3
    assert measured.call_count == 2


def reset(base: Optimizer, held: list[Tensor]) -> None:
    base.state[held[0]]["exp_avg_sq"].zero_()


def replace(base: Optimizer, held: list[Tensor]) -> None:
    base.state[held[0]] = {**base.state[held[0]], "exp_avg": torch.full_like(held[0], 1e9)}


def write_nan(base: Optimizer, held: list[Tensor]) -> None:
    with torch.no_grad():
        held[1][0] = math.nan


def count_down(base: Optimizer, held: list[Tensor]) -> None:
    base.state[held[0]]["step"] = torch.tensor(-3.0)


def slow(base: Optimizer, held: list[Tensor]) -> None:
    base.param_groups[0]["betas"] = (0.9, 0.9999999)


def raise_rate(base: Optimizer, held: list[Tensor]) -> None:
    base.param_groups[0]["lr"] = 1e-2


def lose_rate(base: Optimizer, held: list[Tensor]) -> None:
    base.param_groups[0]["lr"] = math.nan


def hook(base: Optimizer, held: list[Tensor]) -> None:
    base.register_step_post_hook(lambda *_: None)


def turn(base: Optimizer, held: list[Tensor]) -> None:
    base.param_groups[0]["eps"] = -1e-8


CHANGES = [reset, replace, write_nan, slow, raise_rate, lose_rate, hook, turn]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_may_break_the_bound_is_noticed(change: Callable[[Optimizer, list[Tensor]], None]) -> None:
    base, buckets, bound = stepped()
    held = buckets[0].parameters
    assert bound.update_is_bounded(base, buckets, BOUND)
    step(base, [torch.ones_like(p) for p in held])
    bound.after_step()
    change(base, held)
    assert not bound.update_is_bounded(base, buckets, BOUND)


def test_a_negative_step_number_is_not_proven() -> None:
    base, buckets, bound = stepped()
    count_down(base, buckets[0].parameters)
    assert not bound.update_is_bounded(base, buckets, BOUND)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e16])
def test_a_parameter_that_has_no_length_is_not_proven(value: float) -> None:
    """Its scope has to return to the parameters before the step."""
    base, buckets, bound = stepped()
    with torch.no_grad():
        buckets[0].values[1][0] = value
    assert not bound.update_is_bounded(base, buckets, BOUND)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_moment_that_is_nan_is_not_proven(name: str) -> None:
    base, buckets, bound = stepped()
    base.state[buckets[0].parameters[1]][name][0] = math.nan
    assert not bound.update_is_bounded(base, buckets, BOUND)


def test_a_ratio_from_earlier_betas_is_not_forgotten() -> None:
    """A spike at beta1 = 0 leaves a ratio of 31. From zero, beta1 = 0.9 reaches 7."""
    held = parameters()
    base = AdamW(held, lr=1e-5, betas=(0.0, 0.999), weight_decay=0.0)
    step(base, [torch.zeros_like(p) for p in held])
    for state in base.state.values():
        state["step"].fill_(10_000.0)
    buckets, bound = bucket_of(held), DeviceAdamBound()
    assert bound.update_is_bounded(base, buckets, BOUND)
    step(base, [torch.ones_like(p) for p in held])
    bound.after_step()
    base.param_groups[0].update(betas=(0.9, 0.999), lr=6e-5)
    assert not bound.update_is_bounded(base, buckets, BOUND)
    assert step(base, [torch.zeros_like(p) for p in held]) > 1e-3
    bound.after_step()
    # A large bound holds for both.
    assert bound.update_is_bounded(base, buckets, Magnitude(max_update=1.0))


def decoupled(held: list[nn.Parameter], **options: Any) -> Optimizer:
    """Return an Adam that decays as AdamW does, as torch 2.7 and later have it."""
    base = Adam(held, **options)
    base.param_groups[0].update(decoupled_weight_decay=True, weight_decay=1e5)
    return base


@pytest.mark.parametrize(
    ("make", "options", "magnitude"),
    [
        (SGD, {}, BOUND),
        (decoupled, {}, BOUND),
        (AdamW, {"lr": 1e-3}, BOUND),
        (AdamW, {"weight_decay": 1e5}, BOUND),
        (AdamW, {"eps": 0.0}, BOUND),
        (AdamW, {"eps": 1e-15}, BOUND),
        (AdamW, {}, Magnitude(max_norm=math.inf)),
        (AdamW, {}, Magnitude(max_update=None)),
        (AdamW, {}, None),
    ],
)
def test_what_the_proof_does_not_cover(
    make: Callable[..., Optimizer], options: dict[str, Any], magnitude: Magnitude | None
) -> None:
    base, buckets, bound = stepped(make, **options)
    assert not bound.update_is_bounded(base, buckets, magnitude)


def test_a_step_in_between_that_was_not_noted_is_measured_again() -> None:
    base, buckets, bound = stepped()
    assert bound.update_is_bounded(base, buckets, BOUND)
    bound.after_step()
    base.param_groups[0]["lr"] = 1e-2
    assert not bound.update_is_bounded(base, buckets, BOUND)
    step(base, [torch.ones_like(p) * math.inf for p in buckets[0].parameters])
    bound.after_step()
    base.param_groups[0]["lr"] = 1e-6
    assert not bound.update_is_bounded(base, buckets, BOUND)


def test_small_tensors_are_measured_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam_bound_device, "PAYS", 1 << 18)
    base, buckets, bound = stepped()
    assert not bound.update_is_bounded(base, buckets, BOUND)


def test_a_bucket_of_empty_tensors_is_proven_too() -> None:
    held = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0))]
    base = AdamW(held, lr=1e-6)
    step(base, [torch.ones_like(p) for p in held])
    assert DeviceAdamBound().update_is_bounded(base, [*bucket_of(held[:1]), *bucket_of(held[1:])], BOUND)
    assert DeviceAdamBound().update_is_bounded(base, bucket_of(held[1:]), BOUND)
