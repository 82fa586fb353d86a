"""Run one rank of test_layouts.py: ``python mesh_rank.py RANK WORLD FOLDER hsdp|tensor-parallel|sequence-parallel``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from gradguide import Alignment, GradGuide, ReplaySource, SourceGradient
from tests.distributed import problem
from tests.distributed.fsdp_rank import whole
from tests.distributed.launch import join

STEPS = 10


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(5), *net())


def capture(model: nn.Module) -> str:
    """Return the error of a capture."""
    try:
        SourceGradient.capture(model, [problem.batch(k) for k in range(2)], lambda m, batch: problem.loss_of(m, *batch))
    except ValueError as error:
        return str(error)
    return ""


def replay(model: nn.Module) -> dict[str, Any]:
    """Train all parameters with live batches of another task, which every rank has."""
    live = ReplaySource([problem.batch(900 + k) for k in range(3)], lambda batch: problem.loss_of(model, *batch))
    base = torch.optim.AdamW(model.parameters(), lr=0.02)
    optimizer = GradGuide(base, alignment=Alignment(live, weight=0.5), names=model)
    problem.train(model, optimizer, range(STEPS))
    return {"metrics": optimizer.metrics(), **{name: whole(p) for name, p in model.named_parameters()}}


def train(model: nn.Module, share: slice) -> dict[str, Any]:
    """Train with every mechanism except a source, whose tables belong to another model."""
    optimizer = problem.guide(model, "no source")
    for step in range(STEPS):
        x, y = problem.batch(step)
        optimizer.zero_grad()
        problem.loss_of(model, x[share], y[share]).backward()
        optimizer.step()
    return {"metrics": optimizer.metrics(), **{name: whole(p) for name, p in model.named_parameters()}}


def main(rank: int, world: int, folder: Path, how: str) -> None:
    if how == "sequence-parallel":
        model = normed()
        layers = {
            "": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(0),)),
            "0": SequenceParallel(sequence_dim=0),
            "1": ColwiseParallel(input_layouts=Shard(0)),
            "3": RowwiseParallel(),
        }
        parallelize_module(model, init_device_mesh("cpu", (world,)), layers)
        torch.save(replay(model), folder / f"rank{rank}.pt")
        return
    model = net()
    if how == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
        share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    else:
        mesh = init_device_mesh("cpu", (world,))
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        share = slice(0, 8)  # every rank uses every row
    error = capture(model) if how == "tensor-parallel" else ""
    torch.save({**train(model, share), "capture": error}, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    join(main)
