"""Run one rank of test_checkpoints.py: ``python checkpoint_rank.py RANK WORLD FOLDER ACTION-NAME...``.

Each action has a model and an optimizer of its own. "save" trains, writes a distributed checkpoint to FOLDER/NAME and
continues; "load" starts from that checkpoint. Both write the final parameters to FOLDER/NAME-ACTION-WORLD.pt.
"allocate" has no name: it saves and loads before the first step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW

from gradguide import Alignment, GradGuide, Regularizer, ReplaySource
from tests.distributed import problem
from tests.distributed.fsdp_rank import whole
from tests.distributed.launch import join

HALF = 6


def main(rank: int, world: int, folder: Path, *actions: str) -> None:
    for each in actions:
        if each == "allocate":
            allocate(world)
        else:
            train(rank, world, folder, *each.split("-"))


def allocate(world: int) -> None:
    """Save and load where the base has no state: torch then makes a step on zeros, without a closure."""
    drawn: list[Tensor] = []
    for kind in (AdamW, SGD):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))

        def loss(batch: Tensor, model: nn.Module = model) -> Tensor:
            drawn.append(batch)
            value: Tensor = model(batch).square().mean()
            return value

        replay = Alignment(ReplaySource([torch.ones(2, 4)], loss))
        for options in ({"regularizer": Regularizer(magnitude=0.1)}, {"alignment": replay, "names": model}):
            optimizer = GradGuide(kind(model.parameters(), lr=0.1), **options)
            state = get_optimizer_state_dict(model, optimizer)
            set_optimizer_state_dict(model, optimizer, state)
            assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    assert drawn == []


def train(rank: int, world: int, folder: Path, action: str, name: str) -> None:
    model = problem.net()
    model.unused.requires_grad_(False)  # torch's loader needs state for every trainable parameter, before any step
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = problem.guide(model, "update")
    if action == "save":
        problem.train(model, optimizer, range(HALF), rank, world)
        weights, state = get_state_dict(model, optimizer)
        save({"model": weights, "optimizer": state}, checkpoint_id=folder / name)
    else:
        weights, state = get_state_dict(model, optimizer)
        held: dict[str, Any] = {"model": weights, "optimizer": state}
        load(held, checkpoint_id=folder / name)
        set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    problem.train(model, optimizer, range(HALF, 2 * HALF), rank, world)
    result = {"steps": torch.tensor(optimizer.metrics()["steps"]), **{n: whole(p) for n, p in model.named_parameters()}}
    if rank == 0:
        torch.save(result, folder / f"{name}-{action}-{world}.pt")


if __name__ == "__main__":
    join(main)
