"""One rank of test_fsdp1.py: ``python flat_rank.py RANK WORLD FOLDER``; writes what it was told to FOLDER/rankR.pt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.fsdp import FullyShardedDataParallel

from gradguide import GradGuide, SourceGradient
from tests.distributed import problem
from tests.distributed.launch import join


def refusal(work: Callable[[], object]) -> str | None:
    try:
        work()
    except ValueError as error:
        return str(error)
    return None


def main(rank: int, world: int, folder: Path) -> None:
    told: dict[str, str | None] = {}
    for original in (True, False):
        model = problem.net()
        early = GradGuide(torch.optim.SGD(model.parameters(), lr=0.1)) if original else None
        wrapped = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        base = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        kind = "original" if original else "flat"
        told[f"{kind}, new"] = refusal(lambda base=base: GradGuide(base))  # type: ignore[misc]
        batches = [problem.batch(step) for step in range(2)]
        told[f"{kind}, capture"] = refusal(
            lambda model=wrapped, batches=batches: SourceGradient.capture(  # type: ignore[misc]
                model, batches, lambda m, b: problem.loss_of(m, *b)
            )
        )
        if early is not None:  # wrapped after the optimizer was made
            problem.loss_of(wrapped, *problem.batch(0)).backward()
            before = [p.detach().clone() for p in wrapped.parameters()]
            told[f"{kind}, step"] = refusal(early.step)
            assert all(map(torch.equal, before, wrapped.parameters()))
    torch.save(told, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    join(main)
