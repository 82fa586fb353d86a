"""Prove before a step of Adam on a CPU that its update is within the bound, so that no pass has to measure it.

The proof is in :mod:`gradguide.step.adam_ratio`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide.step.adam_ratio import (
    LARGEST,
    ROUNDED,
    Settings,
    Watch,
    largest_ratio,
    moments_of,
    settings_of,
    within,
)
from gradguide.step.buckets import Bucket

__all__ = ["AdamBound"]


class AdamBound:
    """The ratios r of the groups, from step to step, for the parameters of one plan.

    They are measured anew if a moment is another tensor, or was written by anything but the base's step. Writes through
    ``Tensor.data`` are not noticed.
    """

    def __init__(self) -> None:
        self._squares: dict[int, float] = {}
        self._scales: dict[int, tuple[float, float]] = {}
        self._moments, self._parameters = Watch(), Watch()
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
        settings = settings_of(base, buckets)
        tracked, self._tracked, self._pending = self._tracked, False, False
        if settings is None or not float(lengths.max()) < LARGEST:
            return False
        states: list[dict[str, Any]] = [base.state.get(p, {}) for bucket in buckets for p in bucket.parameters]
        groups = [group for bucket in buckets for group in bucket.groups]
        moments = moments_of(states)
        scales = {group: (each.second, each.eps) for group, each in settings.items()}
        if scales != self._scales or not tracked or not self._moments.unchanged(moments):
            # If r^2 is too large in the long run, measuring does not pay.
            steady = [each.steady for each in settings.values()]
            if moments and not within(settings.values(), steady, [1.0] * len(steady), max_update):
                return False
            self._scales, self._squares = scales, _measured_squares(states, groups, settings)
        for group, each in settings.items():
            self._squares[group] = (each.kept * self._squares[group] + each.gained) * ROUNDED
        self._pending = True
        values = [value for bucket in buckets for value in bucket.values]
        self._finite = self._finite and self._parameters.unchanged(values)
        corrections = _corrections(states, groups, settings)
        if not within(settings.values(), [self._squares[group] for group in settings], corrections, max_update):
            return False
        if not self._finite:
            # A scope with an element that is not finite has no length, and is not stepped.
            self._finite = all(float(value.abs().max()) < LARGEST for value in values if value.numel())
        return self._finite

    def made(self, base: Optimizer, buckets: Sequence[Bucket]) -> None:
        """Take note of the state that the base's step left, if :meth:`holds` follows the ratios."""
        if not self._pending:
            return
        self._tracked, self._pending = True, False
        self._moments.mark(moments_of([base.state.get(p, {}) for bucket in buckets for p in bucket.parameters]))
        self._parameters.mark([value for bucket in buckets for value in bucket.values])


def _measured_squares(
    states: Sequence[dict[str, Any]], groups: Sequence[int], settings: dict[int, Settings]
) -> dict[int, float]:
    """Return the largest r^2 of each group; infinity if a moment is NaN or a second moment is negative."""
    squares = dict.fromkeys(settings, 0.0)
    for state, group in zip(states, groups, strict=True):
        ratio = float(largest_ratio(state, settings[group])) if moments_of([state]) else 0.0
        squares[group] = max(squares[group], math.inf if math.isnan(ratio) else ratio * ratio * ROUNDED)
    return squares


def _corrections(states: Sequence[dict[str, Any]], groups: Sequence[int], settings: dict[int, Settings]) -> list[float]:
    """Return the largest ``sqrt(1 - b2^t) / (1 - b1^t)`` of each group in its next step t; infinity if t is below 1."""
    steps: dict[int, set[float]] = {group: set() for group in settings}
    for state, group in zip(states, groups, strict=True):
        steps[group].add(float(state["step"]) + 1 if state else 1.0)
    return [
        max(math.sqrt(1 - each.second**t) / (1 - each.first**t) if t >= 1 else math.inf for t in steps[group])
        for group, each in settings.items()
    ]
