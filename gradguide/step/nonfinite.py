"""Skip steps with NaN or Inf gradients.

A step is skipped in one of four ways:

- GradScaler does not call ``step()``. Nothing in this library runs, and nothing is counted.
- The host: :func:`skip_on_host` reads one flag from the device. ``Progress.skipped_on_host`` counts the step.
- ``found_inf``: a fused base on CUDA reads this flag on the device, see :func:`step_base`.
- ``Decision.go``: the kernel that makes the base's step in the combining pass reads this flag.

In the last two cases the host does not wait, there is no warning, and ``rules.decide`` counts the step on the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from gradguide.base_checks import closure_error
from gradguide.ops.tensors import all_finite
from gradguide.step.engine import StepState
from gradguide.step.momentum import momentum_buffers

__all__ = [
    "POLICIES",
    "SKIPS_BEFORE_WARNING",
    "skip_on_host",
    "step_base",
    "uses_found_inf",
    "warn_skipped",
    "warn_undone",
]

POLICIES = ("skip", "raise")

SKIPS_BEFORE_WARNING = 5
"""Skipped steps in a row that trigger a warning. Fewer also occur in healthy runs."""


def skip_on_host(state: StepState, base: Optimizer, policy: str, names: Mapping[Tensor, str]) -> bool:
    """Return whether the host skips this step. This synchronizes with the host, unless the base skips by itself.

    Raises:
        FloatingPointError: the gradient is not finite and the policy is "raise".
    """
    left_to_base = uses_found_inf(state, base, policy) and not _starts_momentum(state, base)
    if left_to_base or bool(state.finite):
        return False
    if policy == "raise":
        raise FloatingPointError(f"{_where(state, names)} NaN or Inf; nothing was changed")
    return True


def warn_skipped(state: StepState, skipped: int, names: Mapping[Tensor, str]) -> None:
    """Warn that ``skipped`` steps in a row were skipped.

    Warns:
        UserWarning: names the first parameter whose gradient is not finite.
    """
    warnings.warn(
        f"the last {skipped} steps were skipped: {_where(state, names)} NaN or Inf. Nothing was trained in them; "
        'metrics()["skipped"] counts them, and nonfinite="raise" makes them an error',
        UserWarning,
        stacklevel=7,  # the caller of GradGuide.step, which torch wraps three times
    )


def warn_undone(base: Optimizer, undone: int) -> None:
    """Warn that the bound has undone ``undone`` updates in a row, which were not finite.

    Warns:
        UserWarning: names what makes them so in float16, or else the base's state.
    """
    half = any(p.dtype == torch.float16 for group in base.param_groups for p in group["params"])
    eps = min((group["eps"] for group in base.param_groups if isinstance(group.get("eps"), float)), default=None)
    cause = (
        f"In float16 an eps of {eps:g} and the squares of small gradients can round to 0, and {type(base).__name__} "
        "divides by them: pass eps=1e-4, or train parameters in float32 (torch.autocast) or bfloat16"
        if half and eps is not None and eps < 1e-4
        else "Its state or the parameters may hold NaN or Inf, or its rate is too high for the parameters' dtype"
    )
    warnings.warn(
        f"the last {undone} updates of {type(base).__name__} had NaN or Inf in a scope, and were undone there: these "
        f"parameters were not trained. {cause}",
        UserWarning,
        stacklevel=8,
    )


def step_base(state: StepState, base: Optimizer, policy: str) -> None:
    """Step the base. If it supports ``found_inf``, it skips the step itself when a gradient is not finite.

    Raises:
        TypeError: the base's step fails because it evaluates the closure itself.
    """
    flagged: Any = base
    uses_flag = uses_found_inf(state, base, policy)
    if uses_flag:
        flagged.found_inf = 1.0 - state.decided.go
    try:
        base.step()
    except Exception as error:
        if "closure" in str(error):
            raise TypeError(closure_error(base)) from error
        raise
    finally:
        if uses_flag:
            del flagged.found_inf


def uses_found_inf(state: StepState, base: Optimizer, policy: str) -> bool:
    """Return whether the base skips the step itself by a flag on the device, which avoids a host sync.

    Fused bases of torch support this for GradScaler. Wrappers of them, such as ZeroRedundancyOptimizer, have the same
    groups but do not pass the flag on. On the CPU, reading the flag costs nothing.
    """
    fused = all(group.get("fused") for group in base.param_groups)
    reads_flag = type(base).step.__module__.startswith("torch.optim.")
    on_cuda = state.span.gram.device.type == "cuda"
    return policy == "skip" and fused and reads_flag and on_cuda


def _starts_momentum(state: StepState, base: Optimizer) -> bool:
    """Return whether this step creates momentum of SGD. Fused, a skipped step would create it from unset memory.

    A flag of 0 does no harm, so only the host's check asks: it takes 50 microseconds for 300 parameters.
    """
    if not isinstance(base, SGD) or not any(group["momentum"] for group in base.param_groups):
        return False
    momentum = momentum_buffers(base, (p for bucket in state.plan.buckets for p in bucket.parameters))
    return any(each is None for each in momentum)


def _where(state: StepState, names: Mapping[Tensor, str]) -> str:
    bad = [
        (position, p)
        for bucket in state.plan.buckets
        for position, p, g in zip(bucket.positions, bucket.parameters, bucket.gradients, strict=True)
        if not g.isfinite().all()
    ]
    terms = [rows[-1] for rows in state.rows] if state.regularized else []
    if not bad and not all(bool(all_finite(row.tensors)) for row in terms if row is not None):
        return "the gradient of the regularizer, from the second evaluation of the closure, has"
    if not bad:
        other = "the gradient on another rank, or " if state.plan.sharded else ""
        return f"{other}the source gradient at the present parameters has"
    _, first = min(bad, key=itemgetter(0))
    which = names.get(first) or f"a parameter of shape {tuple(first.shape)}"
    return f"the gradient of {which}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''} has"
