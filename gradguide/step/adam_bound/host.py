"""Prove before a step of Adam on a CPU that its update is within the bound, from the state that the host reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide.step.adam_bound import ratio
from gradguide.step.buckets import Bucket

__all__ = ["AdamBound"]


class AdamBound:
    """The largest ratio r of each group, from step to step, for the parameters of one plan.

    The ratios are in one of three states:

    - "unknown": the next :meth:`update_is_bounded` measures them.
    - "ahead": :meth:`update_is_bounded` has advanced them by the step that follows.
    - "current": :meth:`after_step` has recorded that this step was made. They are valid until a moment is another
      tensor, or is written by anything but the base's step. Writes through ``Tensor.data`` are not detected.
    """

    def __init__(self) -> None:
        self._ratios: Literal["unknown", "ahead", "current"] = "unknown"
        self._squares: dict[int, float] = {}  # r^2 by group
        self._scales: dict[int, tuple[float, float]] = {}
        self._moments, self._parameters = ratio.Watch(), ratio.Watch()
        self._parameters_finite = False

    @torch.no_grad()
    def update_is_bounded(self, base: Optimizer, buckets: Sequence[Bucket], lengths: Tensor, max_update: float) -> bool:
        """Return whether the next step of the base is proven to stay within the bound.

        Args:
            base: its step must follow this call, and :meth:`after_step` must follow that step.
            buckets: parameters on a CPU, with the gradients that the base reads.
            lengths (Tensor): shape [S], norms of these gradients.
            max_update (float): see :class:`gradguide.Magnitude`.
        """
        settings = ratio.settings_of(base, buckets)
        current, self._ratios = self._ratios == "current", "unknown"
        if settings is None or not float(lengths.max()) < ratio.LARGEST:
            return False
        states = ratio.states_of(base, buckets)
        groups = [group for bucket in buckets for group in bucket.groups]
        moments, scales = ratio.moments_of(states), ratio.scales_of(settings)
        if scales != self._scales or not current or not self._moments.unchanged(moments):
            # If r^2 grows too large over many steps, measuring does not pay.
            steady = [each.steady for each in settings.values()]
            if moments and not ratio.within(settings.values(), steady, [1.0] * len(steady), max_update):
                return False
            self._scales, self._squares = scales, _measured_squares(states, groups, settings)
        for group, each in settings.items():
            self._squares[group] = (each.growth * self._squares[group] + each.gained) * ratio.ROUNDED
        self._ratios = "ahead"
        values = ratio.values_of(buckets)
        self._parameters_finite = self._parameters_finite and self._parameters.unchanged(values)
        corrections = _corrections(states, groups, settings)
        if not ratio.within(settings.values(), [self._squares[group] for group in settings], corrections, max_update):
            return False
        if not self._parameters_finite:
            # A scope with a parameter that is not finite has no length: it must return to its values before the step.
            self._parameters_finite = all(float(value.abs().max()) < ratio.LARGEST for value in values if value.numel())
        return self._parameters_finite

    def after_step(self, base: Optimizer, buckets: Sequence[Bucket]) -> None:
        """Record the state after the base's step, so that later writes by anything else are detected."""
        if self._ratios == "ahead":
            self._ratios = "current"
            self._moments.mark(ratio.moments_of(ratio.states_of(base, buckets)))
            self._parameters.mark(ratio.values_of(buckets))


def _measured_squares(
    states: Sequence[dict[str, Any]], groups: Sequence[int], settings: dict[int, ratio.Settings]
) -> dict[int, float]:
    """Return the largest r^2 of each group; infinity if a moment is NaN or a second moment is negative."""
    squares = dict.fromkeys(settings, 0.0)
    for state, group in zip(states, groups, strict=True):
        largest = float(ratio.largest_ratio(state, settings[group])) if ratio.moments_of([state]) else 0.0
        squares[group] = max(squares[group], math.inf if math.isnan(largest) else largest * largest * ratio.ROUNDED)
    return squares


def _corrections(
    states: Sequence[dict[str, Any]], groups: Sequence[int], settings: dict[int, ratio.Settings]
) -> list[float]:
    """Return the largest ``sqrt(1 - b2^t) / (1 - b1^t)`` of each group in its next step t; infinity if t is below 1."""
    steps: dict[int, set[float]] = {group: set() for group in settings}
    for state, group in zip(states, groups, strict=True):
        steps[group].add(float(state["step"]) + 1 if state else 1.0)
    return [
        max(math.sqrt(1 - each.second**t) / (1 - each.first**t) if t >= 1 else math.inf for t in steps[group])
        for group, each in settings.items()
    ]
