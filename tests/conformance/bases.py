"""The base optimizers of the conformance tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.contract import kit

__all__ = ["BASES", "SHARING", "Lion", "net_for"]

optim = torch.optim


class Lion(Optimizer):
    """A typical third-party optimizer: a subclass with its own state, without foreach or other options."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if len(state) == 0:
                    state["step"] = 0
                    state["average"] = torch.zeros_like(parameter)
                average: Tensor = state["average"]
                slow, fast = group["betas"]
                update = (average * slow + parameter.grad * (1 - slow)).sign_()
                parameter.add_(update, alpha=-group["lr"])
                average.mul_(fast).add_(parameter.grad, alpha=1 - fast)
                state["step"] += 1
        return loss


def made(kind: Callable[..., Optimizer], **options: Any) -> kit.MakeBase:
    return lambda params: kind(params, **options)


BASES: dict[str, kit.MakeBase] = {
    "SGD": made(optim.SGD, lr=0.1),
    "SGD momentum": made(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": made(optim.Adam, lr=1e-2, amsgrad=True),
    "AdamW loop": made(optim.AdamW, lr=1e-2, foreach=False),
    "AdamW foreach": made(optim.AdamW, lr=1e-2, foreach=True),
    "AdamW fused": made(optim.AdamW, lr=1e-2, fused=True),
    "Adamax": made(optim.Adamax, lr=1e-2),
    "NAdam": made(optim.NAdam, lr=1e-2),
    "RAdam": made(optim.RAdam, lr=1e-2),
    "RMSprop": made(optim.RMSprop, lr=1e-2, centered=True, momentum=0.5),
    "Adagrad": made(optim.Adagrad, lr=1e-2, initial_accumulator_value=0.1),
    "Adadelta": made(optim.Adadelta, lr=0.5),
    "ASGD": made(optim.ASGD, lr=1e-2),
    "Rprop": made(optim.Rprop, lr=1e-2),
    "Adafactor": made(optim.Adafactor, lr=1e-2),
    "Lion": made(Lion, lr=1e-2),
}
if hasattr(optim, "Muon"):  # from torch 2.9 on
    BASES["Muon"] = made(optim.Muon, lr=1e-2)

# Bases whose momentum can be the direction, with the key of its state.
SHARING: dict[str, tuple[kit.MakeBase, str]] = {
    "SGD": (made(optim.SGD, lr=0.1, momentum=0.9), "momentum_buffer"),
    "SGD dampened": (made(optim.SGD, lr=0.1, momentum=0.8, dampening=0.3), "momentum_buffer"),
    "Adam": (made(optim.Adam, lr=1e-2), "exp_avg"),
    "AdamW": (made(optim.AdamW, lr=1e-2, betas=(0.8, 0.99)), "exp_avg"),
    "AdamW fused": (made(optim.AdamW, lr=1e-2, fused=True), "exp_avg"),
    "NAdam": (made(optim.NAdam, lr=1e-2), "exp_avg"),
    "RAdam": (made(optim.RAdam, lr=1e-2), "exp_avg"),
    "Adamax": (made(optim.Adamax, lr=1e-2), "exp_avg"),
}


def net_for(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    """Return the test model, without biases for Muon, which accepts only matrices."""
    return kit.net(bias=name != "Muon", dtype=dtype)
