"""Random programs: what is built, and what is done to it, as plain data that prints and evaluates again."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeAlias

from gradguide import Direction, Magnitude

__all__ = [
    "AddGroup",
    "AlignmentSpec",
    "Event",
    "Freeze",
    "GradientSpec",
    "GroupSpec",
    "ParameterSpec",
    "Program",
    "Replace",
    "RoundTrip",
    "ScaleRates",
    "SetAlignment",
    "SourceSpec",
    "Step",
    "Unfreeze",
    "listing",
]


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter: normal numbers times ``scale`` from ``seed``. One that is not ``named`` is left out of names=."""

    name: str
    shape: tuple[int, ...]
    seed: int
    dtype: str = "float32"
    scale: float = 1.0
    named: bool = True


@dataclass(frozen=True)
class GroupSpec:
    """A param group: the numbers of its parameters, and its options beside the base's."""

    members: tuple[int, ...]
    options: tuple[tuple[str, float | bool], ...] = ()


@dataclass(frozen=True)
class SourceSpec:
    """A source.

    kind: "fixed" (s0), "moving" (s0, F, theta0), "pulling" (F and theta0 as they are), "anchored" (a moving one's
        ``anchored()``) or "replay".
    like, sign: the tables of another source of the same alignment times ``sign``, in place of random ones.
    """

    kind: str
    seed: int
    scale: float = 1.0
    curvature: float = 1.0
    dtype: str = "float32"
    every: int = 1
    like: int | None = None
    sign: float = 1.0


@dataclass(frozen=True)
class AlignmentSpec:
    """Options of an Alignment. ``named`` gives the sources as a mapping; ``frozen`` includes frozen parameters."""

    sources: tuple[SourceSpec, ...]
    on: str = "update"
    weight: float | tuple[float, ...] | None = None
    project: bool | None = None
    named: bool = False
    frozen: bool = True


@dataclass(frozen=True)
class GradientSpec:
    """A gradient for one step.

    kind: "normal", "steady" (the parameter's fixed direction and a little noise), "zero", "against" and "along" (a
        multiple of the row of source ``source``), "nan", "inf".
    layout: "contiguous", "transposed", "strided", "offset", or "kept" (written into the gradient that is there).
    """

    kind: str
    scale: float = 1.0
    layout: str = "contiguous"
    source: int = 0


@dataclass(frozen=True)
class Step:
    """One step; a parameter without an entry, or with None, has no gradient. ``metrics`` are compared if asked for."""

    seed: int
    gradients: tuple[GradientSpec | None, ...]
    closure: bool = False
    metrics: bool = True


@dataclass(frozen=True)
class AddGroup:
    """Add group ``group`` of the program."""

    group: int


@dataclass(frozen=True)
class Freeze:
    """Switch requires_grad off; the gradient is left there with ``keep``, and the next steps do not write it."""

    parameter: int
    keep: bool = False


@dataclass(frozen=True)
class Unfreeze:
    """Switch requires_grad on."""

    parameter: int


@dataclass(frozen=True)
class Replace:
    """Give a parameter other data.

    how: "copy", "values", "transposed", "strided", "flat", "swapped" (with parameter ``other``), or a dtype's name.
    """

    parameter: int
    how: str
    seed: int = 0
    other: int = 0


@dataclass(frozen=True)
class RoundTrip:
    """Go on with a copy. how: "deepcopy", "pickle", "state" (same parameters) or "file" (new parameters)."""

    how: str


@dataclass(frozen=True)
class SetAlignment:
    """Call ``set_alignment``; None ends it."""

    alignment: AlignmentSpec | None


@dataclass(frozen=True)
class ScaleRates:
    """Multiply every group's learning rate."""

    factor: float


Event: TypeAlias = Step | AddGroup | Freeze | Unfreeze | Replace | RoundTrip | SetAlignment | ScaleRates


@dataclass(frozen=True)
class Program:
    """What is built from a seed, and what happens to it.

    started: how many of ``groups`` the base has at first.
    late: whether names= holds the first groups' parameters only; those of later groups are given with set_alignment.
    scope: a name, or the label of each parameter, "" for a parameter outside the mapping.
    watched: whether direction and statistics are read from the state dict and compared after every step.
    """

    seed: int
    parameters: tuple[ParameterSpec, ...]
    groups: tuple[GroupSpec, ...]
    started: int
    base: str
    options: tuple[tuple[str, float | bool], ...]
    direction: Direction | None
    alignment: AlignmentSpec | None
    magnitude: Magnitude | None
    scope: str | tuple[str, ...]
    late: bool
    backend: str
    nonfinite: str
    watched: bool
    events: tuple[Event, ...]

    def without_event(self, number: int) -> Program:
        """The program without one of its events."""
        return replace(self, events=self.events[:number] + self.events[number + 1 :])


def listing(program: Program) -> str:
    """The program as Python that builds it again, one part a line."""
    lines = ["Program("]
    for each in fields(program):
        value = getattr(program, each.name)
        if isinstance(value, tuple) and value and each.name in ("parameters", "groups", "events"):
            lines += [f"    {each.name}=(", *(f"        {entry!r}," for entry in value), "    ),"]
        else:
            lines.append(f"    {each.name}={value!r},")
    return "\n".join([*lines, ")"])
