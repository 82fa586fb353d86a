"""The bound on the update in the kernels, with an unfused and a fused base step."""

from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
from gradguide.step import fused_adam
from gradguide.step.adam_bound import device as adam_bound_device
from tests.ops.triton.problems import DEVICE

# The interpreter uses numpy, which warns about values that are not finite.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


@pytest.mark.parametrize(
    ("sources", "dtype"),
    [
        (0, torch.float32),
        (0, torch.bfloat16),
        (0, torch.float16),
        (2, torch.float32),
        pytest.param(2, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(2, torch.float16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("base", ["SGD", "AdamW", "fused AdamW"])
@pytest.mark.parametrize(("gradient", "rate"), [(1e-3, 1e4), (1e12, 1.0), (1e12, 1e30)])
def test_the_bound_holds(gradient: float, rate: float, base: str, dtype: torch.dtype, sources: int) -> None:
    if dtype == torch.float16 and rate > 1e4:
        pytest.skip("torch refuses a rate that the precision does not hold")
    generator = torch.Generator().manual_seed(0)
    held = [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in ((5, 7), (3,))]
    named = {f"p{i}": p for i, p in enumerate(held)}
    given = [
        SourceGradient({n: torch.randn(p.shape, generator=generator).to(DEVICE) for n, p in named.items()})
        for _ in range(sources)
    ]
    made = SGD(held, lr=rate) if base == "SGD" else AdamW(held, lr=rate, weight_decay=0.0, fused="fused" in base)
    optimizer = GradGuide(
        made, direction=None, alignment=Alignment(given) if given else None, magnitude=Magnitude(max_norm=math.inf),
        names=named, backend="triton",
    )  # fmt: skip
    before = torch.cat([p.detach().double().reshape(-1) for p in held])
    for parameter in held:
        drawn = torch.randn(parameter.shape, generator=generator) * gradient
        parameter.grad = drawn.clamp(-6e4, 6e4).to(DEVICE, dtype) if dtype == torch.float16 else drawn.to(DEVICE, dtype)
    optimizer.step()
    after = torch.cat([p.detach().double().reshape(-1) for p in held])
    assert after.isfinite().all()
    largest = 0.05 * float(before.norm()) * (1 + 1e-4) + torch.finfo(dtype).eps * float(before.norm())
    assert float((after - before).norm()) <= largest
    assert 0.0 <= optimizer.metrics()["update_factor"] <= 1.0


def test_an_update_within_the_bound_keeps_every_bit() -> None:
    runs = []
    for largest in (None, 1e3):
        held = [nn.Parameter(torch.linspace(-1.0, 1.0, 9, device=DEVICE))]
        magnitude = Magnitude(max_norm=math.inf, max_update=largest)
        optimizer = GradGuide(AdamW(held, lr=0.01), direction=None, magnitude=magnitude, backend="triton")
        for _ in range(3):
            held[0].grad = torch.ones(9, device=DEVICE)
            optimizer.step()
        runs.append(held[0].detach())
    assert torch.equal(*runs)


@pytest.mark.parametrize("lost", [False, True])
def test_a_proven_bound_saves_the_measuring_pass_and_changes_no_bit(
    lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scope with NaN has no proof: it is measured, and not stepped."""
    preview = Mock(side_effect=fused_adam.preview_products)
    monkeypatch.setattr(fused_adam, "preview_products", preview)
    runs, counts = [], []
    for least in (1 << 18, 0):  # the tensors are smaller, so that the first run measures
        monkeypatch.setattr(adam_bound_device, "PAYS", least)
        preview.reset_mock()
        generator = torch.Generator().manual_seed(0)
        held = [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in ((5, 7), (40,), (3,))]
        if lost:
            with torch.no_grad():
                held[1][3] = math.nan
        optimizer = GradGuide(AdamW(held, lr=5e-5, fused=True), scope="tensor", backend="triton", direction=Direction())
        for t in range(5):
            for parameter in held:
                drawn = torch.randn(parameter.shape, generator=generator) * 10.0 ** (t % 3)
                parameter.grad = drawn.to(DEVICE)
            if t == 3:
                held[0].grad = torch.full_like(held[0], math.nan)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()  # the numbers of the state have arrived
            optimizer.step()
        assert optimizer.metrics()["update_factor"] <= 1.0
        states = [optimizer.state[p][name] for p in held for name in ("exp_avg", "exp_avg_sq", "step")]
        runs.append([*(p.detach().nan_to_num() for p in held), *states])
        counts.append(preview.call_count)
    # On a device the numbers arrive after the first step.
    assert counts[1] == counts[0] if lost else counts[1] <= (1 if DEVICE.type == "cuda" else 0) < counts[0]
    assert all(map(torch.equal, *runs))
