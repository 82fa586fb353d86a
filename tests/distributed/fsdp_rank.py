"""Run one rank of test_fsdp.py: ``python fsdp_rank.py RANK WORLD FOLDER``; writes results to FOLDER/rankR.pt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from gradguide import SourceGradient
from gradguide.distributed import layouts as sharding
from tests.distributed import problem
from tests.distributed.counting import all_reduce, counted
from tests.distributed.launch import join


def run(kind: str, mesh: Any, rank: int, world: int) -> dict[str, Any]:
    model = problem.net()
    fully_shard(model, mesh=mesh, ignored_params={model.gain})
    optimizer = problem.guide(model, kind)
    calls: list[int] = []
    metrics = []
    for step in range(problem.STEPS):
        x, y = problem.share(*problem.batch(step), rank, world)

        def evaluate(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = problem.loss_of(model, x, y)
            loss.backward()
            gain = model.gain.grad
            assert gain is not None
            all_reduce(gain)  # FSDP ignores this parameter, so its user reduces the gradient
            gain /= world
            return loss

        with counted(calls):
            optimizer.step(evaluate)
        metrics.append(optimizer.metrics() if rank == 0 else {})  # no collective: one rank can call it alone
    directions = {
        name: sharding.as_dtensor(optimizer._engine.directions[p], p)
        for name, p in model.named_parameters()
        if p in optimizer._engine.directions
    }
    return {
        "parameters": {name: whole(p) for name, p in model.named_parameters()},
        "directions": {name: whole(d) for name, d in directions.items()},
        "metrics": metrics,
        "all_reduces": calls,
    }


def capture(mesh: Any, rank: int, world: int, folder: Path, divisor: float | None = None) -> None:
    """Capture over this rank's half of each batch, with existing gradients that must not change."""
    model = problem.net()
    sharded = fully_shard(model, mesh=mesh, ignored_params={model.gain})
    if divisor is not None:
        sharded.set_gradient_divide_factor(divisor)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo cannot scale
    problem.loss_of(model, *problem.batch(99)).backward()
    held = {name: p.grad for name, p in model.named_parameters()}
    copies = {name: None if g is None else whole(g) for name, g in held.items()}
    halves = [tuple(t.chunk(world)[rank] for t in problem.batch(step)) for step in range(3)]
    source = SourceGradient.capture(model, halves, lambda m, b: problem.loss_of(m, *b))
    source.save(folder / f"captured{rank}{'' if divisor is None else '-divided'}.safetensors")
    for name, p in model.named_parameters():
        before = copies[name]
        assert p.grad is held[name], name
        assert before is None or (p.grad is not None and torch.equal(whole(p.grad), before)), name


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def main(rank: int, world: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (world,))
    torch.save({kind: run(kind, mesh, rank, world) for kind in problem.KINDS}, folder / f"rank{rank}.pt")
    capture(mesh, rank, world, folder)
    if hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):  # newer versions of torch
        capture(mesh, rank, world, folder, divisor=1.0)


if __name__ == "__main__":
    join(main)
