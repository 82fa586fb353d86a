"""Optimizers whose state has torch's names but other shapes, as in public optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.contract import kit

__all__ = ["SHAPED"]


class Descent(Optimizer):
    """Descent with learning rate 0.01 along the result of ``direction(gradient, state)``."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * self.direction(parameter.grad, self.state[parameter]))
        return loss

    def direction(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class PerTensor(Descent):
    """One second moment per tensor, as in Adam-mini and LARS-like optimizers."""

    def direction(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        square: Tensor = state.setdefault("exp_avg_sq", torch.zeros(()))
        square.lerp_(gradient.square().mean(), 0.1)
        return gradient / (square.sqrt() + 1e-3)


class Factored(Descent):
    """Second moments of rows and columns, as in Adafactor. Vectors have full second moments."""

    def direction(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        if gradient.dim() < 2:
            square: Tensor = state.setdefault("exp_avg_sq", torch.zeros_like(gradient))
            return gradient / (square.lerp_(gradient.square(), 0.1).sqrt() + 1e-3)
        rows: Tensor = state.setdefault("exp_avg_sq_row", torch.zeros(gradient.shape[:-1]))
        columns: Tensor = state.setdefault("exp_avg_sq", torch.zeros(gradient.shape[-1]))
        rows.lerp_(gradient.square().mean(-1), 0.1)
        columns.lerp_(gradient.square().mean(0), 0.1)
        return gradient / (rows.unsqueeze(-1) * columns / rows.mean()).sqrt().add(1e-3)


class LowRank(Descent):
    """A momentum in a subspace, as in GaLore, and other kinds of state: lists, numbers, None, nested dicts."""

    def direction(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        if not state:
            wide = gradient.shape[-1]
            state.update(
                exp_avg=torch.zeros(*gradient.shape[:-1], 2),
                projector={"matrix": torch.linspace(-1, 1, 2 * wide).reshape(wide, 2), "rank": 2},
                momentum_buffer=[torch.zeros(1), torch.zeros(2)],
                sum=None,
                prev=3,
            )
        projection: Tensor = state["projector"]["matrix"]
        average: Tensor = state["exp_avg"].lerp_(gradient @ projection, 0.1)
        return average.matmul(projection.T)


class LowRankAdam(torch.optim.Adam):
    """A subclass of torch's Adam whose first moment is a scalar."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("step", torch.zeros(()))  # Adam's loader reads it
                average = self.state[parameter].setdefault("exp_avg", torch.zeros(1))
                average.lerp_(parameter.grad.mean(), 0.1)
                parameter.sub_(group["lr"] * (parameter.grad + average))


class Named(torch.optim.SGD):
    """A state dict with parameter names as keys instead of numbers."""

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for group in state["param_groups"]:
            group["params"] = [f"p{key}" for key in group["params"]]
        return {**state, "state": {f"p{key}": entry for key, entry in state["state"].items()}}


class Global(Descent):
    """State that belongs to no parameter."""

    def direction(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        everywhere: Any = self.state
        norm = 0.5 * everywhere["shared"].get("norm", 0.0) + float(gradient.norm())
        everywhere["shared"]["norm"] = norm
        return gradient.div(1 + norm)


SHAPED: dict[str, kit.MakeBase] = {
    "per tensor": PerTensor,
    "factored": Factored,
    "low rank": LowRank,
    "subclass of Adam": LowRankAdam,
    "named keys": lambda params: Named(params, lr=0.1, momentum=0.9),
    "state of no parameter": Global,
}
