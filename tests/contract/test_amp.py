"""Loss scaling: GradGuide works within one step, on unscaled gradients (rows 2, 12)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.amp.autocast_mode import autocast
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from gradguide import Direction, GradGuide
from tests.contract import kit

Unscale = Callable[[GradScaler, Optimizer], None]


def fused(params: Any, **extra: Any) -> Optimizer:
    return kit.adamw(params, fused=True, **extra)


def amp_step(model: torch.nn.Module, optimizer: Optimizer, scaler: GradScaler, step: int, *, unscale: bool) -> None:
    """Make one step of the usual float16 loop."""
    optimizer.zero_grad()
    x, y = kit.batch(step)
    with autocast("cpu", dtype=torch.float16):
        output = model(x)
    scaler.scale(F.cross_entropy(output.float(), y)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def overflow(model: torch.nn.Module, optimizer: Optimizer, scaler: GradScaler, *, unscale: bool) -> None:
    """Make a step whose scaled gradients contain an Inf."""
    optimizer.zero_grad()
    scaler.scale(kit.loss_of(model, kit.batch(0))).backward()
    gradient = next(model.parameters()).grad
    assert gradient is not None
    gradient[0, 0] = float("inf")
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def run(make: kit.MakeBase, kind: str, *, unscale: bool, scale: float = 2.0**12) -> tuple[Any, list[dict[str, float]]]:
    model = kit.net()
    optimizer = kit.guide(model, make, kind)
    scaler = GradScaler("cpu", init_scale=scale)
    metrics = []
    for step in range(4):
        amp_step(model, optimizer, scaler, step, unscale=unscale)
        metrics.append(optimizer.metrics())
    return kit.snapshot(model, optimizer), metrics


@pytest.mark.parametrize("make", [kit.adamw, fused, kit.sgd], ids=["AdamW", "AdamW fused", "SGD"])
@pytest.mark.parametrize("kind", kit.KINDS)
def test_i02_same_with_and_without_explicit_unscale(kind: str, make: kit.MakeBase) -> None:
    held, metrics = run(make, kind, unscale=False)
    other, other_metrics = run(make, kind, unscale=True)
    kit.assert_same(held, other)
    kit.assert_same(metrics, other_metrics)
    assert metrics[-1]["steps"] == 4
    assert all(0 < m["grad_norm"] < 10 for m in metrics), "norms are of unscaled gradients"


def test_i02_the_loss_scale_does_not_matter() -> None:
    """A power of two changes only the exponent, so the run is bitwise the same."""
    small, large = (run(kit.adamw, "on update", unscale=False, scale=scale) for scale in (2.0**10, 2.0**14))
    kit.assert_same(large[1], small[1])
    kit.assert_same(large[0]["parameters"], small[0]["parameters"])


@pytest.mark.parametrize("unscale", [False, True], ids=["implicit", "explicit unscale_"])
@pytest.mark.parametrize("make", [kit.adamw, fused], ids=["AdamW", "AdamW fused"])
@pytest.mark.parametrize("kind", kit.KINDS)
def test_i02_overflow_leaves_everything_bit_identical(kind: str, make: kit.MakeBase, unscale: bool) -> None:
    model, twin = kit.net(), kit.net()
    optimizer, other = kit.guide(model, make, kind), kit.guide(twin, make, kind)
    scaler, calm = GradScaler("cpu", init_scale=2.0**12), GradScaler("cpu", init_scale=2.0**12)
    for step in range(2):
        amp_step(model, optimizer, scaler, step, unscale=unscale)
        amp_step(twin, other, calm, step, unscale=unscale)
    before = kit.snapshot(model, optimizer)
    overflow(model, optimizer, scaler, unscale=unscale)
    after = kit.snapshot(model, optimizer)
    del before["gradients"], after["gradients"]
    kit.assert_same(after, before)
    assert scaler.get_scale() == 2.0**11

    for step in range(2, 4):
        amp_step(model, optimizer, scaler, step, unscale=unscale)
        amp_step(twin, other, calm, step, unscale=unscale)
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(twin))
    kit.assert_same(optimizer.state_dict(), other.state_dict())


def test_i02_overflow_in_the_first_step() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw)
    scaler = GradScaler("cpu", init_scale=2.0**12)
    before = copy.deepcopy((kit.parameters_of(model), optimizer.state_dict()))
    overflow(model, optimizer, scaler, unscale=False)
    kit.assert_same((kit.parameters_of(model), optimizer.state_dict()), before)


def test_i12_amp_scaling_of_a_fused_base_is_not_exposed() -> None:
    optimizer = GradGuide(fused(kit.net().parameters()), direction=Direction())
    assert hasattr(optimizer.base, "_step_supports_amp_scaling")
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


@pytest.mark.parametrize("kind", kit.KINDS)
def test_i12_float16_with_fused_base_equals_the_plain_one(kind: str) -> None:
    held, metrics = run(fused, kind, unscale=False)
    plain, plain_metrics = run(kit.adamw, kind, unscale=False)
    torch.testing.assert_close(held["parameters"], plain["parameters"], rtol=1e-4, atol=1e-5)
    for mine, other in zip(metrics, plain_metrics, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4, nan_ok=True)
