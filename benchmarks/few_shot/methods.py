"""The methods compared. Each is an optimizer, and what is done to the gradients before its step.

Every method has the same budget: the grid of learning rates. What else it could be tuned by stands at its authors'
value, or at the library's default, and is the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.few_shot import guided, live, penalties
from benchmarks.few_shot.cautious import CautiousAdamW
from benchmarks.few_shot.problem import Problem
from benchmarks.zclip import ZClip

__all__ = ["BASE", "HEAD_ONLY", "METHODS", "STORED", "Learner", "Method"]

MAX_NORM = 1.0
BASE = "clip"
"""What every other method is compared with: clip_grad_norm_ and AdamW."""
HEAD_ONLY = "head only"
"""What is had without training the adapter at all; a head with a rate of its own makes it the same at every rate."""

Change = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Learner:
    """An optimizer for one run, and the changes made to the gradients before each of its steps, in order.

    evaluations: gradients that a step takes; a run has so many fewer steps.
    """

    optimizer: Optimizer
    changes: tuple[Change, ...] = ()
    evaluations: int = 1

    def step(self, again: Callable[[], Tensor]) -> None:
        """One step from the gradients that the parameters hold.

        Args:
            again: evaluates loss and gradients of the same batch once more; at its first call it gives those at hand.
        """
        for change in self.changes:
            change()
        if self.evaluations > 1:
            self.optimizer.step(again)  # type: ignore[arg-type]
        else:
            self.optimizer.step()


Method = Callable[[Problem, float], Learner]


def _adamw(problem: Problem, lr: float) -> Learner:
    return Learner(optimizer=AdamW(problem.groups(lr)))


def _clip(problem: Problem) -> Change:
    def clip() -> None:
        nn.utils.clip_grad_norm_(problem.parameters, MAX_NORM)

    return clip


def _before_clipping(make: Callable[[Problem], Change] | None) -> Method:
    """AdamW with clipped gradients, after ``make``'s change."""

    def method(problem: Problem, lr: float) -> Learner:
        first = (make(problem),) if make is not None else ()
        return Learner(optimizer=AdamW(problem.groups(lr)), changes=(*first, _clip(problem)))

    return method


def _lower(problem: Problem, lr: float) -> Learner:
    return METHODS[BASE](problem, lr / 4)


def _head_only(problem: Problem, lr: float) -> Learner:
    rate = lr if problem.head_lr is None else problem.head_lr
    groups = [{"params": [p for _, p in problem.adapter], "lr": 0.0}, {"params": list(problem.head), "lr": rate}]
    return Learner(optimizer=AdamW(groups), changes=(_clip(problem),))


def _cautious(problem: Problem, lr: float) -> Learner:
    return Learner(optimizer=CautiousAdamW(problem.groups(lr)), changes=(_clip(problem),))


def _zclip(problem: Problem, lr: float) -> Learner:
    return Learner(optimizer=AdamW(problem.groups(lr)), changes=(ZClip(problem.parameters),))


def _guided(variant: guided.Variant) -> Method:
    def method(problem: Problem, lr: float) -> Learner:
        optimizer = guided.wrap(AdamW(problem.groups(lr)), problem, variant)
        return Learner(optimizer=optimizer, evaluations=1 if variant.regularizer is None else 2)

    return method


METHODS: dict[str, Method] = {
    "AdamW": _adamw,
    BASE: _before_clipping(None),
    f"{BASE}, rate / 4": _lower,
    HEAD_ONLY: _head_only,
    "L2-SP": _before_clipping(penalties.l2_sp),
    "EWC": _before_clipping(penalties.ewc),
    "A-GEM": _before_clipping(live.a_gem),
    "replay": _before_clipping(live.replay),
    "PCGrad": _before_clipping(live.pcgrad),
    "UPGrad": _before_clipping(live.upgrad),
    "ZClip": _zclip,
    "C-AdamW": _cautious,
    **{name: _guided(variant) for name, variant in guided.VARIANTS.items()},
}
"""By name, as it stands in the results."""

STORED = frozenset(
    {
        "EWC",
        *(name for name, variant in guided.VARIANTS.items() if variant.alignment or variant.regularizer),
    }
)
"""The methods that use a stored source of each earlier task."""
