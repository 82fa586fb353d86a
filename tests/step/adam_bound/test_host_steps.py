"""A step of GradGuide that leaves the measurement of Adam's update out changes no bit of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, NAdam, Optimizer, RAdam

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
from gradguide.ops.tensors import TensorList
from gradguide.recording.history import History
from gradguide.step.adam_bound.host import AdamBound
from gradguide.step.engine import Engine
from gradguide.step.plan import StepPlan

# Damaged states and parameters are given on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:the last 5 updates of AdamW had NaN or Inf")


def never(self: AdamBound, *_: object) -> bool:
    return False


def run(
    make: Callable[[list[nn.Parameter]], Optimizer],
    monkeypatch: pytest.MonkeyPatch,
    *,
    measured: bool,
    between: Callable[[Optimizer, int], None] = lambda base, t: None,
    dtype: torch.dtype = torch.float32,
    recorded: bool = False,
    **options: Any,
) -> tuple[list[Tensor], list[float], int]:
    """Return the parameters after each of 12 steps, the factors of the bound, and how often the update was measured."""
    generator = torch.Generator().manual_seed(0)
    held = [nn.Parameter((torch.randn(s, generator=generator) * 0.02).to(dtype)) for s in ((40, 8), (8,))]
    base = make(held)
    optimizer = GradGuide(base, names=[("a", held[0]), ("b", held[1])], **({"direction": Direction()} | options))
    if recorded:
        optimizer.record(History())
    states, factors, count = [], [], 0
    with monkeypatch.context() as patched:
        if measured:
            patched.setattr(AdamBound, "update_is_bounded", never)
        correct = Engine._correct

        def counted(self: Engine, *args: Any) -> None:
            nonlocal count
            count += 1
            correct(self, *args)

        patched.setattr(Engine, "_correct", counted)
        for t in range(12):
            for parameter in held:
                scale = 10.0 ** float(torch.randint(-6, 3, (), generator=generator))
                parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(dtype)
            optimizer.step()
            states += [p.detach().clone() for p in held]
            factors.append(optimizer.metrics()["update_factor"])
            between(base, t)
    return states, factors, count


def same_with_and_without(
    make: Callable[[list[nn.Parameter]], Optimizer], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> int:
    """Check that the proof changes no bit, and return how often the update was measured with it."""
    states, factors, count = run(make, monkeypatch, measured=False, **options)
    wanted, wanted_factors, always = run(make, monkeypatch, measured=True, **options)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(states, wanted, strict=True))
    assert factors == pytest.approx(wanted_factors, rel=1e-12)
    assert always == 12
    return count


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize(("lr", "measured"), [(1e-5, 0), (1e-4, 0), (4e-4, None), (1e-3, 12), (0.1, 12)])
def test_skipping_changes_no_bit(
    lr: float, measured: int | None, scope: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = same_with_and_without(lambda held: AdamW(held, lr=lr, fused=fused), monkeypatch, scope=scope)
    assert measured is None or found == measured


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_of_narrow_parameters_the_update_is_always_measured(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = same_with_and_without(lambda held: AdamW(held, lr=1e-5), monkeypatch, dtype=dtype)
    assert found == (0 if dtype == torch.float64 else 12)


@pytest.mark.parametrize("kind", [NAdam, RAdam, SGD])
def test_of_other_bases_too(kind: Callable[..., Optimizer], monkeypatch: pytest.MonkeyPatch) -> None:
    assert same_with_and_without(lambda held: kind(held, lr=1e-6), monkeypatch) == 12


def emptied(base: Optimizer, t: int) -> None:
    """Lose the second moments, and with them all that bounds the update."""
    if t == 5:
        for state in base.state.values():
            state["exp_avg_sq"].zero_()


def replaced(base: Optimizer, t: int) -> None:
    if t == 5:
        for state in base.state.values():
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])


def loaded(base: Optimizer, t: int) -> None:
    if t == 5:
        found = copy.deepcopy(base.state_dict())
        for state in found["state"].values():
            state["exp_avg_sq"].mul_(1e-12)
        base.load_state_dict(found)


def slower(base: Optimizer, t: int) -> None:
    if t == 5:
        base.param_groups[0]["betas"] = (0.999, 0.2)


def restarted(base: Optimizer, t: int) -> None:
    """Count from the start again, so that the bias is corrected once more."""
    if t == 5:
        for state in base.state.values():
            state["step"].zero_()


def broken(base: Optimizer, t: int) -> None:
    if t == 5:
        with torch.no_grad():
            base.param_groups[0]["params"][0][0, 0] = torch.inf


@pytest.mark.parametrize("between", [emptied, replaced, loaded, slower, broken])
def test_what_is_changed_between_steps_is_noticed(
    between: Callable[[Optimizer, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(held: list[nn.Parameter]) -> Optimizer:
        return AdamW(held, lr=5e-5)

    _, factors, count = run(make, monkeypatch, measured=False, between=between)
    assert 1 <= count <= 6
    assert same_with_and_without(make, monkeypatch, between=between) == count
    assert min(factors) < 1 or between is slower


def test_a_step_count_that_starts_again_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert same_with_and_without(lambda held: AdamW(held, lr=5e-5), monkeypatch, between=restarted) == 0

    def make(held: list[nn.Parameter]) -> Optimizer:
        return AdamW(held, lr=3e-4, betas=(0.9, 0.9))

    assert same_with_and_without(make, monkeypatch, between=restarted) > 0


@pytest.mark.parametrize(("other", "measured"), [(2e-5, 0), (1e-2, 12)])
def test_every_group_counts(other: float, measured: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(held: list[nn.Parameter]) -> Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": held[:1]},
            {"params": held[1:], "lr": other, "betas": (0.8, 0.99), "weight_decay": 0.5},
        ]
        return AdamW(groups, lr=1e-5)

    assert same_with_and_without(make, monkeypatch) == measured


def test_a_hook_on_the_base_may_write_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(held: list[nn.Parameter]) -> Optimizer:
        base = AdamW(held, lr=1e-5)

        def double(*_: object) -> None:
            with torch.no_grad():
                held[0].mul_(2.0)

        base.register_step_post_hook(double)
        return base

    assert same_with_and_without(make, monkeypatch) == 12


def test_a_source_on_the_update_and_a_history_still_measure_it(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Alignment(SourceGradient({"a": torch.ones(40, 8), "b": torch.ones(8)}))
    make = lambda held: AdamW(held, lr=1e-5)  # noqa: E731
    assert same_with_and_without(make, monkeypatch, alignment=source) == 12
    assert same_with_and_without(make, monkeypatch, recorded=True) == 12
    assert run(make, monkeypatch, measured=False, magnitude=Magnitude(max_update=None))[2] == 0


def test_without_a_proof_nothing_else_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[StepPlan] = []
    snapshot = StepPlan.snapshot

    def counted(self: StepPlan) -> list[TensorList]:
        copies.append(self)
        return snapshot(self)

    monkeypatch.setattr(StepPlan, "snapshot", counted)
    run(lambda held: AdamW(held, lr=1e-5), monkeypatch, measured=False)
    assert not copies
    run(lambda held: AdamW(held, lr=1e-2), monkeypatch, measured=False)
    assert len(copies) == 12


def unusual(name: str, value: float, tensor: int) -> Callable[[Optimizer, int], None]:
    """Return a change of one moment's first element, or of a setting of one group, before the seventh step."""

    def change(base: Optimizer, t: int) -> None:
        if t != 5:
            return
        group = base.param_groups[tensor]
        if name in group:
            group[name] = value
        else:
            base.state[group["params"][0]][name].view(-1)[0] = value

    return change


@pytest.mark.parametrize("tensor", [0, 1])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exp_avg", math.nan), ("exp_avg_sq", math.nan), ("max_exp_avg_sq", math.nan), ("exp_avg_sq", -1.0),
        ("exp_avg_sq", -1e-13), ("lr", -1.0), ("lr", math.nan), ("weight_decay", -1e6), ("weight_decay", math.nan),
    ],
)  # fmt: skip
def test_no_state_or_setting_is_proven_by_mistake(
    name: str, value: float, tensor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(held: list[nn.Parameter]) -> Optimizer:
        return AdamW([{"params": [p]} for p in held], lr=1e-5, eps=1e-5, amsgrad=name.startswith("max"))

    assert same_with_and_without(make, monkeypatch, between=unusual(name, value, tensor)) > 0


def test_nan_that_was_written_before_a_measured_step_is_found_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def between(base: Optimizer, t: int) -> None:
        base.param_groups[0]["lr"] = 1e-2 if t == 4 else 1e-5
        if t == 4:
            with torch.no_grad():
                base.param_groups[0]["params"][0][0, 0] = math.nan

    same_with_and_without(lambda held: AdamW(held, lr=1e-5), monkeypatch, between=between)


@pytest.mark.parametrize("lr", [1e-5, 1e-2])
def test_steps_in_inference_mode_are_the_same(lr: float) -> None:
    runs = []
    for inference in (False, True):
        held = [nn.Parameter(torch.linspace(-1.0, 1.0, 9))]
        optimizer = GradGuide(AdamW(held, lr=lr), direction=Direction())
        for t in range(4):
            held[0].grad = torch.arange(9.0) - t
            with torch.inference_mode(inference):
                optimizer.step()
        runs.append(held[0].detach().clone())
    assert torch.equal(*runs)
