"""Run one rank of test_checkpoints.py: ``python checkpoint_rank.py RANK WORLD FOLDER ACTION-NAME...``.

Each action has a model and an optimizer of its own. "save" trains, writes a distributed checkpoint to FOLDER/NAME and
continues; "load" starts from that checkpoint. Both write the final parameters to FOLDER/NAME-ACTION-WORLD.pt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.distributed import problem
from tests.distributed.fsdp_rank import whole
from tests.distributed.launch import join

HALF = 6


def main(rank: int, world: int, folder: Path, *actions: str) -> None:
    for each in actions:
        train(rank, world, folder, *each.split("-"))


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
