"""Progress of a run: counts of steps, the last step's record, and warnings already given."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide.base_checks import NO_GRADIENTS
from gradguide.ops.tensors import wide_dtype
from gradguide.recording.history import History
from gradguide.step import nonfinite
from gradguide.step.engine import Engine, StepState
from gradguide.step.metrics import Record
from gradguide.utils.checks import check_kind

__all__ = ["NOTHING_RECORDED", "Progress"]

NOTHING_RECORDED = (
    "record(history) appends no step while all rules are off: step() is then that of the base alone, and measures "
    "nothing. Turn a rule on: GradGuide(base, direction=Direction(damping=0), magnitude=None) measures, and changes no "
    "gradient"
)


class Progress:
    """Step counts, the last record, and the history to append to.

    totals (Tensor): shape [2], in the widest dtype of its device: steps made and steps skipped. A step with only zero
        gradients is not counted.
    """

    def __init__(self) -> None:
        self.totals = torch.zeros(2, dtype=torch.float64)
        self.last: Record | None = None
        self.history: History | None = None
        self._skipped_in_row = 0
        self._warned: set[str] = set()

    def record(self, history: History | None) -> None:
        """Set the history to append to.

        Raises:
            TypeError: it is no History, which would raise after the next step had changed the parameters.
        """
        check_kind("history", history, History)
        self.history = history

    def skipped_on_host(self, state: StepState, base: Optimizer, policy: str, engine: Engine) -> bool:
        """Return whether the host skips the step. If so, count it, and warn after several in a row.

        Every other step is counted by ``rules.decide``, also if it is skipped on the device.

        Raises:
            FloatingPointError: the gradient is not finite and the policy is "raise".
        """
        if not state.plan.buckets:
            self.warn_once(NO_GRADIENTS, stacklevel=7)  # other ranks may have gradients and wait in a collective
        # Later updates are in place, so that a replayed CUDA graph continues the count.
        device = state.span.gram.device
        self.totals = self.totals.to(device, wide_dtype(device))
        names = engine.planner.names
        if not nonfinite.skip_on_host(state, base, policy, names):
            self._skipped_in_row = 0
            return False
        self.totals[1] += 1
        self._skipped_in_row += 1
        if self._skipped_in_row == nonfinite.SKIPS_BEFORE_WARNING:
            nonfinite.warn_skipped(state, nonfinite.SKIPS_BEFORE_WARNING, names)
        return True

    def finish(self, record: Record | None, metrics: Callable[[], dict[str, float]]) -> None:
        """Store the record of a step. If a history is set, append the metrics to it."""
        self.last = record
        if self.history is not None:
            self.history.append(metrics())

    def warn_once(self, message: str, stacklevel: int) -> None:
        """Give a UserWarning, once per message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=stacklevel)

    def restart(self, totals: Tensor) -> None:
        """Continue from the totals of a checkpoint."""
        self.totals = totals
        self.last = None
