"""Closures and hooks (rows 23, 27)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradguide import Direction, GradGuide
from tests.contract import kit


@pytest.mark.parametrize("kind", [*kit.KINDS, "off"])
def test_i23_closure_runs_once_with_gradients_enabled_and_its_loss_is_returned(kind: str) -> None:
    model, twin = kit.net(), kit.net()
    off: dict[str, Any] = {"direction": None, "magnitude": None} if kind == "off" else {}
    optimizer, other = (kit.guide(m, kit.adamw, "no source" if off else kind, **off) for m in (model, twin))
    for step in range(4):
        calls: list[Tensor] = []

        def closure(step: int = step, calls: list[Tensor] = calls) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = kit.loss_of(model, kit.batch(step))
            loss.backward()
            calls.append(loss)
            return loss

        with torch.no_grad():
            returned = optimizer.step(closure)
            assert not torch.is_grad_enabled()
        assert len(calls) == 1
        assert returned is calls[0]
        kit.train(twin, other, [step])
    kit.assert_same(kit.snapshot(model, optimizer), kit.snapshot(twin, other))
    if kind != "off":
        assert optimizer.metrics()["steps"] == 4


def test_i23_closure_may_be_given_by_name_and_return_anything() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.sgd)

    def closure() -> str:
        kit.give_gradients(model, 0)
        return "a loss"

    assert optimizer.step(closure=closure) == "a loss"
    assert optimizer.step(None) is None
    assert optimizer.step() is None


def test_i23_an_error_in_the_closure_changes_nothing() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw, "on update")
    kit.train(model, optimizer, range(2))
    before = kit.snapshot(model, optimizer)

    def closure() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(closure)
    kit.assert_same(kit.snapshot(model, optimizer), before)


def test_i23_lbfgs_is_refused_with_the_reason() -> None:
    with pytest.raises(TypeError, match=r"LBFGS.*closure.*first-order"):
        GradGuide(LBFGS(kit.net().parameters()), direction=Direction())


@pytest.mark.parametrize("kind", [*kit.KINDS, "off"])
def test_i27_hooks_of_gradguide_and_of_the_base_run_once_each(kind: str) -> None:
    model = kit.net()
    off: dict[str, Any] = {"direction": None, "magnitude": None} if kind == "off" else {}
    optimizer = kit.guide(model, kit.sgd, "no source" if off else kind, **off)
    seen: list[tuple[str, bool, float]] = []

    def note(label: str, owner: Optimizer) -> Any:
        def hook(opt: Optimizer, args: Any, kwargs: Any) -> None:
            seen.append((label, opt is owner, norm()))

        return hook

    def norm() -> float:
        return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())

    optimizer.register_step_pre_hook(note("pre", optimizer))
    optimizer.register_step_post_hook(note("post", optimizer))
    optimizer.base.register_step_pre_hook(note("base pre", optimizer.base))
    optimizer.base.register_step_post_hook(note("base post", optimizer.base))
    for step in range(3):
        seen.clear()
        kit.give_gradients(model, step, scale=10.0 if step < 2 else 1000.0)
        received = norm()
        optimizer.step()
        assert [label for label, _, _ in seen] == ["pre", "base pre", "base post", "post"]
        assert all(owned for _, owned, _ in seen)
        assert seen[0][2] == received, "GradGuide's hook sees the gradient as received"
        if kind != "off" and step == 2:
            assert seen[1][2] < received, "the base's hook sees it guided"


def test_i27_global_hooks_run_for_both() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.sgd)
    seen: list[tuple[str, Optimizer]] = []
    handles = [
        register_optimizer_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", opt))),
        register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append(("post", opt))),
    ]
    try:
        kit.train(model, optimizer, [0])
    finally:
        for handle in handles:
            handle.remove()
    base = optimizer.base
    expected = [("pre", optimizer), ("pre", base), ("post", base), ("post", optimizer)]
    assert [label for label, _ in seen] == [label for label, _ in expected]
    assert all(found is owner for (_, found), (_, owner) in zip(seen, expected, strict=True))


def test_i27_a_pre_hook_that_changes_the_arguments_is_obeyed() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.sgd)
    kit.give_gradients(model, 0)

    def replace(opt: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return (opt, lambda: 42.0), {}

    optimizer.register_step_pre_hook(replace)
    assert optimizer.step() == 42.0


def test_i27_state_dict_hooks_run_once() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw)
    kit.train(model, optimizer, [0])
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda opt, state: seen.append("post") or {**state, "extra": 1})  # type: ignore[func-returns-value]
    optimizer.base.register_state_dict_post_hook(lambda opt, state: seen.append("base"))
    assert optimizer.state_dict()["extra"] == 1
    assert seen == ["pre", "base", "post"]


def test_i27_removed_hooks_are_silent() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.sgd)
    seen: list[int] = []
    handle = optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(1))
    kit.train(model, optimizer, [0])
    handle.remove()
    kit.train(model, optimizer, [1])
    assert seen == [1]


class Averaging(Optimizer):
    """A wrapper like torch's PostLocalSGDOptimizer: it does not call ``Optimizer.__init__``, and has no hooks."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


def test_i27_a_base_without_hook_dicts_is_guided() -> None:
    model, twin = kit.net(), kit.net()
    kit.train(model, GradGuide(Averaging(kit.adamw(model.parameters()))), range(3))
    kit.train(twin, GradGuide(kit.adamw(twin.parameters())), range(3))
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(twin))
