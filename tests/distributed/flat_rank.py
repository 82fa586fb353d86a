"""Run one rank of test_fsdp1.py: ``python flat_rank.py RANK WORLD FOLDER``; writes messages to FOLDER/rankR.pt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.fsdp import FullyShardedDataParallel

from gradguide import Direction, GradGuide, SourceGradient
from tests.distributed import problem
from tests.distributed.launch import join


def refusal(work: Callable[[], object]) -> str | None:
    try:
        work()
    except ValueError as error:
        return str(error)
    return None


def refusals(kind: str) -> dict[str, str | None]:
    """Return the errors for a wrapped model, with ``use_orig_params`` ("original") or without ("flat")."""
    model = problem.net()
    early = GradGuide(torch.optim.SGD(model.parameters(), lr=0.1), direction=Direction())
    wrapped = FullyShardedDataParallel(model, use_orig_params=kind == "original", device_id=torch.device("cpu"))
    base = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    batches = [problem.batch(step) for step in range(2)]
    messages = {
        f"{kind}, new": refusal(lambda: GradGuide(base, direction=Direction())),
        f"{kind}, capture": refusal(
            lambda: SourceGradient.capture(wrapped, batches, lambda m, b: problem.loss_of(m, *b))
        ),
    }
    if kind == "original":  # wrapped after the optimizer was created
        problem.loss_of(wrapped, *problem.batch(0)).backward()
        before = [p.detach().clone() for p in wrapped.parameters()]
        messages[f"{kind}, step"] = refusal(early.step)
        assert all(map(torch.equal, before, wrapped.parameters()))
    return messages


def main(rank: int, world: int, folder: Path) -> None:
    torch.save(refusals("original") | refusals("flat"), folder / f"rank{rank}.pt")


if __name__ == "__main__":
    join(main)
