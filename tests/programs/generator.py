"""Programs from seeds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from gradguide import Direction, Magnitude
from tests.programs.alignments import draw_alignment, replaying
from tests.programs.drawing import Draw
from tests.programs.program import GroupSpec, ParameterSpec, Program
from tests.programs.schedule import draw_events

__all__ = ["generate"]

SHAPES: list[tuple[int, ...]] = [
    *[(), (1,), (1,), (2,), (3,), (5,), (7,), (40,), (0,), (17,)],
    *[(2, 3), (3, 3), (4, 4), (2, 2), (1, 4), (8, 5), (2, 2, 2)],
]
SQUARES: list[tuple[int, ...]] = [(2, 2), (3, 3), (3, 3), (4, 4)]
"""Matrices that can be transposed in place."""
LEAVES = ("weight", "bias", "lora_A.weight", "lora_B.weight")


def generate(seed: int) -> Program:
    """The program of a seed."""
    draw = Draw(seed)
    parameters = draw_parameters(draw)
    profile = "tame" if any(p.dtype == "float16" for p in parameters) else draw.one(["ordinary", "wild", "wild"])
    scope = draw.one(["global", "global", "group", "module", "tensor", "mapping"])
    base, options = draw_base(draw)
    groups, started = draw_groups(draw, len(parameters))
    direction = draw_direction(draw, base, options)
    magnitude = draw_magnitude(draw)
    alignment = draw_alignment(draw, profile) if draw.chance(0.65) else None
    if draw.chance(0.03):
        direction, magnitude, alignment = None, None, None
    later = {n for group in groups[started:] for n in group.members}
    names = draw.one(["late", "replay", "nameless"])
    if names == "nameless" and alignment is not None:
        parameters = [replace(p, named=False) if n in later else p for n, p in enumerate(parameters)]
    if names == "replay" and alignment is not None and later:
        alignment = replaying(alignment)
    if not any(p.named for n, p in enumerate(parameters) if n not in later):
        first = groups[0].members[0]
        parameters[first] = replace(parameters[first], named=True)
    labels: Any = tuple(draw.one(["", "x", "y"]) for _ in parameters) if scope == "mapping" else scope
    program = Program(
        seed=seed,
        parameters=tuple(parameters),
        groups=tuple(groups),
        started=started,
        base=base,
        options=tuple(options.items()),
        direction=direction,
        alignment=alignment,
        magnitude=magnitude,
        scope=labels,
        late=names == "late",
        backend=draw.one(["auto", "foreach"]),
        nonfinite="raise" if draw.chance(0.15) else "skip",
        watched=draw.chance(0.6) or remembers_norms(direction),
        events=(),
    )
    return replace(program, events=draw_events(draw, program, profile))


def remembers_norms(direction: Direction | None) -> bool:
    """Whether statistics are of norms, which rounding changes, so that they have to be read after each step."""
    return direction is not None and direction.share_momentum


def draw_parameters(draw: Draw) -> list[ParameterSpec]:
    """One to eight parameters."""
    profile = draw.one(["float32"] * 5 + ["float64", "bfloat16", "float16", "mixed", "mixed"])
    names = [f"{module}.{leaf}" for module in ("a", "b.c", "d") for leaf in LEAVES]
    count = draw.number(1, 8)
    nameless = draw.chance(0.2)
    shapes = SQUARES if draw.chance(0.2) else SHAPES
    return [
        ParameterSpec(
            name=names[n],
            shape=draw.one(shapes if n or shapes is SQUARES else SHAPES[:8]),
            seed=draw.seed(),
            dtype=draw.one(["float32", "float32", "float64", "bfloat16"]) if profile == "mixed" else profile,
            scale=draw.one([1.0, 1.0, 1.0, 0.0, 1e-3, 30.0]),
            named=not (nameless and draw.chance(0.4)),
        )
        for n in range(count)
    ]


def draw_base(draw: Draw) -> tuple[str, dict[str, float | bool]]:
    """A base optimizer and its options."""
    base = draw.one(["SGD", "SGD", "Adam", "AdamW", "AdamW", "RMSprop"])
    options: dict[str, float | bool] = {"lr": draw.one([1.0, 0.1, 0.01, 1e-3])}
    if draw.chance(0.4):
        options["weight_decay"] = draw.one([0.1, 0.01])
    if base in ("SGD", "RMSprop") and draw.chance(0.6):
        options["momentum"] = draw.one([0.9, 0.5])
        if base == "SGD" and draw.chance(0.5):
            options |= {"nesterov": True} if draw.chance(0.5) else {"dampening": 0.3}
    if base in ("Adam", "AdamW") and draw.chance(0.2):
        options["amsgrad"] = True
    if base == "RMSprop" and draw.chance(0.3):
        options["centered"] = True
    if draw.chance(0.2):
        options["foreach"] = draw.chance(0.5)
    if draw.chance(0.3):
        options["maximize"] = True
    return base, options


def draw_groups(draw: Draw, count: int) -> tuple[list[GroupSpec], int]:
    """The parameters in one to four groups, and how many groups there are at first."""
    cuts = sorted({draw.number(1, count - 1) for _ in range(draw.number(0, 3))}) if count > 1 else []
    groups = []
    for low, high in zip([0, *cuts], [*cuts, count], strict=True):
        options: dict[str, float | bool] = {}
        if draw.chance(0.3):
            options["lr"] = draw.one([0.5, 0.05, 1e-3])
        if draw.chance(0.2):
            options["weight_decay"] = 0.05
        if draw.chance(0.25):
            options["maximize"] = draw.chance(0.5)
        groups.append(GroupSpec(tuple(range(low, high)), tuple(options.items())))
    started = len(groups) if draw.chance(0.6) else draw.number(1, len(groups))
    return groups, started


def draw_direction(draw: Draw, base: str, options: dict[str, float | bool]) -> Direction | None:
    """Options of direction consistency."""
    if draw.chance(0.15):
        return None
    averaging = base in ("Adam", "AdamW") or (base == "SGD" and "momentum" in options)
    return Direction(
        decay=draw.one([0.95, 0.95, 0.5, 0.0, 0.99]),
        damping=draw.one([0.5, 0.5, 0.0, 1.0, 0.9]),
        share_momentum=averaging and draw.chance(0.4),
    )


def draw_magnitude(draw: Draw) -> Magnitude | None:
    """Options of magnitude control."""
    if draw.chance(0.15):
        return None
    return Magnitude(
        max_norm=draw.one([1.0, 1.0, math.inf, 0.1, 1e3, 1e-10]),
        max_update=draw.one([0.05, 0.05, None, 0.5, 1e-3]),
    )
