"""The methods compared. Each is an optimizer, and the changes made to the gradients before its step.

Every method has the same budget: the grid of learning rates. Every other option has the value of its authors, or the
library's default, and is the same in all runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.few_shot import rivals
from benchmarks.few_shot.data import Problem
from benchmarks.few_shot.rivals import CautiousAdamW, Change
from benchmarks.zclip import ZClip
from gradguide import Alignment, Direction, GradGuide, Magnitude, Regularizer, SourceGradient

__all__ = ["BASE", "HEAD_ONLY", "METHODS", "STORED", "VARIANTS", "Learner", "Method", "Variant", "guide"]

MAX_NORM = 1.0
BASE = "clip"
"""The baseline of all comparisons: clip_grad_norm_ and AdamW."""
HEAD_ONLY = "head only"
"""Trains the head alone. If the head has its own learning rate, the result is the same at every rate of the adapter."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """An optimizer for one run.

    Args:
        optimizer: the optimizer.
        changes: made to the gradients before each step, in order.
        evaluations: gradients that one step uses; a run has that many times fewer steps.
    """

    optimizer: Optimizer
    changes: tuple[Change, ...] = ()
    evaluations: int = 1

    def step(self, closure: Callable[[], Tensor]) -> None:
        """Make one step from the gradients that the parameters hold.

        Args:
            closure: evaluates loss and gradients of the same batch again; its first call returns the existing ones.
        """
        for change in self.changes:
            change()
        if self.evaluations > 1:
            self.optimizer.step(closure)  # type: ignore[arg-type]
        else:
            self.optimizer.step()


Method = Callable[[Problem, float], Learner]
"""Makes the learner of a problem at a learning rate."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Options of GradGuide. ``alignment`` and ``regularizer`` are functions of the stored sources."""

    direction: Direction | None = Direction()  # noqa: RUF009 (frozen)
    alignment: Callable[[Sequence[SourceGradient]], Alignment] | None = None
    magnitude: Magnitude | None = Magnitude()  # noqa: RUF009 (frozen)
    regularizer: Callable[[Sequence[SourceGradient]], Regularizer] | None = None


def guide(base: Optimizer, problem: Problem, variant: Variant) -> GradGuide:
    """Return GradGuide around ``base``. The first task of a sequence has no source, so it has no alignment."""
    alignment = variant.alignment(problem.sources) if variant.alignment is not None and problem.sources else None
    return GradGuide(
        base,
        direction=variant.direction,
        alignment=alignment,
        magnitude=variant.magnitude,
        regularizer=None if variant.regularizer is None else variant.regularizer(problem.sources),
        names=problem.adapter,
    )


def _anchored(sources: Sequence[SourceGradient]) -> Alignment:
    """The default alignment with stored sources."""
    return Alignment([source.anchored() for source in sources])


def _projected(sources: Sequence[SourceGradient]) -> Alignment:
    return Alignment([source.anchored() for source in sources], project=True)


def _terms(sources: Sequence[SourceGradient]) -> Regularizer:
    """The three terms of the paper's abstract as part of the loss. Their weights are guesses, not tuned."""
    if not sources:
        return Regularizer(direction=0.1, magnitude=0.01)
    return Regularizer(direction=0.1, magnitude=0.01, alignment=0.1, source=sources)


_CLIP = Magnitude(max_update=None)  # clipping only, which every method has

VARIANTS: dict[str, Variant] = {
    "GG direction": Variant(magnitude=_CLIP),
    "GG alignment": Variant(direction=None, alignment=_anchored, magnitude=_CLIP),
    "GG magnitude": Variant(direction=None),
    "GG direction+alignment": Variant(alignment=_anchored, magnitude=_CLIP),
    "GG direction+magnitude": Variant(),
    "GG alignment+magnitude": Variant(direction=None, alignment=_anchored),
    "GradGuide": Variant(alignment=_anchored),
    "GG projected": Variant(alignment=_projected),
    "exact objective": Variant(direction=Direction(damping=0.0), magnitude=_CLIP, regularizer=_terms),
}
"""GradGuide with all mechanisms, and with parts of them. "GG alignment+magnitude" has the defaults of the library."""


def _guided(variant: Variant) -> Method:
    def method(problem: Problem, lr: float) -> Learner:
        optimizer = guide(AdamW(problem.groups(lr)), problem, variant)
        return Learner(optimizer=optimizer, evaluations=1 if variant.regularizer is None else 2)

    return method


def _structured(weight: float | None) -> Method:
    """GradGuide with a direction and a structured source, captured at the end of the source task."""

    def method(problem: Problem, lr: float) -> Learner:
        if problem.structured is None:
            raise ValueError("GG structured needs a problem with a structured source, found one without")
        source, model = problem.structured()
        alignment = Alignment(source, weight=weight)
        return Learner(
            optimizer=GradGuide(AdamW(problem.groups(lr)), direction=Direction(), alignment=alignment, names=model)
        )

    return method


def _clip(problem: Problem) -> Change:
    def clip() -> None:
        nn.utils.clip_grad_norm_(problem.parameters, MAX_NORM)

    return clip


def _adamw(*changes: Callable[[Problem], Change]) -> Method:
    """AdamW after ``changes`` of the gradient."""

    def method(problem: Problem, lr: float) -> Learner:
        return Learner(optimizer=AdamW(problem.groups(lr)), changes=tuple(make(problem) for make in changes))

    return method


def _lower(problem: Problem, lr: float) -> Learner:
    return METHODS[BASE](problem, lr / 4)


def _head_only(problem: Problem, lr: float) -> Learner:
    rate = lr if problem.head_lr is None else problem.head_lr
    groups = [{"params": [p for _, p in problem.adapter], "lr": 0.0}, {"params": list(problem.head), "lr": rate}]
    return Learner(optimizer=AdamW(groups), changes=(_clip(problem),))


def _cautious(problem: Problem, lr: float) -> Learner:
    return Learner(optimizer=CautiousAdamW(problem.groups(lr)), changes=(_clip(problem),))


METHODS: dict[str, Method] = {
    "AdamW": _adamw(),
    BASE: _adamw(_clip),
    f"{BASE}, rate / 4": _lower,
    HEAD_ONLY: _head_only,
    "L2-SP": _adamw(rivals.l2_sp, _clip),
    "EWC": _adamw(rivals.ewc, _clip),
    "A-GEM": _adamw(rivals.a_gem, _clip),
    "replay": _adamw(rivals.replay, _clip),
    "PCGrad": _adamw(rivals.pcgrad, _clip),
    "UPGrad": _adamw(rivals.upgrad, _clip),
    "ZClip": _adamw(lambda problem: ZClip(problem.parameters)),
    "C-AdamW": _cautious,
    **{name: _guided(variant) for name, variant in VARIANTS.items()},
    "GG structured": _structured(None),
    "GG structured, weight 10": _structured(10.0),
}
"""By name, as in the results."""

STORED = frozenset({"EWC", *(name for name, variant in VARIANTS.items() if variant.alignment or variant.regularizer)})
"""The methods that use a stored source of each earlier task."""
