"""The base optimizer's momentum, used as the running direction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Adamax, NAdam, Optimizer, RAdam

from gradguide.ops.row import Row, scopes_of
from gradguide.step.buckets import Bucket

__all__ = ["check_momentum", "ema_coefficients_by_scope", "momentum_buffers"]

# AdamW is a subclass of Adam in recent versions of torch.
_AVERAGING = (Adam, NAdam, RAdam, Adamax)


def check_momentum(base: Optimizer, groups: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError unless ``base`` stores a running average of these groups' gradients in a supported form."""
    if isinstance(base, (*_AVERAGING, torch.optim.AdamW)):
        return
    if isinstance(base, SGD) and all(group.get("momentum", base.defaults.get("momentum")) != 0 for group in groups):
        return
    raise ValueError(
        "share_momentum=True reads the momentum of Adam, AdamW, NAdam, RAdam, Adamax or SGD(momentum > 0), found "
        f"{type(base).__name__}; use share_momentum=False"
    )


def momentum_buffers(base: Optimizer, parameters: Iterable[Tensor]) -> list[Tensor | None]:
    """Return the momentum of each parameter, in the parameter's shape; None before its first step."""
    name = "momentum_buffer" if isinstance(base, SGD) else "exp_avg"
    states: dict[Tensor, dict[str, Any]] = base.state
    found = [states.get(parameter, {}).get(name) for parameter in parameters]
    return [momentum if isinstance(momentum, Tensor) else None for momentum in found]


def _ema_coefficients(base: Optimizer, group: dict[str, Any], parameters: Iterable[Tensor]) -> tuple[float, float]:
    """Return decay and gain of the momentum of these parameters of a group: ``m <- decay * m + gain * g``.

    In SGD's first step the gain is 1.
    """
    if isinstance(base, SGD):
        started = any(momentum is not None for momentum in momentum_buffers(base, parameters))
        return float(group["momentum"]), 1.0 - float(group["dampening"]) if started else 1.0
    decay = float(group["betas"][0])
    return decay, 1.0 - decay


def ema_coefficients_by_scope(
    base: Optimizer, buckets: Sequence[Bucket], rows: Sequence[Sequence[Row | None]], gram: Tensor
) -> tuple[Tensor, Tensor]:
    """Return decay and gain of the base's momentum, each [S], from the first parameter of each scope.

    Args:
        base: the base optimizer.
        buckets, rows: the buckets of the step, and their rows.
        gram (Tensor): shape [S, R, R], for its device and dtype.
    """
    members: dict[int, list[Tensor]] = {}
    firsts: dict[int, tuple[int, int]] = {}  # position and group of the first parameter
    for bucket, these in zip(buckets, rows, strict=True):
        for scope, tensors in enumerate(scopes_of(these)):
            if tensors:
                first = bucket.positions[tensors.start], bucket.groups[tensors.start]
                firsts[scope] = min(first, firsts.get(scope, first))
                members.setdefault(scope, []).extend(bucket.parameters[tensors.start : tensors.stop])
    found = {s: _ema_coefficients(base, base.param_groups[firsts[s][1]], own) for s, own in members.items()}
    # Without a gradient on this rank nothing is added to the average, so the coefficients do not matter.
    decays, gains = zip(*(found.get(scope, (1.0, 0.0)) for scope in range(gram.shape[0])), strict=True)
    # Filled on the device: a copy from the host would synchronize.
    return torch.cat([gram.new_full((1,), d) for d in decays]), torch.cat([gram.new_full((1,), g) for g in gains])
