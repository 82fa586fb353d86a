"""Groups that maximize (row 28): same trajectory as the problem written as descent, for every rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, NAdam, Optimizer

from gradguide import Alignment, Direction, GradGuide, Magnitude, Regularizer, SourceGradient

SHAPES = {"a.first": (4, 3), "a.second": (5,), "b.first": (3, 3), "b.second": (2,)}
STEPS = 6


def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def source(seed: int) -> SourceGradient:
    return SourceGradient(draw(seed))


def anchored(seed: int) -> SourceGradient:
    fisher = {name: table.square() for name, table in draw(seed).items()}
    return SourceGradient(None, fisher=fisher, anchor=draw(seed + 1)).anchored()


QUIET: dict[str, Any] = {"direction": None, "magnitude": None}

RULES: dict[str, Callable[[], dict[str, Any]]] = {
    "damping": lambda: {"direction": Direction(decay=0.7, damping=0.9), "magnitude": None},
    "shared momentum": lambda: {
        "direction": Direction(share_momentum=True, damping=0.9),
        "alignment": Alignment(source(3), on="gradient", weight=0.3),
        "magnitude": None,
    },
    "pull": lambda: QUIET | {"alignment": Alignment(anchored(1), weight=0.5)},
    "projected gradient": lambda: QUIET | {"alignment": Alignment([source(3), source(4)], on="gradient")},
    "projected update": lambda: QUIET | {"alignment": Alignment([source(3), source(4)])},
    "clipping": lambda: {"direction": None, "magnitude": Magnitude(max_norm=0.3, max_update=None)},
    "bounded update": lambda: {"direction": None, "magnitude": Magnitude(max_update=2e-3)},
    "difference quotient": lambda: {
        "direction": Direction(),
        "alignment": Alignment(anchored(1)),
        "regularizer": Regularizer(direction=0.3, magnitude=0.1, alignment=0.2, source=source(3), warmup=0),
    },
    "everything": lambda: {
        "direction": Direction(decay=0.7, damping=0.9),
        "alignment": Alignment([anchored(1), source(3)], weight=0.2, project=True),
        "magnitude": Magnitude(max_norm=2.0, max_update=5e-3),
    },
    "difference quotient, shared momentum": lambda: {
        "direction": Direction(share_momentum=True),
        "regularizer": Regularizer(direction=0.3, magnitude=0.1, alignment=0.2, source=source(3), warmup=0),
    },
}  # fmt: skip

BASES: dict[str, Callable[..., Optimizer]] = {
    "AdamW": lambda groups: AdamW(groups, lr=0.05, weight_decay=0.1),
    "SGD": lambda groups: SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.1),
    "NAdam": lambda groups: NAdam(groups, lr=0.05),
}

SIGNS = {"one sign": (-1, -1), "both signs": (1, -1)}


def problem(named: dict[str, nn.Parameter], signs: Sequence[int], step: int) -> Tensor:
    """Return the sum over groups of ``sign`` times the loss that the group's step decreases."""
    loss = torch.zeros(())
    for sign, prefix in zip(signs, ("a.", "b."), strict=True):
        for name, parameter in named.items():
            if name.startswith(prefix):
                target = draw(50 + step % 3)[name]
                loss = loss + sign * ((parameter - target).square() + torch.cos(3 * parameter)).mean()
    return loss * (30.0 if step == 4 else 1.0)  # an outlier, so that clipping acts


def run(
    base: str, rules: str, scope: str, signs: Sequence[int], stated: bool, steps: int = STEPS
) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Return parameters and metrics per step; ``stated`` as descent, or with ``maximize`` if the sign is -1."""
    named = {name: nn.Parameter(table) for name, table in draw(0).items()}
    groups = [
        {
            "params": [p for name, p in named.items() if name.startswith(prefix)],
            "maximize": not stated and sign < 0,
        }
        for sign, prefix in zip(signs, ("a.", "b."), strict=True)
    ]  # fmt: skip
    optimizer = GradGuide(BASES[base](groups), names=named, scope=scope, **RULES[rules]())
    found, metrics = [], []
    for step in range(steps):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = problem(named, (1, 1) if stated else signs, step)
            loss.backward()
            return loss

        optimizer.step(closure)
        found.append(torch.cat([p.detach().reshape(-1) for p in named.values()]))
        metrics.append(optimizer.metrics())
    return found, metrics


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize(
    ("base", "rules"), [(base, rules) for base in ("AdamW", "SGD") for rules in RULES] + [("NAdam", "shared momentum")]
)
def test_i28_maximize_is_the_same_problem_stated_as_descent(base: str, rules: str, scope: str, signs: str) -> None:
    found, metrics = run(base, rules, scope, SIGNS[signs], False)
    wanted, expected = run(base, rules, scope, SIGNS[signs], True)
    # A difference quotient divides rounding errors by a small step.
    rtol, atol = (1e-2, 3e-4) if "quotient" in rules else (1e-4, 1e-5)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)
    for measured, stated in zip(metrics, expected, strict=True):
        assert measured == pytest.approx(stated, rel=10 * rtol, abs=10 * atol, nan_ok=True)


@pytest.mark.parametrize("rules", [rules for rules in RULES if "quotient" not in rules])
def test_i28_of_one_sign_every_bit_is_the_same(rules: str) -> None:
    """Except for a difference quotient, which is taken on the other side."""
    found, metrics = run("AdamW", rules, "global", (-1, -1), False)
    wanted, expected = run("AdamW", rules, "global", (-1, -1), True)
    assert all(map(torch.equal, found, wanted))
    assert repr(metrics) == repr(expected)  # repr, so that NaN equals NaN


@pytest.mark.parametrize("rules", RULES)
def test_i28_every_rule_changes_this_trajectory(rules: str) -> None:
    """Ensures that the other tests compare rules that act."""
    guided, _ = run("SGD", rules, "global", (-1, -1), False)
    named = {name: nn.Parameter(table) for name, table in draw(0).items()}
    plain = BASES["SGD"]([{"params": list(named.values()), "maximize": True}])
    for step in range(STEPS):
        plain.zero_grad()
        problem(named, (-1, -1), step).backward()
        plain.step()
    assert not torch.allclose(
        guided[-1], torch.cat([p.detach().reshape(-1) for p in named.values()]), rtol=1e-3, atol=1e-3
    )


def test_i28_a_sign_that_changes_within_a_run_counts_from_then_on() -> None:
    results = []
    for stated in (False, True):
        parameter = nn.Parameter(torch.ones(4))
        base = SGD([parameter], lr=0.1)
        pull = SourceGradient(None, fisher={"p": torch.ones(4)}, anchor={"p": torch.zeros(4)}).anchored()
        optimizer = GradGuide(base, direction=None, alignment=Alignment(pull), magnitude=None, names={"p": parameter})
        for step in range(6):
            sign = -1.0 if step >= 3 else 1.0
            base.param_groups[0]["maximize"] = not stated and sign < 0
            parameter.grad = torch.full((4,), 0.3) * (1.0 if stated else sign)
            optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


class Climbing(Optimizer):
    """Sets ``maximize`` on the optimizer, not in its groups."""

    maximize = True

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(0.1 * parameter.grad)


def test_i28_a_base_that_maximizes_as_a_whole() -> None:
    results = []
    for climbs in (False, True):
        parameter = nn.Parameter(torch.ones(4))
        base = Climbing([parameter]) if climbs else SGD([parameter], lr=0.1)
        pull = SourceGradient(None, fisher={"p": torch.ones(4)}, anchor={"p": torch.zeros(4)}).anchored()
        optimizer = GradGuide(
            base, alignment=Alignment(pull), magnitude=None, names={"p": parameter}, direction=Direction()
        )
        for _ in range(5):
            parameter.grad = torch.full((4,), -0.3 if climbs else 0.3)
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
