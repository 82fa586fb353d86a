"""Run one rank of test_lacking.py: ``python lacking_rank.py RANK WORLD FOLDER``; writes results to FOLDER/rankR.pt.

On rank 1, gradients are missing or one is not finite.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradguide import Direction, GradGuide
from tests.distributed import problem
from tests.distributed.counting import all_reduce, counted
from tests.distributed.fsdp_rank import whole
from tests.distributed.launch import join

KINDS = ("no source", "gradient", "update", "tensor", "two sources", "regularizer")
NOT_FINITE = ("ddp", "fsdp", "fsdp, whole parameter")
POLICIES = ("skip", "raise")


def sharded(world: int) -> problem.Net:
    model = problem.net()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)), ignored_params={model.gain})
    return model


def give_gradients(model: problem.Net, step: int, rank: int, world: int) -> None:
    problem.loss_of(model, *problem.share(*problem.batch(step), rank, world)).backward()
    assert model.gain.grad is not None
    all_reduce(model.gain.grad)  # FSDP ignores this parameter, so its user reduces the gradient
    model.gain.grad /= world


def lacking(kind: str, rank: int, world: int) -> dict[str, Any]:
    """Make three steps: with all gradients, without gradients on rank 1, without gradients on both ranks."""
    model = sharded(world)
    optimizer = problem.guide(model, kind)
    calls: list[list[int]] = []
    messages: list[list[str]] = []
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            give_gradients(model, step, rank, world)
            if step == 2 or (step == 1 and rank == 1):
                optimizer.zero_grad()
            return torch.zeros(())

        calls.append([])
        with warnings.catch_warnings(record=True) as caught, counted(calls[-1]):
            warnings.simplefilter("always")
            optimizer.step(closure)
        messages.append([str(each.message) for each in caught])
    return {"calls": calls, "warnings": messages, "parameters": {n: whole(p) for n, p in model.named_parameters()}}


def not_finite(how: str, policy: str, rank: int, world: int) -> dict[str, Any]:
    """Make three steps, with a gradient of rank 1 that is not finite in the second; return the state of the rank."""
    model = problem.net() if how == "ddp" else sharded(world)
    trained: nn.Module = DistributedDataParallel(model, find_unused_parameters=True) if how == "ddp" else model
    base = torch.optim.AdamW(model.parameters(), lr=0.02)
    optimizer = GradGuide(base, nonfinite=policy, names=model.named_parameters(), direction=Direction())
    error, unchanged = None, True
    for step in range(3):
        optimizer.zero_grad()
        x, y = problem.share(*problem.batch(step), rank, world)
        bad = step == 1 and rank == 1
        loss = problem.loss_of(trained, x * float("nan") if bad and how != "fsdp, whole parameter" else x, y)
        loss.backward()
        if bad and how == "fsdp, whole parameter":
            assert model.gain.grad is not None
            model.gain.grad[0] = float("inf")
        before = [whole(p) for p in model.parameters()]
        try:
            optimizer.step()
        except FloatingPointError as found:
            error = str(found)
        if step == 1:
            unchanged = all(torch.equal(whole(p), old) for p, old in zip(model.parameters(), before, strict=True))
    metrics = optimizer.metrics()
    return {"error": error, "unchanged": unchanged, "steps": metrics["steps"], "skipped": metrics["skipped"]}


def main(rank: int, world: int, folder: Path) -> None:
    found: dict[str, Any] = {f"lacking, {kind}": lacking(kind, rank, world) for kind in KINDS}
    for how in NOT_FINITE:
        found |= {f"{how}, {policy}": not_finite(how, policy, rank, world) for policy in POLICIES}
    torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    join(main)
