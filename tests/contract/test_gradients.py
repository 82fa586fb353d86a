"""Handling of gradients: scale, dtype, memory and absence (rows 9, 10, 13, 14, 15, 18, 25)."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import nn

from gradguide import Alignment, Direction, GradGuide, Magnitude
from tests.contract import kit

DECISIONS = ("direction_cosine", "coherence", "source_cosine", "conflict", "clip_factor")


@functools.cache
def scaled_run(kind: str, scope: str, factor: float) -> tuple[list[dict[str, float]], list[Any], list[Any]]:
    """Return metrics, directions and guided gradients of five steps with gradients times ``factor``."""
    model = kit.net()
    sources = [kit.source_of(model, seed=7, moving=False), kit.source_of(model, seed=8, moving=False)]
    extra: dict[str, Any] = {
        "direction": {},
        "one source": {"alignment": Alignment(sources[0], on="gradient", weight=0.0)},
        "two sources": {"alignment": Alignment(sources, on="gradient", weight=0.0)},
    }[kind]
    magnitude = Magnitude(max_norm=20.0 * factor, max_update=None)
    optimizer = kit.guide(model, kit.sgd, scope=scope, magnitude=magnitude, **extra)
    metrics, directions, guided = [], [], []
    for step in range(5):
        kit.give_gradients(model, step, factor * (30.0 if step == 3 else 1.0))
        optimizer.step()
        metrics.append(optimizer.metrics())
        directions.append(kit.directions_of(optimizer))
        guided.append([p.grad.clone() / factor for p in model.parameters() if p.grad is not None])
    return metrics, directions, guided


@pytest.mark.parametrize(
    ("scope", "factor"), [("global", 1e-12), ("global", 1e12), *((s, f) for s in kit.SCOPES for f in (1e-6, 1e6))]
)
@pytest.mark.parametrize("kind", ["direction", "one source", "two sources"])
def test_i09_scaling_all_gradients_changes_no_decision(kind: str, scope: str, factor: float) -> None:
    metrics, directions, guided = scaled_run(kind, scope, 1.0)
    found, found_directions, found_guided = scaled_run(kind, scope, factor)
    if kind != "direction":
        assert any(m["conflict"] == 1.0 for m in metrics), "no source ever conflicts"
    assert any(m["clip_factor"] < 1 for m in metrics), "no gradient is clipped"
    for mine, other in zip(found, metrics, strict=True):
        for key in DECISIONS:
            assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5, nan_ok=True), key
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"] * factor, rel=1e-5)
        assert mine["guided_norm"] == pytest.approx(other["guided_norm"] * factor, rel=1e-4)
    torch.testing.assert_close(found_directions, directions, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found_guided, guided, rtol=1e-3, atol=1e-5)


def test_i09_norms_are_as_received_guided_and_clipped() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.sgd, magnitude=Magnitude(max_norm=0.5))
    for step in range(4):
        kit.give_gradients(model, step)
        received = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        optimizer.step()
        given = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        metrics = optimizer.metrics()
        assert metrics["grad_norm"] == pytest.approx(received.norm().item(), rel=1e-5)
        assert given.norm().item() == pytest.approx(0.5, rel=1e-5)
        assert metrics["guided_norm"] * metrics["clip_factor"] == pytest.approx(0.5, rel=1e-5)
        if step < 2:  # one earlier gradient gives no coherence
            assert metrics["guided_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-6)
        else:
            assert 0.5 < metrics["guided_norm"] < metrics["grad_norm"], "damping shortens a gradient"


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("kind", kit.KINDS)
def test_i10_micro_batches_equal_one_large_batch(kind: str, count: int) -> None:
    whole, parts = kit.net(), kit.net()
    one, many = kit.guide(whole, kit.adamw, kind), kit.guide(parts, kit.adamw, kind)
    for step in range(4):
        kit.train(whole, one, [step])
        many.zero_grad()
        x, y = kit.batch(step)
        for piece in zip(x.chunk(count), y.chunk(count), strict=True):
            (kit.loss_of(parts, piece) / count).backward()
        many.step()
    assert many.metrics()["steps"] == one.metrics()["steps"] == 4
    torch.testing.assert_close(kit.directions_of(many), kit.directions_of(one), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(kit.parameters_of(parts), kit.parameters_of(whole), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scope", kit.SCOPES)
@pytest.mark.parametrize("kind", kit.KINDS)
def test_i13_missing_frozen_unused_and_zero_gradients(kind: str, scope: str) -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw, kind, scope)
    unused, frozen, zero, live = model.parameters()
    frozen.requires_grad_(False)
    before = kit.parameters_of(model)
    for step in range(4):
        kit.give_gradients(model, step)
        unused.grad = frozen.grad = None
        zero.grad = torch.zeros_like(zero)
        optimizer.step()
        assert unused.grad is None
        assert frozen.grad is None
        assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(unused, before[0])
    assert torch.equal(frozen, before[1])
    assert not torch.equal(live, before[3])
    assert all(d.isfinite().all() for d in kit.directions_of(optimizer).values())
    assert math.isfinite(optimizer.metrics()["grad_norm"])


class Adapter(nn.Module):
    """A frozen layer with a LoRA pair: B is zero, so A's first gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).requires_grad_(False)
        self.lora_A = nn.Linear(4, 2, bias=False)
        self.lora_B = nn.Linear(2, 3, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x) + self.lora_B(self.lora_A(x))
        return out


@pytest.mark.parametrize("scope", ["global", "group", "module", "tensor"])
def test_i13_first_step_of_lora_has_a_zero_gradient_in_a(scope: str) -> None:
    model = Adapter()
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = GradGuide(kit.adamw(trainable), scope=scope, direction=Direction())
    a, b = model.lora_A.weight, model.lora_B.weight
    kit.train(model, optimizer, [0])
    assert a.grad is not None
    assert not a.grad.any()
    assert b.any()
    state = optimizer.state_dict()["state"]
    assert not state[0]["gradguide.direction"].any()
    start = a.detach().clone()
    kit.train(model, optimizer, range(1, 5))
    assert not torch.equal(a, start)
    assert all(p.isfinite().all() for p in model.parameters())
    assert 0.0 <= optimizer.metrics()["coherence"] <= 1.0


@pytest.mark.parametrize("kind", kit.KINDS)
def test_i13_all_zero_gradients_from_the_start_stay_finite(kind: str) -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.sgd, kind)
    before = kit.parameters_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        optimizer.step()
    kit.assert_same(kit.parameters_of(model), before)
    metrics = optimizer.metrics()
    assert metrics["grad_norm"] == metrics["guided_norm"] == 0.0
    assert metrics["clip_factor"] == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_i14_direction_does_not_stall_in_low_precision(dtype: torch.dtype) -> None:
    """With a constant gradient and decay 0.99, a bf16 direction would stop at 0.98 of its limit."""
    parameter = nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = GradGuide(kit.sgd([parameter], lr=0.0), direction=Direction(decay=0.99, damping=0.0))
    for _ in range(300):
        parameter.grad = torch.full_like(parameter, 1.0)
        optimizer.step()
    assert parameter.grad is not None
    assert parameter.grad.dtype == dtype
    direction = kit.directions_of(optimizer)[0]
    torch.testing.assert_close(direction, torch.full((4,), 0.5 * (1 - 0.99**300)), rtol=1e-4, atol=0)
    assert optimizer.metrics()["coherence"] == pytest.approx(1.0, abs=1e-4)


def test_i25_gradients_eaten_in_backward_are_named() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.sgd)

    def eat(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(eat)
    kit.loss_of(model, kit.batch(0)).backward()
    with pytest.raises(RuntimeError, match=r"hooks.*during backward"):
        optimizer.step()


@pytest.mark.parametrize("kind", kit.KINDS)
def test_i18_gradients_are_written_in_place(kind: str) -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.sgd, kind)
    for step in range(3):
        kit.give_gradients(model, step, scale=10.0 if step < 2 else 1000.0)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        kept = [(id(g), g.data_ptr(), g.stride(), g.clone()) for g in gradients]
        optimizer.step()
        for parameter, (identity, pointer, stride, value) in zip(model.parameters(), kept, strict=True):
            assert parameter.grad is not None
            assert id(parameter.grad) == identity
            assert (parameter.grad.data_ptr(), parameter.grad.stride()) == (pointer, stride)
            assert step < 2 or not torch.equal(parameter.grad, value), "an outlier is clipped in every kind"
            assert not parameter.grad.requires_grad


def test_i18_gradients_that_are_views_are_written_through() -> None:
    """Rows of one flat buffer, one of them transposed, as in DDP's buckets and channels-last layers."""
    views, plain = kit.net(), kit.net()
    one, other = kit.guide(views, kit.sgd), kit.guide(plain, kit.sgd)
    buffer = torch.zeros(sum(p.numel() for p in views.parameters()))
    for step in range(3):
        kit.give_gradients(plain, step, scale=5.0)
        start = 0
        for parameter, twin in zip(views.parameters(), plain.parameters(), strict=True):
            part = buffer[start : start + parameter.numel()]
            start += parameter.numel()
            view = part.view(parameter.shape[::-1]).t() if parameter.dim() == 2 else part.view(parameter.shape)
            assert twin.grad is not None
            parameter.grad = view.copy_(twin.grad)
        before = buffer.clone()
        one.step()
        other.step()
        assert not torch.equal(buffer, before)
        assert buffer.norm().item() == pytest.approx(1.0, rel=1e-5)
        torch.testing.assert_close(kit.parameters_of(views), kit.parameters_of(plain), rtol=1e-5, atol=1e-7)
