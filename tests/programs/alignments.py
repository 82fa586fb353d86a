"""Random alignments."""

from __future__ import annotations

from dataclasses import replace

from tests.programs.drawing import Draw
from tests.programs.program import AlignmentSpec, SourceSpec

__all__ = ["draw_alignment", "replaying"]


def draw_alignment(draw: Draw, profile: str) -> AlignmentSpec:
    """One to sixteen sources, some of them alike or opposite."""
    count = draw.one([1, 1, 1, 2, 2, 3, 4, 7, 16])
    sources: list[SourceSpec] = []
    for number in range(count):
        like = draw.number(0, number - 1) if number and draw.chance(0.25) else None
        sources.append(
            SourceSpec(
                kind=draw.one(["fixed", "fixed", "moving", "pulling", "anchored", "replay"]),
                seed=draw.seed(),
                scale=draw.scale(profile),
                curvature=draw.scale("tame"),
                dtype=draw.one(["float32"] * 4 + ["bfloat16", "float64"]) if profile != "tame" else "float32",
                every=draw.one([1, 1, 2, 3]),
                like=like,
                sign=draw.one([1.0, -1.0, -0.5]),
            )
        )
    sources = [replace(s, scale=draw.one([1.0, 0.1])) if s.kind == "replay" else s for s in sources]
    weight: float | tuple[float, ...] | None = draw.one([None, None, 0.0, 1.0, 0.3])
    if draw.chance(0.2):
        weight = tuple(draw.one([0.0, 0.5, 2.0]) for _ in sources)
    return AlignmentSpec(
        tuple(sources),
        on=draw.one(["update", "gradient"]),
        weight=weight,
        project=draw.one([None, None, True, False]),
        named=draw.chance(0.3),
    )


def replaying(alignment: AlignmentSpec) -> AlignmentSpec:
    """The same with replay sources throughout, which answer for parameters of any name."""
    return replace(alignment, sources=tuple(replace(s, kind="replay", scale=1.0) for s in alignment.sources))
