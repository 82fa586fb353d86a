"""Variants of guided steps that the library does not have: another place of the pull, and a least update."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.language.model import Language
from gradguide import StructuredSource

__all__ = ["after_step", "at_least"]

Hooks = tuple[Callable[[], None], Callable[[int], None]]
"""Functions to call before the step, and after it with its number."""


def after_step(model: Language, source: StructuredSource, optimizer: torch.optim.Optimizer, weight: float) -> Hooks:
    """Apply the pull after the base's step, with Adam's preconditioner, as AdamW applies weight decay.

    The pull enters neither moment, and the gradient is not guided by it.
    """
    source = source.bound(model.model)
    named = dict(model.named)
    parameters: list[Tensor] = list(named.values())

    @torch.no_grad()
    def before() -> None:
        source.refresh(named, parameters)

    @torch.no_grad()
    def after(number: int) -> None:
        pulls = source.row(list(named), parameters).offset
        assert pulls is not None
        group = optimizer.param_groups[0]
        for parameter, pull in zip(parameters, pulls, strict=True):
            second = optimizer.state[parameter]["exp_avg_sq"] / (1.0 - group["betas"][1] ** number)
            parameter.addcdiv_(pull, second.sqrt_().add_(group["eps"]), value=-weight * group["lr"])

    return before, after


def at_least(parameters: Sequence[Tensor], least: float) -> Hooks:
    """Lengthen each update to ``least`` times the length of the parameters: a lower trust ratio (LAMB)."""
    copies = [torch.empty_like(p) for p in parameters]

    @torch.no_grad()
    def before() -> None:
        torch._foreach_copy_(copies, list(parameters))

    @torch.no_grad()
    def after(number: int) -> None:
        updates = torch._foreach_sub(list(parameters), copies)
        length = torch.stack(torch._foreach_norm(updates)).norm()
        wanted = least * torch.stack(torch._foreach_norm(copies)).norm()
        factor = torch.where((length > 0) & (length < wanted), wanted / length, 1.0)
        torch._foreach_mul_(updates, factor)
        torch._foreach_copy_(list(parameters), torch._foreach_add(updates, copies))

    return before, after
