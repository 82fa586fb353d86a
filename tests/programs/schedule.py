"""Random events: steps, and what happens between them."""

from __future__ import annotations

from dataclasses import replace

from tests.programs.alignments import draw_alignment, replaying
from tests.programs.drawing import Draw
from tests.programs.program import (
    AddGroup,
    AlignmentSpec,
    Event,
    Freeze,
    GradientSpec,
    Program,
    Replace,
    RoundTrip,
    ScaleRates,
    SetAlignment,
    Step,
    Unfreeze,
)

__all__ = ["draw_events"]


def draw_events(draw: Draw, program: Program, profile: str) -> tuple[Event, ...]:
    """Three to eight steps, and what happens between them."""
    waiting = list(range(program.started, len(program.groups)))
    events: list[Event] = []
    usual = draw.one(["normal", "steady", "mixed"])
    step_scale = draw.scale(profile)
    for _ in range(draw.number(3, 8)):
        while draw.chance(0.3):
            event = draw_between(draw, program, profile, waiting)
            if event is not None:
                events.append(event)
        if profile == "wild" and draw.chance(0.4):
            step_scale = draw.scale(profile)
        none = draw.chance(0.04)
        bad = draw.chance(0.04)
        gradients = [
            None if none or draw.chance(0.12) else draw_gradient(draw, usual, step_scale, profile)
            for _ in program.parameters
        ]
        if bad and gradients[0] is not None:
            gradients[0] = replace(gradients[0], kind=draw.one(["nan", "inf"]))
        if not none and all(gradient is None for gradient in gradients):
            gradients[0] = draw_gradient(draw, usual, step_scale, profile)
        step = Step(draw.seed(), tuple(gradients), closure=draw.chance(0.15), metrics=draw.chance(0.5))
        events.append(step)
    return tuple(events)


def draw_gradient(draw: Draw, usual: str, scale: float, profile: str) -> GradientSpec:
    """One gradient."""
    kind = usual if usual != "mixed" else draw.one(["normal", "steady", "zero", "against", "along"])
    if draw.chance(0.1):
        kind = draw.one(["zero", "against", "along"])
    own = draw.scale(profile) if draw.chance(0.15) else scale
    layout = draw.one(["contiguous"] * 5 + ["transposed", "strided", "offset", "kept", "kept"])
    return GradientSpec(kind, own, layout, draw.number(0, 15))


def draw_between(draw: Draw, program: Program, profile: str, waiting: list[int]) -> Event | None:
    """Something between two steps."""
    everything = range(len(program.parameters))
    number = draw.one(everything)
    spec = program.parameters[number]
    square = len(spec.shape) == 2 and spec.shape[0] == spec.shape[1] > 1
    match draw.number(0, 7) if not square or draw.chance(0.5) else 3:
        case 0 if waiting:
            return AddGroup(waiting.pop(0))
        case 1:
            return Freeze(number, keep=draw.chance(0.3))
        case 2:
            return Unfreeze(number)
        case 3 | 4:
            hows = ["copy", "values", "strided", "flat", "swapped", "float64", "float32", "bfloat16"]
            hows += ["transposed"] * (8 if square else 0)
            return Replace(number, draw.one(hows), draw.seed(), draw.one(everything))
        case 5 | 6:
            return RoundTrip(draw.one(["deepcopy", "pickle", "state", "file"]))
        case 7 if program.alignment is not None or program.watched:
            return SetAlignment(draw_next_alignment(draw, program, profile))
        case _:
            return ScaleRates(draw.one([0.5, 2.0, 10.0]))


def draw_next_alignment(draw: Draw, program: Program, profile: str) -> AlignmentSpec | None:
    """What a program aligns with from some step on."""
    if draw.chance(0.25):
        return None
    alignment = draw_alignment(draw, profile)
    # Stored sources have to match the names of all groups.
    return replaying(alignment) if len(program.groups) > program.started and not program.late else alignment
