"""Random programs against the float64 oracle. One that fails: ``python -m tests.programs SEED`` prints a small one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from tests.kernels import HAVE_KERNELS
from tests.programs.compare import Disagreement, Tally
from tests.programs.generator import generate
from tests.programs.program import AlignmentSpec, Program, Replace, RoundTrip, SetAlignment, Step, listing
from tests.programs.run import kind_of, run
from tests.programs.world import World

CHUNK = 50

interpreted = pytest.mark.skipif(not HAVE_KERNELS, reason="the kernels need Triton")


def agree(seeds: Iterable[int], backend: str | None = None) -> None:
    """Run the programs of the seeds; rounding may decide about a small share of what they compare."""
    tally = Tally()
    for seed in seeds:
        program = generate(seed)
        try:
            run(program if backend is None else replace(program, backend=backend), tally)
        except Disagreement as error:
            pytest.fail(f"seed {seed}: {error}\n{listing(program)}")
    assert tally.compared < 500 or tally.undecided <= 0.03 * tally.compared


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_programs_agree_with_float64(first: int) -> None:
    agree(range(first, first + 10))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 2000, CHUNK))
def test_two_thousand_programs_agree_with_float64(first: int) -> None:
    agree(range(first, first + CHUNK))


def quick_on_kernels(program: Program) -> bool:
    """Whether Triton's interpreter runs a program in seconds: it takes long over many sources."""
    specs = [program.alignment, *(e.alignment for e in program.events if isinstance(e, SetAlignment))]
    return len(program.parameters) <= 4 and all(spec is None or len(spec.sources) <= 3 for spec in specs)


def in_range_of_kernels(program: Program) -> bool:
    """Whether the squares of the gradients are in the range of float32: see ``gradguide.ops.triton``."""
    given = [gradient for event in program.events if isinstance(event, Step) for gradient in event.gradients]
    return all(gradient is None or gradient.scale < 1e15 for gradient in given)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("first", range(0, 60, 10))
def test_programs_on_the_kernels_agree_with_float64(first: int) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.ops.triton.interpreter import repair

        repair()
    programs = {seed: generate(seed) for seed in range(first, first + 10)}
    agree([seed for seed, p in programs.items() if quick_on_kernels(p) and in_range_of_kernels(p)], "triton")


@cache
def some_programs() -> list[Program]:
    return [generate(seed) for seed in range(300)]


FEATURES: dict[str, Callable[[Program], bool]] = {
    "several groups": lambda p: len(p.groups) > 1,
    "a later group": lambda p: p.started < len(p.groups),
    "both signs of maximize": lambda p: len({dict(g.options).get("maximize", False) for g in p.groups}) == 2,
    "shared momentum": lambda p: p.direction is not None and p.direction.share_momentum,
    "no bound of the gradient": lambda p: p.magnitude is not None and p.magnitude.max_norm == math.inf,
    "no rule": lambda p: (p.direction, p.magnitude, p.alignment) == (None, None, None),
    "sixteen sources": lambda p: p.alignment is not None and len(p.alignment.sources) == 16,
    "other sources later": lambda p: any(isinstance(e, SetAlignment) and e.alignment for e in p.events),
    "a step without gradients": lambda p: any(isinstance(e, Step) and not any(e.gradients) for e in p.events),
    "a state dict": lambda p: RoundTrip("state") in p.events,
    "a deep copy": lambda p: RoundTrip("deepcopy") in p.events,
    "transposed data": lambda p: any(isinstance(e, Replace) and e.how == "transposed" for e in p.events),
    "float16": lambda p: any(spec.dtype == "float16" for spec in p.parameters),
    "several dtypes": lambda p: len({spec.dtype for spec in p.parameters}) > 1,
    "a mapping as scope": lambda p: isinstance(p.scope, tuple),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_the_generator_makes_programs_with(feature: str) -> None:
    assert sum(map(FEATURES[feature], some_programs())) >= 3


def aligned(**options: Any) -> Callable[[Program], Program]:
    def change(program: Program) -> Program:
        spec: AlignmentSpec | None = program.alignment
        return program if spec is None else replace(program, alignment=replace(spec, **options))

    return change


def direction(**options: Any) -> Callable[[Program], Program]:
    return lambda p: p if p.direction is None else replace(p, direction=replace(p.direction, **options))


def magnitude(**options: Any) -> Callable[[Program], Program]:
    return lambda p: p if p.magnitude is None else replace(p, magnitude=replace(p.magnitude, **options))


FAULTS: dict[str, Callable[[Program], Program]] = {
    "decay": direction(decay=0.94),
    "damping": direction(damping=0.45),
    "no direction": lambda p: replace(p, direction=None),
    "max_norm": magnitude(max_norm=0.7),
    "max_update": magnitude(max_update=0.04),
    "weight": aligned(weight=0.31),
    "project": aligned(project=False),
    "on": aligned(on="gradient"),
    "scope": lambda p: replace(p, scope="tensor"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle follows the program, GradGuide another one."""
    change = FAULTS[fault]
    original = World.__init__

    def built(self: World, program: Program) -> None:
        original(self, change(program))
        self.program, self.spec = program, program.alignment

    monkeypatch.setattr(World, "__init__", built)
    for program in some_programs():
        if change(program) != program:
            try:
                run(program)
            except Disagreement:
                return
    pytest.fail(f"no program tells that {fault} is another")


def test_a_sign_that_is_not_seen_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle takes groups that maximize for others."""
    monkeypatch.setattr(World, "sign", lambda self, group: 1.0)
    mixed = [p for p in some_programs() if FEATURES["both signs of maximize"](p) and p.alignment is not None]
    assert sum(kind_of(program) != "" for program in mixed[:10]) >= 3
