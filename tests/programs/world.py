"""The real thing: parameters, base optimizer and GradGuide of a program, and what its events do to them."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradguide import Alignment, GradGuide, ReplaySource, SourceGradient
from tests.programs.numbers import DTYPES, drawn, laid_out
from tests.programs.program import AlignmentSpec, Program, Replace, SourceSpec

__all__ = ["ReplayLoss", "Tables", "World"]

BASES: dict[str, type[Optimizer]] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
}

Tables = dict[str, dict[str, Tensor]]
"""What a stored source is made of: "gradient", "fisher" and "anchor", each by parameter name."""


class ReplayLoss:
    """A quadratic around another target for each batch, over parameters that may be exchanged."""

    def __init__(self, seed: int, stiffness: float) -> None:
        self.seed = seed
        self.stiffness = stiffness
        self.parameters: dict[str, Tensor] = {}

    def __call__(self, batch: int) -> Tensor:
        total = torch.zeros(())
        for number, parameter in enumerate(self.parameters.values()):
            if parameter.requires_grad:
                target = drawn((self.seed, batch, number), tuple(parameter.shape), 1.0, parameter.dtype)
                total = total + (parameter - target).square().sum().to(torch.float64) * (self.stiffness / 2)
        return total


class World:
    """What a user has while a program runs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.parameters = [
            nn.Parameter(drawn((spec.seed,), spec.shape, spec.scale, DTYPES[spec.dtype])) for spec in program.parameters
        ]
        self.added = list(range(program.started))
        self.known = set(range(len(self.parameters)))
        if program.late:
            self.known = {number for _, _, number in self.present()}
        self.spec = program.alignment
        self.tables: list[Tables | None] = []
        self.losses: list[ReplayLoss | None] = []
        self.alignment: Alignment | None = None
        base = self.make_base()
        if self.spec is not None:
            self.make_alignment(self.spec)
        self.guide = self.make_guide(base)

    @property
    def base(self) -> Optimizer:
        """The base optimizer."""
        return self.guide.base

    def named(self, number: int) -> bool:
        """Whether GradGuide has a name for a parameter."""
        return self.program.parameters[number].named and number in self.known

    @property
    def names(self) -> dict[str, Tensor]:
        """The parameters with names in GradGuide, including those of groups that are added later."""
        specs = self.program.parameters
        return {specs[n].name: p for n, p in enumerate(self.parameters) if self.named(n)}

    def sign(self, group: int) -> float:
        """-1 for a group that maximizes, else 1: what turns its gradients into those of descent."""
        return -1.0 if self.base.param_groups[group].get("maximize", False) else 1.0

    def present(self) -> list[tuple[int, int, int]]:
        """Group, place in it and number of each parameter that the optimizer has."""
        members = [self.program.groups[group].members for group in self.added]
        return [(g, place, number) for g, group in enumerate(members) for place, number in enumerate(group)]

    def group_options(self, group: int) -> dict[str, Any]:
        """A param group to be given to an optimizer."""
        spec = self.program.groups[group]
        return {"params": [self.parameters[number] for number in spec.members], **dict(spec.options)}

    def make_base(self) -> Optimizer:
        """The base optimizer over the groups that were added so far."""
        groups = [self.group_options(group) for group in self.added]
        options: dict[str, Any] = dict(self.program.options)
        return BASES[self.program.base](groups, **options)

    def make_guide(self, base: Optimizer) -> GradGuide:
        """A GradGuide around ``base`` with the program's options and the present alignment."""
        program = self.program
        scope: Any = program.scope
        if isinstance(scope, tuple):
            scope = {p: label for p, label in zip(self.parameters, scope, strict=True) if label}
        return GradGuide(
            base,
            direction=program.direction,
            alignment=self.alignment,
            magnitude=program.magnitude,
            scope=scope,
            names=self.names or None,
            nonfinite=program.nonfinite,
            backend=program.backend,
        )

    def make_alignment(self, spec: AlignmentSpec) -> None:
        """Sources over the named parameters that the optimizer has, as they are now."""
        self.spec, self.tables, self.losses = spec, [], []
        names = self.names
        known = [self.program.parameters[number].name for _, _, number in self.present() if self.named(number)]
        known = [name for name in known if spec.frozen or names[name].requires_grad]
        made: list[SourceGradient | ReplaySource] = []
        for source in spec.sources:
            if source.kind == "replay":
                loss = ReplayLoss(source.seed, source.scale)
                loss.parameters = self.names
                self.losses.append(loss)
                self.tables.append(None)
                made.append(ReplaySource([0, 1, 2], loss, every=source.every))
                continue
            tables = self.make_tables(source, known)
            self.losses.append(None)
            self.tables.append(tables)
            stored = SourceGradient(tables.get("gradient"), fisher=tables.get("fisher"), anchor=tables.get("anchor"))
            made.append(stored.anchored() if source.kind == "anchored" else stored)
        given: Any = {f"task {i}": each for i, each in enumerate(made)} if spec.named else made
        given = made[0] if len(made) == 1 and not spec.named else given
        self.alignment = Alignment(given, on=spec.on, weight=spec.weight, project=spec.project)

    def make_tables(self, source: SourceSpec, known: list[str]) -> Tables:
        """The numbers of a stored source."""
        kept = None if source.like is None else self.tables[source.like]
        dtype = DTYPES[source.dtype]
        names, tables = self.names, Tables()
        if source.kind != "pulling":
            table = {}
            for number, name in enumerate(known):
                values = drawn((source.seed, number), tuple(names[name].shape), source.scale, dtype)
                if kept is not None and "gradient" in kept:
                    values = kept["gradient"][name].to(dtype) * source.sign
                table[name] = values
            tables["gradient"] = table
        if source.kind != "fixed":
            tables["fisher"] = {
                name: drawn((source.seed, 7, number), tuple(names[name].shape), 1.0, dtype).square() * source.curvature
                for number, name in enumerate(known)
            }
            tables["anchor"] = {name: names[name].detach().clone() for name in known}
        return tables

    # What events do.

    def add_group(self, group: int) -> None:
        """Add one of the program's groups."""
        self.guide.add_param_group(self.group_options(group))
        self.added.append(group)

    def set_alignment(self, spec: AlignmentSpec | None) -> None:
        """Align with other sources from now on."""
        if spec is None:
            self.spec, self.alignment, self.tables, self.losses = None, None, [], []
        else:
            if self.program.late:
                self.known |= {number for _, _, number in self.present()}
            self.make_alignment(spec)
        self.guide.set_alignment(self.alignment, self.names if self.program.late else None)

    def replace(self, event: Replace) -> None:
        """Give a parameter other data, as a user's code would."""
        parameter = self.parameters[event.parameter]
        shape = tuple(parameter.shape)
        if event.how == "swapped":
            other = self.parameters[event.other]
            if other.shape == parameter.shape and other.dtype == parameter.dtype:
                parameter.data, other.data = other.data, parameter.data
        elif event.how == "values":
            with torch.no_grad():
                parameter.copy_(drawn((event.seed,), shape, 1.0, parameter.dtype))
        elif event.how in DTYPES:
            dtype = DTYPES[event.how]
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            for key, value in self.base.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and key != "step":
                    self.base.state[parameter][key] = value.to(dtype)
        elif event.how == "transposed":
            if parameter.dim() == 2 and shape[0] == shape[1]:
                parameter.data = parameter.data.t()
        else:
            parameter.data = laid_out(parameter.data, event.how)

    def round_trip(self, how: str) -> None:
        """Go on with a copy."""
        together = [self.parameters, self.guide, self.losses, self.alignment]
        if how in ("deepcopy", "pickle"):
            copied: Any = copy.deepcopy(together) if how == "deepcopy" else pickle.loads(pickle.dumps(together))
            self.parameters, self.guide, self.losses, self.alignment = copied
            return
        state: Any = self.guide.state_dict()
        if how == "file":
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            state = torch.load(buffer, weights_only=True)
            self.parameters = [nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in self.parameters]
            for loss in self.losses:
                if loss is not None:
                    loss.parameters = self.names
        self.guide = self.make_guide(self.make_base())
        self.guide.load_state_dict(state)
