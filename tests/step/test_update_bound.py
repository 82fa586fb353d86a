"""The bound holds for the written update, for every gradient, learning rate, precision and set of rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
from gradguide.step import fused_adam

SHAPES = ((3, 4), (1,), (7,))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCALES = st.floats(-20, 30).map(lambda power: 10.0**power)


def draw(seed: int, scale: float, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    largest = torch.finfo(dtype).max / 8
    return [(torch.randn(s, generator=generator).double() * scale).clamp(-largest, largest).to(dtype) for s in SHAPES]


def guided(
    held: Sequence[nn.Parameter], base: Optimizer, sources: int, scope: str, largest: float, **options: Any
) -> GradGuide:
    named = {f"p{i}": p for i, p in enumerate(held)}
    if sources:
        given = [SourceGradient(dict(zip(named, draw(9 + k, 1.0, torch.float32), strict=True))) for k in range(sources)]
        options |= {"alignment": Alignment(given), "names": named}
    magnitude = Magnitude(max_norm=math.inf, max_update=largest)
    return GradGuide(base, magnitude=magnitude, scope=scope, **({"direction": Direction()} | options))


def excess(before: Sequence[Tensor], after: Sequence[Tensor], scope: str, largest: float) -> float:
    """Return the excess of the update over bound and rounding, relative to the bound: at most 0 if the bound holds."""
    groups = [[i] for i in range(len(before))] if scope == "tensor" else [list(range(len(before)))]
    worst = -math.inf
    for group in groups:
        old, new = (torch.cat([side[i].double().reshape(-1) for i in group]) for side in (before, after))
        bound = largest * max(float(old.norm()), 0.01 * math.sqrt(len(old)))
        about = torch.finfo(before[0].dtype)
        # Coefficients and sums are in float32. The written values are rounded to the parameter's precision.
        rounding = (about.eps + 4 * 2**-23) * float(new.abs().maximum(old.abs()).norm())
        rounding += about.smallest_normal * about.eps * math.sqrt(len(old))
        worst = max(worst, (float((new - old).norm()) - rounding) / bound - 1 - 1e-5)
    return worst


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(
    gradient=SCALES,
    rate=SCALES,
    length=st.sampled_from([0.0, 1e-8, 1e-3, 1.0, 1e3]),
    dtype=st.sampled_from(DTYPES),
    base=st.sampled_from(["SGD", "AdamW"]),
    sources=st.sampled_from([0, 1, 3]),
    scope=st.sampled_from(["global", "tensor"]),
    seed=st.integers(0, 99),
)
def test_the_bound_holds(
    gradient: float, rate: float, length: float, dtype: torch.dtype, base: str, sources: int, scope: str,
    seed: int,
) -> None:  # fmt: skip
    held = [nn.Parameter(t) for t in draw(seed, length, dtype)]
    largest = 1e4 if dtype == torch.float16 else 1e30  # torch rejects a rate that the precision cannot represent
    made = {"SGD": SGD, "AdamW": AdamW}[base](held, lr=min(rate, largest))
    optimizer = guided(held, made, sources, scope, 0.05, direction=None)
    for step in range(2):
        before = [p.detach().clone() for p in held]
        for parameter, value in zip(held, draw(seed + 100 + step, gradient, dtype), strict=True):
            parameter.grad = value
        optimizer.step()
        after = [p.detach() for p in held]
        assert all(t.isfinite().all() for t in after)
        assert excess(before, after, scope, 0.05) <= 0.0
        assert 0.0 <= optimizer.metrics()["update_factor"] <= 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_an_update_within_the_bound_keeps_every_bit(scope: str, dtype: torch.dtype) -> None:
    runs = []
    for bounded in (False, True):
        held = [nn.Parameter(t) for t in draw(0, 1.0, dtype)]
        base = AdamW(held, lr=0.01)
        optimizer = guided(held, base, 0, scope, 1e3, direction=None) if bounded else base
        for step in range(5):
            for parameter, value in zip(held, draw(10 + step, 1.0, dtype), strict=True):
                parameter.grad = value
            optimizer.step()
        runs.append(held)
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("gradient", [1e4, 1e9, 1e20, 1e30])
def test_what_was_before_is_not_lost_in_a_huge_update(gradient: float) -> None:
    parameter = nn.Parameter(torch.full((4,), 0.5))
    optimizer = GradGuide(SGD([parameter], lr=0.1), magnitude=Magnitude(max_norm=math.inf), direction=Direction())
    parameter.grad = torch.full((4,), gradient)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4,), 0.475), rtol=1e-6, atol=0)
    assert optimizer.metrics()["update_factor"] == pytest.approx(0.25 / gradient, rel=1e-5)


def test_a_scope_whose_update_overflows_goes_back_and_the_others_step() -> None:
    held = [nn.Parameter(torch.ones(3, dtype=torch.float16)) for _ in range(2)]
    optimizer = guided(held, SGD(held, lr=1e4), 0, "tensor", 0.05, direction=None)
    held[0].grad, held[1].grad = (torch.full((3,), value, dtype=torch.float16) for value in (100.0, 1e-6))
    optimizer.step()
    assert held[0].tolist() == [1.0] * 3
    assert held[1].tolist() == pytest.approx([1.0 - 1e-2] * 3, rel=0.1)
    assert optimizer.metrics()["update_factor"] == 0.0


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_bounded_update_is_the_bases_and_its_factor_is_reported(scope: str) -> None:
    held = [nn.Parameter(t) for t in draw(0, 1.0, torch.float32)]
    optimizer = guided(held, SGD(held, lr=1.0), 0, scope, 0.05, direction=Direction())
    gradients = draw(1, 1.0, torch.float32)
    before = [p.detach().clone() for p in held]
    for parameter, value in zip(held, gradients, strict=True):
        parameter.grad = value.clone()
    optimizer.step()
    groups = [[0, 1, 2]] if scope == "global" else [[0], [1], [2]]
    left = 0.0
    for group in groups:
        old, g = (torch.cat([side[i].reshape(-1) for i in group]) for side in (before, gradients))
        factor = min(1.0, 0.05 * float(old.norm() / g.norm()))
        left += (factor * float(g.norm())) ** 2
        for i in group:
            torch.testing.assert_close(held[i].detach(), before[i] - factor * gradients[i], rtol=1e-5, atol=1e-7)
    whole = float(torch.cat([g.reshape(-1) for g in gradients]).norm())
    assert optimizer.metrics()["update_factor"] == pytest.approx(math.sqrt(left) / whole, rel=1e-5)


@pytest.mark.parametrize("magnitude", [None, Magnitude(max_update=None)])
def test_without_a_bound_there_is_no_factor(magnitude: Magnitude | None) -> None:
    parameter = nn.Parameter(torch.ones(2))
    alignment = Alignment(SourceGradient({"p": torch.ones(2)}))
    optimizer = GradGuide(
        SGD([parameter], lr=0.1),
        alignment=alignment,
        magnitude=magnitude,
        names={"p": parameter},
        direction=Direction(),
    )
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert math.isnan(optimizer.metrics()["update_factor"])


def half_precision(dtype: torch.dtype, eps: float) -> tuple[GradGuide, nn.Parameter]:
    parameter = nn.Parameter(torch.ones(4, dtype=dtype))
    return GradGuide(AdamW([parameter], lr=1e-2, eps=eps)), parameter


def train(optimizer: GradGuide, parameter: nn.Parameter, steps: int) -> None:
    for _ in range(steps):
        parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()


def test_updates_that_are_undone_in_a_row_give_a_warning() -> None:
    optimizer, parameter = half_precision(torch.float16, 1e-8)
    train(optimizer, parameter, 5)
    assert parameter.tolist() == [1.0] * 4
    with pytest.warns(UserWarning, match=r"last 5 updates of AdamW .* an eps of 1e-08 .* pass eps=1e-4") as caught:
        train(optimizer, parameter, 1)
    assert caught[0].filename == __file__, "the warning names the line that calls step()"
    train(optimizer, parameter, 6)  # one warning for a sequence


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float16, 1e-4), (torch.bfloat16, 1e-8)])
def test_updates_of_16_bit_parameters_that_are_finite_give_no_warning(dtype: torch.dtype, eps: float) -> None:
    optimizer, parameter = half_precision(dtype, eps)
    train(optimizer, parameter, 10)
    assert max(parameter.tolist()) < 1.0


def test_a_damaged_state_of_the_base_is_named_where_its_updates_are_undone() -> None:
    optimizer, parameter = half_precision(torch.float32, 1e-8)
    train(optimizer, parameter, 1)
    optimizer.state[parameter]["exp_avg"].fill_(math.nan)
    with pytest.warns(UserWarning, match="Its state or the parameters may hold NaN or Inf"):
        train(optimizer, parameter, 6)


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
@pytest.mark.parametrize("moving", [False, True])
def test_a_projected_update_leaves_groups_with_a_rate_of_zero(rate: float | Tensor, moving: bool) -> None:
    """The rest of the update still has no conflict with the sources."""
    held = [nn.Parameter(value.double()) for value in draw(0, 1.0, torch.float32)]
    named = {f"p{i}": p for i, p in enumerate(held)}
    gradients = [torch.ones(shape, dtype=torch.float64) for shape in SHAPES]
    pull = {name: -gradient.float() for name, gradient in zip(named, gradients, strict=True)}
    about: dict[str, Any] = {
        "fisher": {name: torch.ones_like(part) for name, part in pull.items()},
        "anchor": {name: p.detach().float() - 0.1 for name, p in named.items()},
    }
    source = SourceGradient(pull, **(about if moving else {}))
    groups: list[dict[str, Any]] = [{"params": held[:2], "lr": rate}, {"params": held[2:], "lr": 0.1}]
    base = AdamW(groups, weight_decay=0.0, foreach=False)
    optimizer = GradGuide(base, alignment=Alignment(source), names=named, magnitude=None)
    before = [p.detach().clone() for p in held]
    for p, gradient in zip(held, gradients, strict=True):
        p.grad = gradient.clone()
    optimizer.step()
    assert optimizer.metrics()["conflict"] == 1
    assert torch.equal(held[0], before[0])
    assert torch.equal(held[1], before[1])
    row = source.row(["p2"], before[2:]).value(0, torch.float64)
    assert float(torch.dot(held[2].detach().reshape(-1) - before[2].reshape(-1), row)) < 1e-7


@pytest.mark.parametrize(("rates", "fused"), [((0.0, 0.0), True), ((0.0, 0.1), False), ((0.1, 0.1), True)])
def test_a_warmup_from_a_rate_of_zero_keeps_the_fused_step(
    rates: tuple[float, float], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other path copies the parameters, and its memory stays allocated."""
    asked = []
    monkeypatch.setattr(fused_adam, "plan_launches", lambda *arguments: asked.append(1))
    held = [nn.Parameter(torch.ones(3)) for _ in rates]
    named = {f"p{i}": p for i, p in enumerate(held)}
    source = SourceGradient({name: torch.tensor([-1.0, 0.0, 0.0]) for name in named})
    base = AdamW([{"params": [p], "lr": rate} for p, rate in zip(held, rates, strict=True)], weight_decay=0.0)
    optimizer = GradGuide(base, alignment=Alignment(source), names=named)
    for p in held:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert bool(asked) == fused
    assert [bool((p == 1).all()) for p in held] == [rate == 0 for rate in rates]
