"""Run one rank of test_trainer.py: ``python trainer_rank.py RANK WORLD FOLDER``; writes FOLDER/rankR-WORLD.pt.

Trainer with ``guide``, under DDP if there are several ranks, resumed from a checkpoint in the end.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from gradguide import Alignment, Direction, StructuredSource, unwrap
from gradguide.integrations.transformers import guide, sampled_loss
from tests.contract.kit import parameters_of
from tests.distributed.launch import join
from tests.integrations.test_causal_trainer import texts
from tests.sources.structured import problems

STEPS = 4
BATCH = 4
"""Rows per step, over all ranks."""


def arguments_of(folder: Path, world: int, **options: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        str(folder / f"output-{world}"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // world,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        ddp_backend="gloo" if world > 1 else None,
        average_tokens_across_devices=False,
        **options,
    )


def trainer_of(folder: Path, world: int, source: StructuredSource) -> Any:
    torch.manual_seed(0)
    model = problems.adapted(problems.llama(layers=1))
    arguments = arguments_of(folder, world)
    trainer = transformers.Trainer(model, arguments, train_dataset=texts(seed=0))
    guide(trainer, alignment=Alignment(source), direction=Direction(decay=0.8))
    return trainer


def main(rank: int, world: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # Accelerate wants them; the group exists already
    warnings.simplefilter("ignore")
    torch.manual_seed(7)  # labels are drawn from the model
    batches = problems.text(4)[rank::world]
    source = StructuredSource.capture(problems.llama(layers=1), batches, sampled_loss, rank=None)
    if rank == 0:
        source.save(folder / f"source-{world}.safetensors")
    torch.distributed.barrier()
    source = StructuredSource.load(folder / "source-1.safetensors")
    trainer = trainer_of(folder, world, source)
    trainer.train()
    torch.distributed.barrier()
    resumed = trainer_of(folder, world, source)
    resumed.train(resume_from_checkpoint=str(folder / f"output-{world}" / "checkpoint-2"))
    optimizer = unwrap(trainer.optimizer)
    assert optimizer is not None
    found = {
        "parameters": parameters_of(trainer.model),
        "resumed": parameters_of(resumed.model),
        "metrics": optimizer.metrics(),
        "wrapped": type(trainer.model_wrapped).__name__,
        "logged": [row.get("gradguide/source_drift") for row in trainer.state.log_history if "loss" in row],
    }
    torch.save(found, folder / f"rank{rank}-{world}.pt")


if __name__ == "__main__":
    join(main)
