"""GradGuide's mechanisms, one at a time, in pairs, and all: the library's defaults, with parts left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

from benchmarks.few_shot.problem import Problem
from gradguide import Alignment, Direction, GradGuide, Magnitude, Regularizer, SourceGradient

__all__ = ["VARIANTS", "Variant", "anchored", "wrap"]


def anchored(sources: Sequence[SourceGradient]) -> Alignment:
    """The default alignment with stored sources."""
    return Alignment([source.anchored() for source in sources])


def _projected(sources: Sequence[SourceGradient]) -> Alignment:
    return Alignment([source.anchored() for source in sources], project=True)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Options of GradGuide; ``alignment`` and ``regularizer`` make theirs from the stored sources."""

    direction: Direction | None = Direction()  # noqa: RUF009 (frozen)
    alignment: Callable[[Sequence[SourceGradient]], Alignment] | None = None
    magnitude: Magnitude | None = Magnitude()  # noqa: RUF009 (frozen)
    regularizer: Callable[[Sequence[SourceGradient]], Regularizer] | None = None
    scope: str = "global"


def wrap(base: Optimizer, problem: Problem, variant: Variant) -> GradGuide:
    """``base`` guided as ``variant`` says; the first task of a sequence has no source to align with."""
    alignment = variant.alignment(problem.sources) if variant.alignment is not None and problem.sources else None
    return GradGuide(
        base,
        direction=variant.direction,
        alignment=alignment,
        magnitude=variant.magnitude,
        scope=variant.scope,
        regularizer=None if variant.regularizer is None else variant.regularizer(problem.sources),
        names=problem.adapter,
    )


def _terms(sources: Sequence[SourceGradient]) -> Regularizer:
    """The three terms of the paper's abstract, in the loss itself; weights by guess: nobody has rows to tune them."""
    if not sources:
        return Regularizer(direction=0.1, magnitude=0.01)
    return Regularizer(direction=0.1, magnitude=0.01, alignment=0.1, source=sources)


# Without magnitude control there is still what every method has, clipping.
_CLIP = Magnitude(max_update=None)

VARIANTS: dict[str, Variant] = {
    "GG direction": Variant(magnitude=_CLIP),
    "GG alignment": Variant(direction=None, alignment=anchored, magnitude=_CLIP),
    "GG magnitude": Variant(direction=None),
    "GG direction+alignment": Variant(alignment=anchored, magnitude=_CLIP),
    "GG direction+magnitude": Variant(),
    "GG alignment+magnitude": Variant(direction=None, alignment=anchored),
    "GradGuide": Variant(alignment=anchored),
    "GG projected": Variant(alignment=_projected),
    "exact objective": Variant(direction=Direction(damping=0.0), magnitude=_CLIP, regularizer=_terms),
}
