"""Run one rank of test_layouts.py: ``python mesh_rank.py RANK WORLD FOLDER hsdp|tensor-parallel``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.distributed import problem
from tests.distributed.fsdp_rank import whole
from tests.distributed.launch import join

STEPS = 10


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


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
    model = net()
    if how == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
        share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    else:
        mesh = init_device_mesh("cpu", (world,))
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        share = slice(0, 8)  # every rank uses every row
    torch.save(train(model, share), folder / f"rank{rank}.pt")


if __name__ == "__main__":
    join(main)
