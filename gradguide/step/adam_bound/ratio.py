"""Bound the length of an update of Adam by the settings of the groups and the ratio of the moments.

For Adam and AdamW each element of the update is at most ``lr * |m'| / (sqrt(v') + eps) + lr * decay * |p|``, where m'
and v' are the averages m and v over ``1 - beta1^t`` and ``1 - beta2^t``. amsgrad only raises v, and weight decay that
is not decoupled is part of the gradient.

**The ratio.** Let ``V = v + e^2`` with ``e = eps * sqrt(1 - beta2)``, and let r be the largest ``|m| / sqrt(V)`` of all
elements. A step sets ``m <- b1 m + (1 - b1) g`` and ``v <- b2 v + (1 - b2) g^2``, so that V becomes at least
``b2 V + (1 - b2) g^2``. By the inequality of Cauchy and Schwarz

    m_new^2 = ((b1 / sqrt(b2)) m / sqrt(V) * sqrt(b2 V) + (1 - b1) / sqrt(1 - b2) * sqrt(1 - b2) g)^2
           <= (b1^2 / b2 * r^2 + (1 - b1)^2 / (1 - b2)) * V_new.

The bracket is the new ``r^2``, for any gradient. It starts at 0 with the state. After t steps with the same betas this
is ``r^2 = (1 - b1)^2 / (1 - b2) * sum of (b1^2 / b2)^j over j < t``. Two gradient histories reach it: one spike after
zeros at ``b1 = 0``, and in general gradients that grow by ``b2 / b1`` at each step.

**The update.** ``sqrt(v') + eps >= sqrt(V) / sqrt(1 - b2^t)``, because ``(a + b)^2 >= a^2 + b^2`` and
``1 - b2^t >= 1 - b2``. So each element of the update is at most ``A + B |p|`` with ``B = lr * decay`` and
``A = lr * r * sqrt(1 - b2^t) / (1 - b1^t)``. In a scope of n elements its length is at most ``A sqrt(n) + B |p|``. The
bound is ``max_update * L`` with ``L = max(|p|, f sqrt(n))``, and ``A sqrt(n) + B |p| <= (A / f + B) * L``. So the bound
cannot act if ``A / f + B <= max_update``: neither parameters nor gradients are read.

Margins cover rounding in float32. Where v underflows, ``(1 - b2) e^2`` is far larger than the lost part of v.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from gradguide.base_checks import is_plain_adam
from gradguide.ops.tensors import same_objects
from gradguide.step.buckets import Bucket
from gradguide.utils.constants import LEAST_LENGTH

__all__ = [
    "LARGEST",
    "ROUNDED",
    "Settings",
    "Watch",
    "largest_ratio",
    "moments_of",
    "scales_of",
    "settings_of",
    "states_of",
    "values_of",
    "within",
]

ROUNDED = 1 + 2**-17
"""Factor on r^2 at each step for rounding, far above that of float32."""

_MARGIN = 1 - 1e-3
"""Share of the bound that the proof uses. The rest is for the rounding of measured lengths."""

_WRITTEN = 4 * torch.finfo(torch.float32).eps
"""Rounding of the new parameters, relative to them."""

_LEAST_LOST = 1e-35
"""Smallest ``(1 - b2) e^2`` that is far above underflow, with denormals flushed to zero."""

LARGEST = 1e15
"""Largest gradient and parameter for which no sum overflows."""

_PIECE = 1 << 20
"""Number of elements that are measured together."""

_WIDE = {torch.float32, torch.float64}


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a group that the bound depends on."""

    lr: float
    first: float
    second: float
    eps: float
    decay: float

    @property
    def growth(self) -> float:
        """The factor of r^2 in a step."""
        return self.first**2 / self.second if self.first else 0.0

    @property
    def gained(self) -> float:
        """The addition to r^2 in a step."""
        return (1 - self.first) ** 2 / (1 - self.second)

    @property
    def steady(self) -> float:
        """An upper bound of r^2 after any number of steps from 0: infinity if there is none."""
        growth = self.growth * ROUNDED
        return self.gained * ROUNDED / (1 - growth) if growth < 1 else math.inf

    def limit(self, square: float, correction: float) -> float:
        """Return ``A / f`` for a squared ratio and the correction of both averages' bias."""
        return self.lr * math.sqrt(square) * correction / LEAST_LENGTH


class Watch:
    """Detect whether a list has other tensors, or whether they were written. The tensors are not kept alive.

    Inference tensors have no version, so they count as changed.
    """

    def __init__(self) -> None:
        self._refs: list[ref[Tensor]] = []
        self._versions: list[int] = []

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are the marked tensors, with the values they had then."""
        return same_objects(self._marked(), tensors) and [tensor._version for tensor in tensors] == self._versions

    def mark(self, tensors: Sequence[Tensor]) -> None:
        """Store weak references to these tensors, and their versions."""
        try:
            self._versions = [tensor._version for tensor in tensors]
        except RuntimeError:  # of inference tensors
            tensors, self._versions = [], []
        if not same_objects(self._marked(), tensors):
            self._refs = list(map(ref, tensors))

    def _marked(self) -> list[Tensor | None]:
        return [each() for each in self._refs]


def within(
    settings: Iterable[Settings], squares: Iterable[float], corrections: Iterable[float], max_update: float
) -> bool:
    """Return whether ``A / f + B`` of all groups is within the bound. False for NaN."""
    each = list(zip(settings, squares, corrections, strict=True))
    room = max_update * _MARGIN - _WRITTEN - max(found.lr * found.decay for found, _, _ in each)
    # Not max(): it may drop NaN.
    return all(found.limit(square, correction) <= room for found, square, correction in each)


def settings_of(base: Optimizer, buckets: Sequence[Bucket]) -> dict[int, Settings] | None:
    """Return the settings of each group that steps; None if the proof does not cover the base, a group or a tensor."""
    if not is_plain_adam(base):
        return None
    if any(bucket.values[0].dtype not in _WIDE for bucket in buckets):
        return None
    found = {}
    for index in dict.fromkeys(group for bucket in buckets for group in bucket.groups):
        group = base.param_groups[index]
        if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
            return None  # reading it would synchronize
        decoupled = isinstance(base, AdamW) or group.get("decoupled_weight_decay", False)
        first, second = map(float, group["betas"])
        each = Settings(
            float(group["lr"]), first, second, float(group["eps"]), float(group["weight_decay"]) if decoupled else 0.0
        )
        if not (0 <= first < 1 and 0 < second < 1 and each.lr >= 0 and each.decay >= 0 and each.eps > 0):
            return None  # also where one is NaN
        if not ((1 - second) * each.eps) ** 2 > _LEAST_LOST:
            return None
        found[index] = each
    return found


def scales_of(settings: Mapping[int, Settings]) -> dict[int, tuple[float, float]]:
    """Return the settings of each group that the definition of r depends on: beta2 and eps."""
    return {group: (each.second, each.eps) for group, each in settings.items()}


def values_of(buckets: Sequence[Bucket]) -> list[Tensor]:
    """Return all parameters."""
    return [value for bucket in buckets for value in bucket.values]


def states_of(base: Optimizer, buckets: Sequence[Bucket]) -> list[dict[str, Any]]:
    """Return the base's state of each parameter, empty before its first step."""
    return [base.state.get(p, {}) for bucket in buckets for p in bucket.parameters]


def moments_of(states: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Return all moments in these states."""
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    return [state[name] for state in states if state for name in names if name in state]


def largest_ratio(state: dict[str, Any], settings: Settings) -> Tensor:
    """Return the largest ratio r of a parameter with state, 0-d: NaN if a moment is NaN, imprecise or negative."""
    moments = moments_of([state])
    device = moments[0].device
    if not {moment.dtype for moment in moments} <= _WIDE:
        return torch.full((), math.nan, dtype=torch.float64, device=device)
    least = torch.full((), settings.eps * math.sqrt(1 - settings.second), dtype=moments[0].dtype, device=device)
    largest = torch.zeros((), dtype=torch.float64, device=device)
    for first, second, *greatest in zip(*(moment.reshape(-1).split(_PIECE) for moment in moments), strict=True):
        if len(first):
            # The root of a negative moment is NaN, and so is the maximum.
            ratios = first.abs() / torch.hypot(second.sqrt(), least)
            for each in greatest:
                ratios = ratios.where(~each.isnan(), math.nan)
            largest = torch.maximum(largest, ratios.max().double())
    return largest
