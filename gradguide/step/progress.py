"""What a run has come to: steps made and skipped, the last step's record, warnings given."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide.base_checks import NO_GRADIENTS
from gradguide.recording.history import History
from gradguide.step import nonfinite
from gradguide.step.engine import Engine, StepState
from gradguide.step.metrics import Record

__all__ = ["Progress"]


class Progress:
    """Counters, the last record, and the history that is recorded.

    totals (Tensor): shape [2], float64: steps made and steps skipped. A step of zero gradients is none.
    """

    def __init__(self) -> None:
        self.totals = torch.zeros(2, dtype=torch.float64)
        self.last: Record | None = None
        self.history: History | None = None
        self._skipped_in_row = 0
        self._warned: set[str] = set()

    def should_skip(self, state: StepState, base: Optimizer, policy: str, engine: Engine) -> bool:
        """Return whether the step is skipped; if so, count it, and warn after several in a row.

        Raises:
            FloatingPointError: the gradient is not finite and the policy is "raise".
        """
        if not state.plan.buckets:
            self.warn_once(NO_GRADIENTS, stacklevel=7)  # other ranks may have gradients, and wait for this one
        # Changed in place from here on, so that a CUDA graph that replays the step counts on.
        self.totals = self.totals.to(state.span.gram.device)
        names = engine.planner.names
        if not nonfinite.should_skip(state, base, policy, names):
            self._skipped_in_row = 0
            return False
        self.totals[1] += 1
        self._skipped_in_row += 1
        if self._skipped_in_row == nonfinite.SKIPS_BEFORE_WARNING:
            nonfinite.warn_skipped(state, nonfinite.SKIPS_BEFORE_WARNING, names)
        return True

    def finish(self, record: Record | None, metrics: Callable[[], dict[str, float]]) -> None:
        """Keep the record of a step, and append its metrics to the history if there is one."""
        self.last = record
        if self.history is not None:
            self.history.append(metrics())

    def warn_once(self, message: str, stacklevel: int) -> None:
        """Give a UserWarning the first time."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=stacklevel)

    def restart(self, totals: Tensor) -> None:
        """Go on from the totals of a checkpoint."""
        self.totals = totals
        self.last = None
