"""Run one rank of test_replay.py: ``python replay_rank.py RANK WORLD FOLDER``; writes results to FOLDER/rankR.pt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradguide import Alignment, GradGuide, ReplaySource, SourceGradient, StructuredSource
from tests.distributed import problem
from tests.distributed.fsdp_rank import whole
from tests.distributed.launch import join


def run(kind: str, every: int, rank: int, world: int) -> dict[str, Any]:
    """Train with ``kind``. Under FSDP one parameter is not sharded, and its gradient is summed here."""
    model = problem.net()
    trained: nn.Module = model
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)), ignored_params={model.gain})
    else:
        trained = DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)
    # The wrapper averages gradients. Without it, the source has to.
    replayed = model if kind == "ddp, bare loss" else trained
    optimizer = problem.guide_by_replay(model, replayed, every, rank, world)
    for step in range(problem.STEPS):
        optimizer.zero_grad()
        problem.loss_of(trained, *problem.share(*problem.batch(step), rank, world)).backward()
        if kind == "fsdp":
            assert model.gain.grad is not None
            dist.all_reduce(model.gain.grad)
            model.gain.grad /= world
        optimizer.step()
    return {
        "parameters": {name: whole(p) for name, p in model.named_parameters()},
        "conflicts": optimizer.metrics()["conflict"],
    }


def alone(rank: int, world: int) -> dict[str, float]:
    """Return numbers of the sources of a model that each rank trains alone, in a process group of its own."""
    own = [dist.new_group([each]) for each in range(world)][rank]
    model = nn.Linear(2, 1, bias=False)
    return sources_of(model, DistributedDataParallel(model, process_group=own), rank)


def on_submesh(rank: int) -> dict[str, float]:
    """Return numbers of the sources of a model that FSDP2 shards over rank 0 alone. Other ranks do nothing."""
    mesh = DeviceMesh("cpu", [0])
    if rank > 0:
        return {}
    model = nn.Linear(2, 1, bias=False)
    fully_shard(model, mesh=mesh)
    return sources_of(model, model, rank)


def sources_of(model: nn.Linear, wrapped: nn.Module, rank: int) -> dict[str, float]:
    rows = torch.full((3 + rank, 2), 1.0 + rank)

    source = ReplaySource([rows], lambda batch: wrapped(batch).mean())
    optimizer = GradGuide(torch.optim.SGD(model.parameters(), lr=0.1), alignment=Alignment(source), names=model)
    wrapped(rows).square().sum().backward()
    optimizer.step()
    copy.deepcopy(optimizer)  # without the group, which cannot be copied

    def loss(module: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        return module(batch).mean(), len(batch)

    captured = SourceGradient.capture(wrapped, [rows, rows], loss)
    structured = StructuredSource.capture(wrapped, [rows, rows], loss, rank=1)
    at = [whole(model.weight)]
    return {
        "replayed": float(source.row(["weight"], at).value(0, torch.float32)[0]),
        "captured": captured.metadata["examples"],
        "structured": structured.metadata["predictions"],
    }


def main(rank: int, world: int, folder: Path) -> None:
    found: dict[str, Any] = {f"{kind}, {every}": run(kind, every, rank, world) for kind, every in problem.REPLAYS}
    found["alone"], found["submesh"] = alone(rank, world), on_submesh(rank)
    torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    join(main)
