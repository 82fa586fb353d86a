"""Smaller programs that still fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tests.programs.program import Program, Step
from tests.programs.run import kind_of

__all__ = ["shrink"]


def shrink(program: Program) -> Program:
    """Leave out events, sources, gradients and options as long as the program fails in the same way."""
    wanted, smaller = kind_of(program), True
    while smaller:
        smaller = False
        for candidate in candidates(program):
            if candidate != program and kind_of(candidate) == wanted:
                program, smaller = candidate, True
                break
    return program


def candidates(program: Program) -> Iterator[Program]:
    """Programs with one thing less."""
    for number in reversed(range(len(program.events))):
        yield program.without_event(number)
    yield replace(program, direction=None)
    yield replace(program, magnitude=None)
    yield replace(program, alignment=None)
    yield replace(program, scope="global")
    if program.base != "SGD":
        yield replace(program, base="SGD", options=(("lr", 0.1),))
    yield replace(program, watched=False)
    yield replace(program, backend="foreach")
    alignment = program.alignment
    if alignment is not None and len(alignment.sources) > 1:
        for number in range(len(alignment.sources)):
            if not any(source.like is not None and source.like >= number for source in alignment.sources):
                sources = alignment.sources[:number] + alignment.sources[number + 1 :]
                weight = alignment.weight
                if isinstance(weight, tuple):
                    weight = weight[:number] + weight[number + 1 :]
                yield replace(program, alignment=replace(alignment, sources=sources, weight=weight))
    for number in range(1, len(program.options)):  # the first is the learning rate
        yield replace(program, options=program.options[:number] + program.options[number + 1 :])
    for number, spec in enumerate(program.parameters):
        yield without_gradients(program, number)
        for simple in (replace(spec, dtype="float32"), replace(spec, scale=1.0)):
            parameters = (*program.parameters[:number], simple, *program.parameters[number + 1 :])
            yield replace(program, parameters=parameters)
    for number, event in enumerate(program.events):
        if isinstance(event, Step):
            plain = replace(event, closure=False, metrics=False)
            yield replace(program, events=(*program.events[:number], plain, *program.events[number + 1 :]))


def without_gradients(program: Program, number: int) -> Program:
    """The program in which a parameter never has a gradient."""
    events = [
        replace(event, gradients=tuple(None if n == number else g for n, g in enumerate(event.gradients)))
        if isinstance(event, Step)
        else event
        for event in program.events
    ]
    return replace(program, events=tuple(events))
