"""Run a program on GradGuide and on the oracle, and compare after every event."""

from __future__ import annotations

import re
import warnings

import numpy as np

from tests.programs.bases import check_same, check_state, held_state
from tests.programs.compare import Disagreement, OverflowedError, Tally
from tests.programs.memory import check_memory
from tests.programs.model import Model
from tests.programs.numbers import twin
from tests.programs.program import (
    AddGroup,
    Event,
    Freeze,
    Program,
    Replace,
    RoundTrip,
    ScaleRates,
    SetAlignment,
    Step,
    Unfreeze,
)
from tests.programs.step import make_step
from tests.programs.world import World

__all__ = ["kind_of", "run"]


def run(program: Program, tally: Tally | None = None) -> None:
    """Run a program.

    Raises:
        Disagreement: something came out otherwise than the oracle says, or an error was raised.
    """
    tally = Tally() if tally is None else tally
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world = World(program)
        model = Model(world)
        for number, event in enumerate(program.events):
            try:
                with np.errstate(all="ignore"):
                    ended = happen(event, world, model, tally)
            except OverflowedError:
                return
            except Disagreement as error:
                raise Disagreement(f"event {number}, {type(event).__name__}: {error}") from None
            except Exception as error:
                raise Disagreement(f"event {number}, {event}: raised {error!r}") from error
            if ended:
                return
        check_memory(world, model, tally)


def happen(event: Event, world: World, model: Model, tally: Tally) -> bool:
    """Let an event happen. Returns whether the program ends, since numbers have overflowed."""
    present = [world.parameters[number] for _, _, number in world.present()]
    match event:
        case Step():
            return make_step(event, world, model, tally)
        case AddGroup():
            world.add_group(event.group)
        case Freeze() | Unfreeze():
            parameter = world.parameters[event.parameter]
            parameter.requires_grad_(isinstance(event, Unfreeze))
            if isinstance(event, Freeze) and not event.keep:
                parameter.grad = None
        case Replace():
            shapes = [p.shape for p in world.parameters]
            world.replace(event)
            assert [p.shape for p in world.parameters] == shapes
        case SetAlignment():
            world.set_alignment(event.alignment)
            model.follow_alignment(world)
        case ScaleRates():
            for group in world.base.param_groups:
                group["lr"] *= event.factor
        case RoundTrip() if event.how in ("state", "file") and not any(p.requires_grad for p in present):
            pass  # no optimizer can be made of frozen parameters
        case RoundTrip():
            before = [twin(p) for p in world.parameters]
            state = held_state(world.base, world.parameters)
            world.round_trip(event.how)
            if event.how in ("deepcopy", "pickle"):
                model.rewind()
            check_same("parameters after the round trip", before, [p.detach() for p in world.parameters])
            check_state(world.base, world.parameters, state, exact=True)
            if world.program.watched or event.how in ("state", "file"):
                check_memory(world, model, tally)
    return False


def kind_of(program: Program) -> str:
    """What kind of disagreement a program ends in; "" for none, or for one that cannot be built."""
    try:
        run(program)
    except Disagreement as error:
        kind = re.match(r"event \d+, (\w+\W+[a-z ]+|.*raised \w+)", str(error))
        return str(error) if kind is None else kind[1]
    except Exception:
        return ""
    return ""
