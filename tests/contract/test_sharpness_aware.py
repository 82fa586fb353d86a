"""Optimizers that evaluate the closure within their own step (row 23) are rejected. The suggested fix works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from gradguide import Direction, GradGuide, Magnitude, guided
from tests.contract import kit


class Sharp(Optimizer):
    """Sharpness-aware minimization as in public implementations. It raises without a closure."""

    def __init__(self, params: Any, base: Callable[..., Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.inner = base(self.param_groups, **options)
        self.param_groups = self.inner.param_groups
        self._moves: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        held = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            self._moves[p] = p.grad * (self.param_groups[0]["rho"] / norm)
            p.add_(self._moves[p])
            p.grad = None

    @torch.no_grad()
    def second_step(self) -> None:
        for p, move in self._moves.items():
            p.sub_(move)
        self.inner.step()

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is not None, "Sharpness Aware Minimization requires closure, but it was not provided"
        with torch.enable_grad():
            closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Required(Optimizer):
    """Its signature requires a closure."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        return closure()


class Late(SGD):
    """Only its step requires a closure."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            raise RuntimeError("Late requires a closure")
        return closure()


def test_i23_bases_that_need_the_closure_are_refused_with_the_way_out() -> None:
    model = kit.net()
    for base in (Sharp(model.parameters(), SGD, lr=0.1), Required(model.parameters())):
        with pytest.raises(TypeError, match=rf"{type(base).__name__} evaluates the closure.*guided\(AdamW\)"):
            GradGuide(base, direction=Direction())


def test_i23_a_base_whose_step_alone_says_so_is_explained_when_it_fails() -> None:
    model = kit.net()
    optimizer = GradGuide(Late(model.parameters(), lr=0.1), direction=Direction())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = kit.loss_of(model, kit.batch(0))
        loss.backward()
        return loss

    with pytest.raises(TypeError, match="Late evaluates the closure") as caught:
        optimizer.step(closure)
    assert "requires a closure" in str(caught.value.__cause__)


def test_i23_the_way_out_guides_the_final_step() -> None:
    """The update is bounded, and otherwise that of the sharpness-aware optimizer."""
    for largest, bounded in ((1e-3, True), (1e3, False)):
        model, twin = kit.net(), kit.net()
        magnitude = Magnitude(max_norm=1e9, max_update=largest)
        inner = guided(SGD, direction=None, magnitude=magnitude)
        before = kit.parameters_of(model)
        for held, optimizer in (
            (model, Sharp(model.parameters(), inner, lr=0.5)),
            (twin, Sharp(twin.parameters(), SGD, lr=0.5)),
        ):

            def closure(held: nn.Module = held) -> None:
                held.zero_grad()
                kit.loss_of(held, kit.batch(0)).backward()

            optimizer.step(closure)
        moved = torch.cat([(p - b).reshape(-1) for p, b in zip(kit.parameters_of(model), before, strict=True)])
        length = torch.cat([b.reshape(-1) for b in before]).norm()
        if bounded:
            assert float(moved.norm() / length) == pytest.approx(1e-3, rel=1e-3)
        else:
            kit.assert_same(kit.parameters_of(model), kit.parameters_of(twin))
