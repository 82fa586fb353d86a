"""Run one rank of test_ddp.py: ``python ddp_rank.py RANK WORLD FOLDER``; writes results to FOLDER/rankR.pt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from gradguide import Direction, GradGuide, guided
from tests.distributed import problem
from tests.distributed.counting import counted
from tests.distributed.launch import join


def run(kind: str, rank: int, world: int) -> dict[str, Any]:
    model = problem.net()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)
    optimizer = problem.guide(model, kind)
    calls: list[int] = []
    metrics = []
    for step in range(problem.STEPS):
        x, y = problem.share(*problem.batch(step), rank, world)

        def evaluate(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = problem.loss_of(wrapped, x, y)
            loss.backward()
            return loss

        with counted(calls):
            optimizer.step(evaluate)
        metrics.append(optimizer.metrics())
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "metrics": metrics,
        "all_reduces": calls,
    }


def zero(rank: int, world: int) -> dict[str, Any]:
    """Train with a base whose state is sharded over ranks, and with the same base unsharded."""
    found: dict[str, Any] = {}
    for kind in ("whole", "divided"):
        model = problem.net()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        base: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        if kind == "divided":
            base = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.02)
        optimizer = GradGuide(base, direction=Direction())
        problem.train(wrapped, optimizer, rank=rank, world=world)
        found[kind] = {name: p.detach().clone() for name, p in model.named_parameters()}
        if isinstance(base, ZeroRedundancyOptimizer):
            base.consolidate_state_dict(to=0)
        if rank == 0:
            found[f"{kind} state"] = optimizer.state_dict()["state"]
    return found


def inside_zero() -> str | None:
    """Return the error if a base that partitions parameters over ranks creates a GradGuide on each rank."""
    model = problem.net()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    inner: Any = guided(torch.optim.AdamW)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), inner, lr=0.02)
    problem.loss_of(wrapped, *problem.batch(0)).backward()
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return None


def main(rank: int, world: int, folder: Path) -> None:
    found = {kind: run(kind, rank, world) for kind in problem.KINDS}
    torch.save({**found, "zero": zero(rank, world), "inside zero": inside_zero()}, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    join(main)
