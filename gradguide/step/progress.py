"""Progress of a run: counts of steps, the last step's record, and warnings already given."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide.base_checks import NO_GRADIENTS, has_no_rate
from gradguide.ops.tensors import wide_dtype
from gradguide.recording.history import History
from gradguide.step import nonfinite
from gradguide.step.engine import StepState
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
        self._undone_in_row = 0
        self._warned: set[str] = set()

    def record(self, history: History | None) -> None:
        """Set the history to append to.

        Raises:
            TypeError: it is no History, which would raise after the next step had changed the parameters.
        """
        check_kind("history", history, History)
        self.history = history

    def skipped_on_host(self, state: StepState, base: Optimizer, policy: str, names: Mapping[Tensor, str]) -> bool:
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
        if not nonfinite.uses_found_inf(state, base, policy):  # the host waits for this step anyway
            self._count_undone(base)
        if not nonfinite.skip_on_host(state, base, policy, names):
            self._skipped_in_row = 0
            return False
        self.totals[1] += 1
        self._skipped_in_row += 1
        if self._skipped_in_row == nonfinite.SKIPS_BEFORE_WARNING:
            nonfinite.warn_skipped(state, nonfinite.SKIPS_BEFORE_WARNING, names)
        return True

    def _count_undone(self, base: Optimizer) -> None:
        """Count whether the bound undid the last step's update, which was not finite. Warn after several in a row."""
        if self.last is None:
            return
        undone = self.last.limit is not None and not bool(self.last.limit.factor.all())
        self._undone_in_row = self._undone_in_row + 1 if undone else 0
        if self._undone_in_row == nonfinite.SKIPS_BEFORE_WARNING:
            nonfinite.warn_undone(base, nonfinite.SKIPS_BEFORE_WARNING)

    def finish(self, record: Record | None, metrics: Callable[[], dict[str, float]], base: Optimizer) -> None:
        """Store the record of a step. If a history is set, append the metrics, except those of a step on zeros."""
        self.last = record
        if self.history is not None:
            row = metrics()
            if row["grad_norm"] != 0.0 or not has_no_rate(base):  # torch makes such steps for distributed checkpoints
                self.history.append(row)

    def warn_once(self, message: str, stacklevel: int) -> None:
        """Give a UserWarning, once per message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=stacklevel)

    def restart(self, totals: Tensor) -> None:
        """Continue from the totals of a checkpoint."""
        self.totals = totals
        self.last = None
