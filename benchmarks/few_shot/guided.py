"""GradGuide's mechanisms, one at a time, in pairs, and all: the library's defaults, with parts left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

from benchmarks.few_shot.problem import Problem
from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient

__all__ = ["VARIANTS", "Variant", "wrap"]


def _anchored(sources: Sequence[SourceGradient]) -> Alignment:
    return Alignment([source.anchored() for source in sources])


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Options of GradGuide; ``alignment`` makes its option from the stored sources."""

    direction: Direction | None = Direction()  # noqa: RUF009 (frozen)
    alignment: Callable[[Sequence[SourceGradient]], Alignment] | None = None
    magnitude: Magnitude | None = Magnitude()  # noqa: RUF009 (frozen)


def wrap(base: Optimizer, problem: Problem, variant: Variant) -> GradGuide:
    """``base`` guided as ``variant`` says; the first task of a sequence has no source to align with."""
    alignment = variant.alignment(problem.sources) if variant.alignment is not None and problem.sources else None
    return GradGuide(
        base,
        direction=variant.direction,
        alignment=alignment,
        magnitude=variant.magnitude,
        names=problem.adapter,
    )


# Without magnitude control there is still what every method has, clipping.
_CLIP = Magnitude(max_update=None)

VARIANTS: dict[str, Variant] = {
    "GG direction": Variant(magnitude=_CLIP),
    "GG alignment": Variant(direction=None, alignment=_anchored, magnitude=_CLIP),
    "GG magnitude": Variant(direction=None),
    "GG direction+alignment": Variant(alignment=_anchored, magnitude=_CLIP),
    "GG direction+magnitude": Variant(),
    "GG alignment+magnitude": Variant(direction=None, alignment=_anchored),
    "GradGuide": Variant(alignment=_anchored),
}
