"""What a gradient that is not finite does: the host leaves the step out, or a base that can does so by a flag."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradguide.guidance import Measured

__all__ = ["POLICIES", "step", "stops"]

POLICIES = ("skip", "raise")


def stops(measured: Measured, base: Optimizer, policy: str, names: Mapping[Tensor, str]) -> bool:
    """Whether this step is not to be made; the host waits for the answer unless it need not know.

    Raises:
        FloatingPointError: the gradient is not finite and the policy is "raise".
    """
    if _left_to_base(measured, base, policy) or bool(measured.finite):
        return False
    if policy == "raise":
        raise FloatingPointError(f"{_where(measured, names)} NaN or Inf; nothing was changed")
    return True


def step(measured: Measured, base: Optimizer, policy: str) -> None:
    """Step the base, which leaves its step out where that was left to it."""
    if not _left_to_base(measured, base, policy):
        base.step()
        return
    flagged: Any = base
    flagged.found_inf = 1.0 - measured.decided.go
    try:
        base.step()
    finally:
        del flagged.found_inf


def _left_to_base(measured: Measured, base: Optimizer, policy: str) -> bool:
    """Whether the base can itself leave a step out by a flag on the device, so that the host need not wait for it.

    Those are the fused bases, for GradScaler's sake. On the CPU reading the flag costs nothing.
    """
    fused = all(group.get("fused") for group in base.param_groups)
    return policy == "skip" and fused and measured.span.gram.device.type == "cuda"


def _where(measured: Measured, names: Mapping[Tensor, str]) -> str:
    bad = [
        p
        for bucket in measured.survey.buckets
        for p, g in zip(bucket.parameters, bucket.gradients, strict=True)
        if not g.isfinite().all()
    ]
    if not bad:
        other = "the gradient on another rank, or " if measured.survey.sharded else ""
        return f"{other}the source gradient at the present parameters has"
    which = names.get(bad[0]) or f"a parameter of shape {tuple(bad[0].shape)}"
    return f"the gradient of {which}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''} has"
