"""What the oracle remembers between the steps of a program, and what it makes of the next one."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.programs.numbers import DTYPES, as_array, twin, unit
from tests.programs.oracle import Rows, Statistics
from tests.programs.program import AlignmentSpec, SourceSpec
from tests.programs.space import PRODUCTS, Vector
from tests.programs.world import ReplayLoss, World

__all__ = ["Model", "Plan", "ScopePlan", "source_names", "weights_of"]

Array = NDArray[np.float64]

LARGEST = 3.4e38
PULLING = ("pulling", "anchored")


@dataclass
class ScopePlan:
    """One scope of a step: its parameters that have gradients, and its rows over them, one after the other.

    fineness: relative rounding of what is decided, that of the coarsest of its parameters.
    """

    label: Hashable
    members: list[int]
    rows: Rows
    signs: Array
    fineness: float
    statistics: Statistics


@dataclass
class Plan:
    """A step before it is made. ``finite``: whether all rows are; without scopes no parameter has a gradient."""

    scopes: list[ScopePlan] = field(default_factory=list)
    finite: bool = True


@dataclass
class Replayed:
    """What a replay source holds: its rows by name, how often it was asked, and how many batches it has read."""

    rows: dict[str, Array] = field(default_factory=dict)
    asked: int = 0
    read: int = 0


class Model:
    """The oracle's own memory. ``exact``: whether directions were read from the state dict after each step."""

    def __init__(self, world: World) -> None:
        self.directions: dict[int, Vector] = {}
        self.statistics: dict[Hashable, Statistics] = {}
        self.steps = 0
        self.skipped = 0
        self.exact = world.program.watched
        self.follow_alignment(world)

    def follow_alignment(self, world: World) -> None:
        """Begin anew with the sources of the world."""
        self.replays = [Replayed() if loss is not None else None for loss in world.losses]

    def rewind(self) -> None:
        """A copied replay source begins its batches anew."""
        for replay in self.replays:
            if replay is not None:
                replay.read = 0

    def plan(self, world: World) -> Plan:
        """What the next step looks at. Replay sources are evaluated, as the step does first."""
        covered = self.covered(world)
        self.replay(world, covered)
        members: dict[Hashable, list[tuple[int, int]]] = {}
        for group, place, number in world.present():
            if world.parameters[number].grad is not None:
                members.setdefault(self.label(world, group, place, number), []).append((group, number))
        plan = Plan()
        for label, pairs in members.items():
            numbers = [number for _, number in pairs]
            rows = self.rows(world, pairs, covered)
            sizes = [world.parameters[n].numel() for n in numbers]
            signs = np.repeat([world.sign(group) for group, _ in pairs], sizes)
            fine = max(fineness(world.parameters[n].dtype) for n in numbers)
            statistics = self.statistics.get(label, Statistics())
            plan.scopes.append(ScopePlan(label, numbers, rows, signs, fine, statistics))
            vectors = [rows.gradient, rows.direction, *rows.sources]
            plan.finite &= all(bool((np.abs(v.value) < LARGEST).all()) for v in vectors)  # NaN compares as False
        return plan

    def label(self, world: World, group: int, place: int, number: int) -> Hashable:
        """The scope of a parameter."""
        scope, name = world.program.scope, world.program.parameters[number].name
        if isinstance(scope, tuple):
            return scope[number] or (group, place)
        if scope == "module" and world.named(number):
            return name.split(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
        return {"global": None, "group": group}.get(scope, (group, place))

    def rows(self, world: World, pairs: list[tuple[int, int]], covered: set[str]) -> Rows:
        """The rows of one scope; gradient and direction in the frame of descent."""
        gradients, directions, numbers = [], [], [number for _, number in pairs]
        fine = max(fineness(world.parameters[number].dtype) for number in numbers)
        for group, number in pairs:
            parameter = world.parameters[number]
            assert parameter.grad is not None
            g = world.sign(group) * as_array(parameter.grad)
            gradients.append(Vector(g, fine * np.abs(g)))
            directions.append(self.direction(world, number, fine))
        alignment = world.spec
        sources = () if alignment is None else alignment.sources
        values = [world.parameters[number].detach() for number in numbers]
        shared = world.program.direction is not None and world.program.direction.share_momentum
        return Rows(
            gradient=joined(gradients),
            direction=joined(directions),
            sources=[self.source_row(world, k, numbers, values, covered) for k in range(len(sources))],
            weights=() if alignment is None else weights_of(alignment),
            projecting=() if alignment is None else projecting(alignment),
            momentum=rates(world, pairs) if shared else None,
            products=PRODUCTS[world.program.backend],
        )

    def direction(self, world: World, number: int, fine: float) -> Vector:
        """The running direction of a parameter: our own, or the base's momentum."""
        parameter, options = world.parameters[number], world.program.direction
        size = parameter.numel()
        if options is not None and options.share_momentum:
            state: dict[str, Any] = world.base.state.get(parameter, {})
            momentum = state.get("momentum_buffer", state.get("exp_avg"))
            value = np.zeros(size) if momentum is None else as_array(momentum)
            error = np.zeros(size)
        else:
            kept = self.directions.get(number, Vector(np.zeros(size), np.zeros(size)))
            value, error = kept.value, kept.error
        return Vector(value, error + fine * np.abs(value))

    def source_row(
        self, world: World, source: int, numbers: list[int], values: list[Tensor], covered: set[str]
    ) -> Vector:
        """The row of a source over parameters at ``values``; zero where it does not know them."""
        assert world.spec is not None
        spec, tables = world.spec.sources[source], world.tables[source]
        parts = []
        for number, value in zip(numbers, values, strict=True):
            name, size = world.program.parameters[number].name, value.numel()
            if name not in covered or not world.named(number):
                parts.append(Vector(np.zeros(size), np.zeros(size)))
            elif tables is None:
                replay = self.replays[source]
                assert replay is not None
                row = replay.rows.get(name, np.zeros(size))
                parts.append(Vector(row, fineness(value.dtype) * np.abs(row)))
            else:
                parts.append(stored_row(spec, tables, name, value))
        return joined(parts)

    def covered(self, world: World) -> set[str]:
        """The names that all stored sources know."""
        names = set(world.names)
        for tables in world.tables:
            if tables is not None:
                names &= set(next(iter(tables.values())))
        return names

    def replay(self, world: World, covered: set[str]) -> None:
        """Evaluate the replay sources where they are due."""
        pairs = {world.program.parameters[n].name: world.parameters[n] for _, _, n in world.present() if world.named(n)}
        known = {name: p for name, p in pairs.items() if name in covered and p.requires_grad}
        specs = () if world.spec is None else world.spec.sources
        for replay, loss, spec in zip(self.replays, world.losses, specs, strict=True):
            if replay is None or loss is None:
                continue
            if known and (replay.asked % spec.every == 0 or known.keys() != replay.rows.keys()):
                found = replayed_gradients(loss, replay.read % 3)
                replay.rows = {name: found[name] for name in known}
                replay.read += 1
            replay.asked += 1


def joined(parts: list[Vector]) -> Vector:
    """Vectors one after the other."""
    return Vector(np.concatenate([p.value for p in parts]), np.concatenate([p.error for p in parts]))


def fineness(dtype: torch.dtype) -> float:
    """Rounding of a number in a pass over parameters of ``dtype``: that of float32, or of what float64 is good for."""
    return 1e-13 if dtype == torch.float64 else unit(torch.float32)


def stored_row(spec: SourceSpec, tables: dict[str, dict[str, Tensor]], name: str, value: Tensor) -> Vector:
    """``s0 + F * (theta - theta0)``, what is absent dropping out."""
    fine = fineness(value.dtype)
    row = np.zeros(value.numel())
    error = np.zeros(value.numel())
    if spec.kind in ("fixed", "moving"):
        row = as_array(tables["gradient"][name])
        error = fine * np.abs(row)
    if "fisher" in tables:
        held = as_array(stiffness(tables)[name] if spec.kind == "anchored" else tables["fisher"][name])
        anchor = tables["anchor"][name]
        pulled = held * (as_array(value) - as_array(anchor))
        row = row + pulled
        error = error + fine * np.abs(pulled)
        if spec.kind == "anchored":
            error = error + 2 * unit(DTYPES[spec.dtype]) * np.abs(pulled)
        if anchor.dtype == torch.float64 and value.dtype != torch.float64:
            error = error + fine * held * np.abs(as_array(anchor))
    return Vector(row, error)


def stiffness(tables: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """``sqrt(F) / mean(sqrt(F)) / |theta0|``, in F's dtype; see the docstring of ``SourceGradient.anchored``."""
    roots = {name: np.sqrt(as_array(table)) for name, table in tables["fisher"].items()}
    everything = np.concatenate(list(roots.values()))
    anchor = np.concatenate([as_array(table) for table in tables["anchor"].values()])
    length = max(float(np.linalg.norm(anchor)), 0.01 * np.sqrt(anchor.size))
    mean = float(everything.mean())
    return {
        name: torch.from_numpy(root / mean / length if mean > 0 else np.full_like(root, 1 / length)).to(
            tables["fisher"][name].dtype
        )
        for name, root in roots.items()
    }


def replayed_gradients(loss: ReplayLoss, batch: int) -> dict[str, Array]:
    """The gradient of a batch at the present parameters, on copies of them; zero for those that are frozen."""
    own = ReplayLoss(loss.seed, loss.stiffness)
    own.parameters = {name: twin(p).requires_grad_(p.requires_grad) for name, p in loss.parameters.items()}
    asked = [p for p in own.parameters.values() if p.requires_grad]
    found = torch.autograd.grad(own(batch), asked)
    gradients = dict.fromkeys(own.parameters, np.zeros(0))
    for name, parameter in own.parameters.items():
        gradients[name] = np.zeros(parameter.numel())
    for name, gradient in zip([n for n, p in own.parameters.items() if p.requires_grad], found, strict=True):
        gradients[name] = as_array(gradient)
    return gradients


def weights_of(alignment: AlignmentSpec) -> tuple[float, ...]:
    """The weight in effect of each source."""
    if isinstance(alignment.weight, tuple):
        return alignment.weight
    if alignment.weight is not None:
        return (alignment.weight,) * len(alignment.sources)
    return tuple(1.0 if source.kind in PULLING else 0.0 for source in alignment.sources)


def projecting(alignment: AlignmentSpec) -> tuple[bool, ...]:
    """Whether each source is one that the hard part acts for."""
    if alignment.project is not None:
        return (alignment.project,) * len(alignment.sources)
    return tuple(source.kind not in PULLING for source in alignment.sources)


def source_names(alignment: AlignmentSpec) -> list[str]:
    """What metrics call each source."""
    return [f"task {i}" if alignment.named else str(i) for i in range(len(alignment.sources))]


def rates(world: World, pairs: list[tuple[int, int]]) -> tuple[float, float]:
    """Decay and gain of the base's momentum in a scope, by its first parameter's group; SGD's first step takes all."""
    group = world.base.param_groups[pairs[0][0]]
    if "betas" in group:
        return float(group["betas"][0]), 1 - float(group["betas"][0])
    started = any(
        world.base.state.get(world.parameters[number], {}).get("momentum_buffer") is not None for _, number in pairs
    )
    return float(group["momentum"]), 1 - float(group["dampening"]) if started else 1.0
