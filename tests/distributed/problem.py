"""A problem for one process and two ranks: uneven shards, a replicated parameter, and an unused one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import AdamW

from gradguide import Alignment, Direction, GradGuide, Magnitude, Regularizer, ReplaySource, SourceGradient

STEPS = 20
KINDS = ("no source", "gradient", "update", "shared", "module", "tensor", "two sources", "regularizer")
REPLAYS = (("ddp", 1), ("ddp", 3), ("ddp, bare loss", 1), ("fsdp", 1), ("fsdp", 3))
"""The wrapper of the ranks, and the interval of a live source in steps."""


def close(found: Tensor, wanted: Tensor, kind: str, name: str) -> None:
    """Assert equality up to rounding. A difference quotient divides its rounding error by the step of about 1e-3."""
    loose = 5.0 if kind == "regularizer" else 1.0
    torch.testing.assert_close(found, wanted, rtol=2e-4 * loose, atol=2e-5 * loose, msg=name)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.last = nn.Linear(7, 3)
        self.unused = nn.Linear(3, 2)
        self.gain = nn.Parameter(torch.ones(7))  # replicated on every rank

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.tanh(self.first(x)) * self.gain)
        return found


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def share(x: Tensor, y: Tensor, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Return a rank's part of a batch."""
    part = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
    return x[part], y[part]


def train(model: nn.Module, optimizer: GradGuide, steps: range = range(STEPS), rank: int = 0, world: int = 1) -> None:
    """Train on this rank's part of each batch."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, *share(*batch(step), rank, world)).backward()
        optimizer.step()


def source(seed: int, without: tuple[str, ...] = ("gain",)) -> SourceGradient:
    """Return a source for every parameter except those named; the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in net().named_parameters() if name not in without}
    tables = [{n: 0.1 * torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(3)]
    fisher = {name: t.abs() for name, t in tables[1].items()}
    return SourceGradient(tables[0], fisher=fisher, anchor=tables[2])


def guide(model: nn.Module, kind: str) -> GradGuide:
    base = AdamW(model.parameters(), lr=0.02)
    names = [(name, p) for name, p in model.named_parameters() if name != "gain"]
    match kind:
        case "gradient":
            return GradGuide(
                base,
                alignment=Alignment(source(1), on="gradient", weight=0.5),
                magnitude=Magnitude(max_norm=0.1, max_update=None),
                names=names,
                direction=Direction(),
            )
        case "update":
            return GradGuide(
                base, alignment=Alignment(source(1).anchored(), project=True), names=names, direction=Direction()
            )
        case "two sources":
            return GradGuide(
                base, alignment=Alignment([source(1), source(2)], weight=1.0), names=names, direction=Direction()
            )
        case "shared":
            return GradGuide(base, direction=Direction(share_momentum=True), magnitude=Magnitude(max_update=None))
        case "regularizer":
            terms = Regularizer(direction=0.3, magnitude=0.1, alignment=0.2, source=source(2), warmup=3)
            return GradGuide(
                base, alignment=Alignment(source(1), weight=0.1), regularizer=terms, names=names, direction=Direction()
            )
        case "module" | "tensor":
            return GradGuide(base, scope=kind, names=model.named_parameters(), direction=Direction())
    return GradGuide(base, direction=Direction())


def guide_by_replay(model: nn.Module, replayed: nn.Module, every: int, rank: int, world: int) -> GradGuide:
    """Return an optimizer guided by this rank's part of live batches of another task, run through ``replayed``."""
    batches = [share(*batch(900 + k), rank, world) for k in range(3)]
    live = ReplaySource(batches, lambda b: loss_of(replayed, *b), every)
    base = AdamW(model.parameters(), lr=0.02)
    return GradGuide(
        base,
        alignment=Alignment([live, source(1, without=())], weight=[0.5, 0.1]),
        names=model.named_parameters(),
        direction=Direction(),
    )


def guide_for_deepspeed(model: Net) -> GradGuide:
    """Return an optimizer guided by a source. The unused parameter is frozen, since ZeRO waits for its gradient."""
    model.unused.requires_grad_(False)
    base = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    unknown = ("gain", "unused.weight", "unused.bias")
    names = [(name, p) for name, p in model.named_parameters() if name not in unknown]
    return GradGuide(base, alignment=Alignment(source(1, unknown)), names=names, direction=Direction())


def alone(kind: str) -> dict[str, Any]:
    """Train in one process; return parameters, directions and the metrics of each step."""
    model = net()
    optimizer = guide(model, kind)
    metrics = []
    for step in range(STEPS):

        def evaluate(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, *batch(step))
            loss.backward()
            return loss

        optimizer.step(evaluate)
        metrics.append(optimizer.metrics())
    directions = optimizer._engine.directions
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "directions": {name: directions[p] for name, p in model.named_parameters() if p in directions},
        "metrics": metrics,
    }
