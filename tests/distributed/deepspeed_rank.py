"""Run one rank of test_deepspeed.py: ``python deepspeed_rank.py RANK WORLD FOLDER``; writes FOLDER/rankR.pt.

It uses the real DeepSpeed on a CPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from gradguide import Direction, GradGuide
from tests.distributed import problem
from tests.distributed.launch import join

STEPS = 3
CASES = ((0, "float32"), (1, "float32"), (1, "bfloat16"), (2, "float32"), (3, "float32"), (3, "bfloat16"))
"""ZeRO stages and parameter dtypes."""


def engine_of(model: nn.Module, optimizer: GradGuide, stage: int, precision: str) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bfloat16"},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def weights(model: nn.Module, stage: int) -> dict[str, Tensor]:
    """Return the whole parameters."""
    held = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(held.values()), enabled=stage == 3):
        return {name: p.detach().float().clone() for name, p in held.items()}


def refusal(work: Any) -> str | None:
    try:
        work()
    except RuntimeError as error:
        return str(error)
    return None


def run(stage: int, precision: str, rank: int, world: int) -> dict[str, Any]:
    model = problem.net()
    optimizer = problem.guide_for_deepspeed(model)
    engine = engine_of(model, optimizer, stage, precision)
    before = weights(model, stage)
    at_step = None
    for step in range(STEPS):
        x, y = problem.share(*problem.batch(step), rank, world)
        engine.backward(problem.loss_of(engine, x.to(getattr(torch, precision)), y))
        at_step = refusal(engine.step)
        if at_step is not None:
            break
    # A GradGuide around the partitioned parameters raises at once.
    late = refusal(lambda: GradGuide(torch.optim.SGD(optimizer.param_groups, lr=0.1), direction=Direction()))
    return {
        "at step": at_step,
        "late": late,
        "before": before,
        "after": weights(model, stage),
        "metrics": optimizer.metrics(),
    }


def main(rank: int, world: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    # DeepSpeed compiles it at first use, which needs a compiler; gloo is equivalent.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo", verbose=False)
    torch.save({case: run(*case, rank, world) for case in CASES}, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    join(main)
