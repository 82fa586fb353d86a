"""One rank of test_disagreement.py: ``python disagree_rank.py RANK WORLD FOLDER WHAT``; prints its step's error."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from gradguide import Alignment, Direction, GradGuide
from tests.distributed import problem
from tests.distributed.launch import join


def main(rank: int, world: int, folder: Path, what: str) -> None:
    model = problem.net()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    odd = rank == 1
    source = problem.source(1)
    names = [(name, p) for name, p in model.named_parameters() if name != "gain"]
    base = AdamW(model.parameters(), lr=0.02)
    match what:
        case "sources":
            source = problem.source(2 if odd else 1)
        case "order":
            base = AdamW(list(model.parameters())[:: -1 if odd else 1], lr=0.02)
        case "scopes":
            pass
    scope = "tensor" if odd and what == "scopes" else "global"
    direction = Direction(decay=0.5 if odd and what == "rules" else 0.9)
    optimizer = GradGuide(base, direction=direction, alignment=Alignment(source), names=names, scope=scope)
    problem.loss_of(model, *problem.batch(0)).backward()
    before = [p.to_local().clone() for p in model.parameters()]  # type: ignore[attr-defined]
    try:
        optimizer.step()
        print("stepped")
    except ValueError as error:
        same = all(
            torch.equal(p.to_local(), old)  # type: ignore[attr-defined]
            for p, old in zip(model.parameters(), before, strict=True)
        )
        print(f"refused, parameters {'unchanged' if same else 'changed'}: {error}")


if __name__ == "__main__":
    join(main)
