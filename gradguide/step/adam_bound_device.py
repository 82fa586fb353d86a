"""Prove before a fused step of Adam on a device that its update is within the bound, without a host synchronization.

The proof is in :mod:`gradguide.step.adam_ratio`. The host does not know the number of steps that the device has made,
so the proof is for every number of them. It needs the state once: the moments' ratio, the smallest step number, and
that the parameters are finite. They are measured on the device and copied in the background. Until the copy has
arrived, and while a CUDA graph is captured, nothing is proven.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import count

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide.rules.magnitude import Magnitude
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

__all__ = ["DeviceAdamBound", "largest_correction"]

PAYS = 1 << 18
"""Smallest mean number of elements per tensor for which the host's checks take less time than the pass they save. The
checks take about a microsecond per tensor. The pass moves 20 bytes per element."""

SLOWEST = 0.999
"""Largest beta1 for which the correction of the bias is computed."""


class DeviceAdamBound:
    """Prove the bound for the parameters of one plan, from numbers of Adam's state.

    The state is measured once. If a moment or a parameter is another tensor, or was written by anything but the step,
    it is measured anew after a step without such writes: where every step has some, measuring never pays. Writes
    through ``Tensor.data`` are not noticed.
    """

    def __init__(self) -> None:
        self._watch = Watch()
        self._scales: dict[int, tuple[float, float]] = {}
        self._copy: _Copy | None = None
        # The largest steady r^2 of each group since the copy: r^2 stays below it and the measured one.
        self._steady: dict[int, float] = {}
        # The tensors whose state the copy has; empty if it is not followed.
        self._tensors: list[Tensor] = []

    @torch.no_grad()
    def holds(self, base: Optimizer, buckets: Sequence[Bucket], magnitude: Magnitude | None) -> bool:
        """Return whether the bound cannot act in the step that is made next, whatever the gradients.

        Args:
            base: its state must exist, without amsgrad. The step must follow this call, and :meth:`made` that step.
            buckets: the parameters, on one device.
            magnitude: the bound of the update, and that of the gradient.
        """
        self._tensors = []
        if magnitude is None or magnitude.max_update is None or not magnitude.max_norm < LARGEST:
            return False
        if sum(sum(bucket.elements) for bucket in buckets) < PAYS * sum(len(bucket.values) for bucket in buckets):
            return False
        settings = settings_of(base, buckets)
        if settings is None:
            return False
        groups = list(settings.values())
        corrections = [largest_correction(each.first, each.second) for each in groups]
        if not within(groups, [each.steady for each in groups], corrections, magnitude.max_update):
            return False
        device = buckets[0].values[0].device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        tensors = _tensors_of(base, buckets)
        scales = {group: (each.second, each.eps) for group, each in settings.items()}
        unchanged = scales == self._scales and self._watch.unchanged(tensors)
        if not self._scales or (unchanged and self._copy is None):
            self._copy, self._steady = _Copy(_measured(base, buckets, settings)), {}
        elif not unchanged:
            self._copy = None
        self._scales = scales
        for group, each in settings.items():
            self._steady[group] = max(self._steady.get(group, 0.0), each.steady)
        self._tensors = tensors
        found = None if self._copy is None else self._copy.numbers()
        if found is None:
            return False
        ratio, parameters, step = found
        squares = [max(self._steady[group], ratio * ratio * ROUNDED) for group in settings]
        if not (ratio < math.inf and parameters < LARGEST and step >= 0):  # also where one is NaN
            return False
        return within(groups, squares, corrections, magnitude.max_update)

    def made(self) -> None:
        """Take note that the step was made, if :meth:`holds` follows the state."""
        if self._tensors:
            self._watch.mark(self._tensors)
            self._tensors = []


class _Copy:
    """Numbers on a device, copied to the host in the background."""

    def __init__(self, numbers: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.device.type == "cuda":
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(numbers.device))

    def numbers(self) -> list[float] | None:
        """Return the numbers; None if they have not arrived."""
        if self._copied is not None and not self._copied.query():
            return None
        found: list[float] = self._numbers.tolist()
        return found


@lru_cache(maxsize=64)
def largest_correction(first: float, second: float) -> float:
    """Return an upper bound of ``sqrt(1 - second^t) / (1 - first^t)`` over all t from 1 on."""
    if first > SLOWEST:
        return math.inf
    largest = 0.0
    for t in count(1):
        power = first**t
        largest = max(largest, math.sqrt(1 - second**t) / (1 - power))
        if power < 2**-30:
            return max(largest, 1 / (1 - power))  # for all larger t
    raise AssertionError


def _tensors_of(base: Optimizer, buckets: Sequence[Bucket]) -> list[Tensor]:
    """Return all moments and parameters."""
    states = [base.state[p] for bucket in buckets for p in bucket.parameters]
    return [*moments_of(states), *(value for bucket in buckets for value in bucket.values)]


def _measured(base: Optimizer, buckets: Sequence[Bucket], settings: dict[int, Settings]) -> Tensor:
    """Return the largest ratio r, the largest absolute parameter and the smallest step number: Tensor [3], float64."""
    ratios, steps = [], []
    largest: list[Tensor] = []
    for bucket in buckets:
        for parameter, group in zip(bucket.parameters, bucket.groups, strict=True):
            state = base.state[parameter]
            ratios.append(largest_ratio(state, settings[group]))
            steps.append(state["step"].double())
        filled = [value for value in bucket.values if value.numel()]
        if filled:
            largest += torch._foreach_norm(filled, math.inf)
    parameters = torch.stack([each.double() for each in largest]).max() if largest else torch.zeros_like(steps[0])
    # Maximum and minimum of NaN are NaN.
    return torch.stack([torch.stack(ratios).max(), parameters, torch.stack(steps).min()])
