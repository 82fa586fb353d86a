"""Run one rank of test_accelerate_fsdp.py: ``python accelerate_fsdp_rank.py RANK WORLD FOLDER``; writes rankR-WORLD.pt.

FSDP through the configuration of Accelerate and of Trainer. One process runs the same without FSDP.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn

from gradguide import Alignment, Direction, GradGuide, StructuredSource, unwrap
from gradguide.integrations.transformers import guide, sampled_loss
from gradguide.utils.names import model_names
from tests.distributed.fsdp_rank import whole
from tests.distributed.launch import join
from tests.distributed.trainer_rank import BATCH, STEPS, arguments_of
from tests.integrations.test_causal_trainer import texts
from tests.sources.structured import problems


def allow_fsdp_on_cpu() -> None:
    """Accelerate has FSDP for every kind of device but the CPU: call its ranks another kind."""
    AcceleratorState._reset_state()
    PartialState._shared_state.update(distributed_type=DistributedType.MULTI_XPU, device=torch.device("cpu"))


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p) for name, p in model_names(model).items() if p.requires_grad}


def accelerator_of(world: int, version: int) -> Accelerator:
    PartialState(cpu=True)
    if world == 1:
        AcceleratorState._reset_state()
        return Accelerator(cpu=True)
    allow_fsdp_on_cpu()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="size_based_wrap",
        min_num_params=10,
        state_dict_type="FULL_STATE_DICT",
        use_orig_params=True if version == 1 else None,
    )
    return Accelerator(cpu=True, fsdp_plugin=plugin)


def with_accelerate(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Train, save, and train on from the saved state."""
    accelerator = accelerator_of(world, 2)
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer: Any = GradGuide(torch.optim.AdamW(model.parameters(), lr=1e-2), names=model, direction=Direction())
    model, optimizer = accelerator.prepare(model, optimizer)

    def train(steps: range) -> None:
        for step in steps:
            rows = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
            accelerator.backward(model(rows).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    train(range(2))
    accelerator.save_state(str(folder / f"state-{world}"))
    train(range(2, STEPS))
    end = parameters(model)
    found = unwrap(optimizer)
    assert found is not None
    metrics = found.metrics()
    accelerator.load_state(str(folder / f"state-{world}"))
    train(range(2, STEPS))
    kind = accelerator.distributed_type.value
    return {"parameters": end, "resumed": parameters(model), "metrics": metrics, "kind": kind}


def trainer_of(folder: Path, world: int, source: StructuredSource, version: int) -> Any:
    torch.manual_seed(0)
    model = problems.adapted(problems.llama(layers=1))
    config: dict[str, Any] = {"version": version, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    if version == 1:
        config["sync_module_states"] = False  # it needs a GPU
    sharded = {"fsdp": True, "fsdp_config": config}
    arguments = arguments_of(folder, world, **(sharded if world > 1 else {}))
    if world > 1:
        arguments.device  # noqa: B018  # sets up the ranks
        allow_fsdp_on_cpu()
    trainer = transformers.Trainer(model, arguments, train_dataset=texts(seed=0))
    guide(trainer, alignment=Alignment(source))
    return trainer


def with_trainer(world: int, folder: Path, source: StructuredSource) -> dict[str, Any]:
    trainer = trainer_of(folder, world, source, 2)
    trainer.train()
    torch.distributed.barrier()
    resumed = trainer_of(folder, world, source, 2)
    resumed.train(resume_from_checkpoint=str(folder / f"output-{world}" / "checkpoint-2"))
    optimizer = unwrap(trainer.optimizer)
    assert optimizer is not None
    return {
        "parameters": parameters(trainer.model),
        "resumed": parameters(resumed.model),
        "metrics": optimizer.metrics(),
        "kind": trainer.accelerator.distributed_type.value,
        "logged": [row.get("gradguide/source_drift") for row in trainer.state.log_history if "loss" in row],
    }


def refusals(world: int, folder: Path, source: StructuredSource) -> dict[str, str]:
    """Return the errors with version 1."""
    accelerator = accelerator_of(world, 1)
    found = {}
    model: Any = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    try:
        model = accelerator.prepare(model)
        accelerator.prepare(GradGuide(torch.optim.AdamW(model.parameters()), direction=Direction()))
    except ValueError as error:
        found["accelerate"] = str(error)
    try:
        trainer_of(folder, world, source, 1).train()
    except ValueError as error:
        found["trainer"] = str(error)
    return found


def main(rank: int, world: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # Accelerate wants them; the group exists already
    warnings.simplefilter("ignore")
    torch.manual_seed(7)  # labels are drawn from the model
    if world == 1:
        StructuredSource.capture(problems.llama(layers=1), problems.text(4), sampled_loss, rank=None).save(
            folder / "source.safetensors"
        )
    source = StructuredSource.load(folder / "source.safetensors")
    found = {"accelerate": with_accelerate(rank, world, folder), "trainer": with_trainer(world, folder, source)}
    if world > 1:
        found["refusals"] = refusals(world, folder, source)
    torch.save(found, folder / f"rank{rank}-{world}.pt")


if __name__ == "__main__":
    join(main)
