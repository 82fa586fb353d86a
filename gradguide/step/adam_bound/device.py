"""Prove before a fused step of Adam on a device that its update is within the bound, without a host synchronization.

The host does not know the number of steps that the device has made, so the proof is for every number of them. It needs
three numbers of the state once: the ratio of the moments, the largest parameter and the smallest step number. They are
measured on the device and copied in the background. Until the copy arrives, and during the capture of a CUDA graph,
nothing is proven.
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
from gradguide.step.adam_bound import ratio
from gradguide.step.buckets import Bucket

__all__ = ["DeviceAdamBound", "largest_correction"]

PAYS = 1 << 18
"""Smallest mean number of elements per tensor for which the host's checks take less time than the pass they save. The
checks take about a microsecond per tensor. The pass moves 20 bytes per element."""

SLOWEST = 0.999
"""Largest beta1 for which the bias correction is computed."""


class DeviceAdamBound:
    """Prove the bound for the parameters of one plan, from numbers of Adam's state.

    - The first call measures the numbers. They are valid until a moment or a parameter is another tensor, or is
      written by anything but the step. Writes through ``Tensor.data`` are not detected.
    - After such a write the numbers are dropped. They are measured again once a step was made without one: if every
      step has such writes, measuring does not pay.
    """

    def __init__(self) -> None:
        self._watch = ratio.Watch()
        self._scales: dict[int, tuple[float, float]] = {}
        self._numbers: _HostCopy | None = None  # None if dropped
        # The largest steady r^2 of each group since the numbers were measured. r^2 is at most this or the measured one.
        self._steady: dict[int, float] = {}
        # The tensors to watch from the next step on; empty if the call before it returned early.
        self._tensors: list[Tensor] = []

    @torch.no_grad()
    def update_is_bounded(self, base: Optimizer, buckets: Sequence[Bucket], magnitude: Magnitude | None) -> bool:
        """Return whether the next step is proven to stay within the bound, for all gradients.

        Args:
            base: its state must exist, without amsgrad. The step must follow this call, and :meth:`after_step` must
                follow that step.
            buckets: the parameters, on one device.
            magnitude: the bound of the update, and that of the gradient.
        """
        self._tensors = []
        if magnitude is None or magnitude.max_update is None or not magnitude.max_norm < ratio.LARGEST:
            return False
        if sum(sum(bucket.elements) for bucket in buckets) < PAYS * sum(len(bucket.values) for bucket in buckets):
            return False
        settings = ratio.settings_of(base, buckets)
        if settings is None:
            return False
        groups = list(settings.values())
        corrections = [largest_correction(each.first, each.second) for each in groups]
        if not ratio.within(groups, [each.steady for each in groups], corrections, magnitude.max_update):
            return False
        device = buckets[0].values[0].device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        numbers = self._numbers_of(base, buckets, settings)
        if numbers is None:
            return False
        largest, parameters, step = numbers
        squares = [max(self._steady[group], largest * largest * ratio.ROUNDED) for group in settings]
        if not (largest < math.inf and parameters < ratio.LARGEST and step >= 0):  # also where one is NaN
            return False
        return ratio.within(groups, squares, corrections, magnitude.max_update)

    def _numbers_of(
        self, base: Optimizer, buckets: Sequence[Bucket], settings: dict[int, ratio.Settings]
    ) -> list[float] | None:
        """Return the numbers of the present state; None if they were dropped, or have not arrived."""
        scales = ratio.scales_of(settings)
        tensors = [*ratio.moments_of(ratio.states_of(base, buckets)), *ratio.values_of(buckets)]
        unchanged = scales == self._scales and self._watch.unchanged(tensors)
        if not self._scales or (unchanged and self._numbers is None):
            self._numbers, self._steady = _HostCopy(_measured(base, buckets, settings)), {}
        elif not unchanged:
            self._numbers = None
        self._scales, self._tensors = scales, tensors
        for group, each in settings.items():
            self._steady[group] = max(self._steady.get(group, 0.0), each.steady)
        return None if self._numbers is None else self._numbers.read()

    def after_step(self) -> None:
        """Record the state after the step, so that later writes by anything else are detected."""
        if self._tensors:
            self._watch.mark(self._tensors)
            self._tensors = []


class _HostCopy:
    """Numbers on a device, copied to the host in the background."""

    def __init__(self, numbers: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.device.type == "cuda":
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float] | None:
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


def _measured(base: Optimizer, buckets: Sequence[Bucket], settings: dict[int, ratio.Settings]) -> Tensor:
    """Return the largest ratio r, the largest absolute parameter and the smallest step number: Tensor [3], float64."""
    ratios, steps = [], []
    largest: list[Tensor] = []
    for bucket in buckets:
        for parameter, group in zip(bucket.parameters, bucket.groups, strict=True):
            state = base.state[parameter]
            ratios.append(ratio.largest_ratio(state, settings[group]))
            steps.append(state["step"].double())
        filled = [value for value in bucket.values if value.numel()]
        if filled:
            largest += torch._foreach_norm(filled, math.inf)
    parameters = torch.stack([each.double() for each in largest]).max() if largest else torch.zeros_like(steps[0])
    # Maximum and minimum of NaN are NaN.
    return torch.stack([torch.stack(ratios).max(), parameters, torch.stack(steps).min()])
