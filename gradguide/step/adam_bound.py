"""Prove before a step of Adam that its update is within the bound, so that no pass has to measure it.

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

Rounding in float32 is covered by slack. Where v underflows, ``(1 - b2) e^2`` is far larger than what is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from gradguide.base_checks import is_plain_adam
from gradguide.step.buckets import Bucket
from gradguide.utils.constants import LEAST_LENGTH

__all__ = ["AdamBound"]

ROUNDED = 1 + 2**-17
"""Factor on r^2 at each step for rounding, far above that of float32."""

MARGIN = 1 - 1e-3
"""Share of the bound that the proof uses. The rest is for the rounding of measured lengths."""

WRITTEN = 4 * torch.finfo(torch.float32).eps
"""Rounding of the new parameters, relative to them."""

LEAST_LOST = 1e-35
"""Smallest ``(1 - b2) e^2`` beside which nothing is lost to underflow, with denormals flushed to zero."""

LARGEST = 1e15
"""Largest gradient and parameter for which no sum overflows."""

PIECE = 1 << 20
"""Number of elements that are measured together."""

_WIDE = {torch.float32, torch.float64}


@dataclass(frozen=True, slots=True)
class _Settings:
    """Settings of a group that the bound depends on."""

    lr: float
    first: float
    second: float
    eps: float
    decay: float

    @property
    def kept(self) -> float:
        """The factor of r^2 in a step."""
        return self.first**2 / self.second if self.first else 0.0

    @property
    def gained(self) -> float:
        """The addition to r^2 in a step."""
        return (1 - self.first) ** 2 / (1 - self.second)

    def limit(self, square: float, correction: float) -> float:
        """Return ``A / f`` for a squared ratio and the correction of both averages' bias."""
        return self.lr * math.sqrt(square) * correction / LEAST_LENGTH


class AdamBound:
    """The ratios r of the groups, from step to step, for the parameters of one plan.

    They are measured anew if a moment is another tensor, or was written by anything but the base's step. Writes through
    ``Tensor.data`` are not noticed.
    """

    def __init__(self) -> None:
        self._squares: dict[int, float] = {}
        self._scales: dict[int, tuple[float, float]] = {}
        self._moments, self._parameters = _Watch(), _Watch()
        # Whether the ratios are those of a step that follows, and those of the state that the last step left.
        self._pending = self._tracked = False
        self._finite = False

    @torch.no_grad()
    def holds(self, base: Optimizer, buckets: Sequence[Bucket], lengths: Tensor, max_update: float) -> bool:
        """Return whether the bound cannot act in the step that the base makes next.

        Args:
            base: its step must follow this call, and :meth:`made` that step.
            buckets: parameters on a CPU, with the gradients that the base reads.
            lengths (Tensor): shape [S], norms of these gradients.
            max_update (float): see :class:`gradguide.Magnitude`.
        """
        settings = _settings(base, buckets)
        tracked, self._tracked, self._pending = self._tracked, False, False
        if settings is None or not float(lengths.max()) < LARGEST:
            return False
        states: list[dict[str, Any]] = [base.state.get(p, {}) for bucket in buckets for p in bucket.parameters]
        groups = [group for bucket in buckets for group in bucket.groups]
        moments = _moments(states)
        scales = {group: (each.second, each.eps) for group, each in settings.items()}
        if scales != self._scales or not tracked or not self._moments.unchanged(moments):
            # In the long run r^2 is gained / (1 - kept). If that is too large, measuring does not pay.
            steady = [each.gained / (1 - each.kept) if each.kept < 1 else math.inf for each in settings.values()]
            if moments and not _within(settings.values(), steady, [1.0] * len(steady), max_update):
                return False
            self._scales, self._squares = scales, _measured_squares(states, groups, settings)
        for group, each in settings.items():
            self._squares[group] = (each.kept * self._squares[group] + each.gained) * ROUNDED
        self._pending = True
        corrections = _corrections(states, groups, settings)
        if not _within(settings.values(), [self._squares[group] for group in settings], corrections, max_update):
            return False
        values = [value for bucket in buckets for value in bucket.values]
        if not (self._finite and self._parameters.unchanged(values)):
            # A scope with an element that is not finite has no length, and is not stepped.
            self._finite = all(float(value.abs().max()) < LARGEST for value in values if value.numel())
        return self._finite

    def made(self, base: Optimizer, buckets: Sequence[Bucket]) -> None:
        """Take note of the state that the base's step left, if :meth:`holds` follows the ratios."""
        if not self._pending:
            return
        self._tracked, self._pending = True, False
        self._moments.mark(_moments([base.state.get(p, {}) for bucket in buckets for p in bucket.parameters]))
        self._parameters.mark([value for bucket in buckets for value in bucket.values])


class _Watch:
    """Detects other tensors in a list, and writes to its tensors."""

    def __init__(self) -> None:
        self._refs: list[ref[Tensor]] = []
        self._versions: list[int] = []

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are the marked tensors, with the values they had then."""
        return self._same(tensors) and [tensor._version for tensor in tensors] == self._versions

    def mark(self, tensors: Sequence[Tensor]) -> None:
        """Remember these tensors and their versions."""
        if not self._same(tensors):
            self._refs = list(map(ref, tensors))
        self._versions = [tensor._version for tensor in tensors]

    def _same(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self._refs) and all(
            kept() is tensor for kept, tensor in zip(self._refs, tensors, strict=True)
        )


def _within(
    settings: Iterable[_Settings], squares: Iterable[float], corrections: Iterable[float], max_update: float
) -> bool:
    """Return whether ``A / f + B`` of all groups is within the bound. False for NaN."""
    each = list(zip(settings, squares, corrections, strict=True))
    room = max_update * MARGIN - WRITTEN - max(found.lr * found.decay for found, _, _ in each)
    # Not max(): it may drop NaN.
    return all(found.limit(square, correction) <= room for found, square, correction in each)


def _settings(base: Optimizer, buckets: Sequence[Bucket]) -> dict[int, _Settings] | None:
    """Return the settings of each group that steps; None if the proof does not cover the base, a group or a tensor."""
    if not is_plain_adam(base):
        return None
    if any(bucket.values[0].dtype not in _WIDE for bucket in buckets):
        return None
    found = {}
    for index in dict.fromkeys(group for bucket in buckets for group in bucket.groups):
        group = base.param_groups[index]
        decoupled = isinstance(base, AdamW) or group.get("decoupled_weight_decay", False)
        first, second = map(float, group["betas"])
        each = _Settings(
            float(group["lr"]), first, second, float(group["eps"]), float(group["weight_decay"]) if decoupled else 0.0
        )
        if second <= 0 or not ((1 - second) * each.eps) ** 2 > LEAST_LOST:
            return None
        if not (each.lr >= 0 and each.decay >= 0):  # also where one is NaN
            return None
        found[index] = each
    return found


def _moments(states: Sequence[dict[str, Any]]) -> list[Tensor]:
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    return [state[name] for state in states if state for name in names if name in state]


def _measured_squares(
    states: Sequence[dict[str, Any]], groups: Sequence[int], settings: dict[int, _Settings]
) -> dict[int, float]:
    """Return the largest ``m^2 / V`` of each group; infinity if a moment is NaN or a second moment is negative."""
    squares = dict.fromkeys(settings, 0.0)
    for state, group in zip(states, groups, strict=True):
        moments = _moments([state])
        if not {moment.dtype for moment in moments} <= _WIDE:
            squares[group] = math.inf
            continue
        least = settings[group].eps * math.sqrt(1 - settings[group].second)
        for first, second, *greatest in zip(*(moment.reshape(-1).split(PIECE) for moment in moments), strict=True):
            # The root of a negative moment is NaN.
            ratios = first.abs() / torch.hypot(second.sqrt(), second.new_tensor(least))
            ratio = float(ratios.max()) if len(ratios) else 0.0
            if math.isnan(ratio) or any(bool(each.isnan().any()) for each in greatest):
                ratio = math.inf
            squares[group] = max(squares[group], ratio * ratio * ROUNDED)
    return squares


def _corrections(
    states: Sequence[dict[str, Any]], groups: Sequence[int], settings: dict[int, _Settings]
) -> list[float]:
    """Return the largest ``sqrt(1 - b2^t) / (1 - b1^t)`` of each group in its next step t; infinity if t is below 1."""
    steps: dict[int, set[float]] = {group: set() for group in settings}
    for state, group in zip(states, groups, strict=True):
        steps[group].add(float(state["step"]) + 1 if state else 1.0)
    return [
        max(math.sqrt(1 - each.second**t) / (1 - each.first**t) if t >= 1 else math.inf for t in steps[group])
        for group, each in settings.items()
    ]
