"""Run one rank of test_distributed.py: ``python gloo_rank.py RANK WORLD FOLDER ACTION``.

Writes results to FOLDER/ACTION-rankR.pt. The functions also run in one process, with world 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gradguide import Alignment, Direction, GradGuide
from gradguide.sources.structured import StructuredSource
from tests.distributed.fsdp_rank import whole
from tests.distributed.launch import join
from tests.sources.structured.problems import adapted, llama, spread, text

STEPS = 4


class Mlp(nn.Module):
    """Two linear layers, one for each direction of tensor parallelism."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(torch.tanh(self.up(x)))
        return found


class Gated(nn.Module):
    """Layers of which a batch reaches some: ``low`` for negative inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.twin, self.low, self.high = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x < 0).all()):
            return self.low(x)  # type: ignore[no-any-return]
        return self.high(x) + self.twin(x)  # type: ignore[no-any-return]


def mlp(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = Mlp()
    if kind == "lora":
        model = adapted(model, target_modules=["up", "down"], task_type=None)
        spread(model, 0.1)
    return model


def language_model(kind: str) -> nn.Module:
    model: nn.Module = llama()
    if kind == "lora":
        model = adapted(model)
        spread(model, 0.02)
    return model


def checkpointed(reentrant: bool) -> Any:
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def square(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return model(x).square().mean(), len(x)


def vectors(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def drawn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Return the loss of labels that depend on the batch alone, so that any process draws the same."""
    logits = model(**batch).logits.flatten(0, 1)
    generator = torch.Generator().manual_seed(int(batch["input_ids"].sum()))
    labels = torch.randint(logits.shape[1], (len(logits),), generator=generator).to(logits.device)
    return nn.functional.cross_entropy(logits, labels), len(logits)


def guide(model: nn.Module, folder: Path, name: str) -> GradGuide:
    source = StructuredSource.load(folder / f"{name}.safetensors")
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4, weight_decay=0.0)
    return GradGuide(base, alignment=Alignment(source), names=model, direction=Direction())


def train(
    model: nn.Module, optimizer: GradGuide, rank: int = 0, world: int = 1, steps: range = range(STEPS)
) -> dict[str, Any]:
    """Train on this rank's rows of each batch, and return parameters and metrics."""
    metrics = []
    for batch in text(STEPS, rows=4, seed=7)[steps.start : steps.stop]:
        ids = batch["input_ids"].chunk(world)[rank]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        metrics.append(optimizer.metrics())
    return {"metrics": metrics, **{name: whole(p) for name, p in model.named_parameters() if p.requires_grad}}


def train_mlp(model: nn.Module, optimizer: GradGuide) -> dict[str, Any]:
    """Train on all rows, as every rank of tensor parallelism does."""
    metrics = []
    for step in range(STEPS):
        optimizer.zero_grad()
        (model(vectors(8, step)) - 1.0).square().mean().backward()
        optimizer.step()
        metrics.append(optimizer.metrics())
    return {"metrics": metrics, **{name: whole(p) for name, p in model.named_parameters() if p.requires_grad}}


def ddp(kind: str, rank: int, world: int, folder: Path) -> dict[str, Any]:
    model = language_model(kind)
    wrapped = DistributedDataParallel(model)
    found = train(wrapped, guide(wrapped, folder, "llama"), rank, world)
    return {name.removeprefix("module."): value for name, value in found.items()}


def fsdp(kind: str, rank: int, world: int, folder: Path) -> dict[str, Any]:
    model = sharded(language_model(kind), world)
    return train(model, guide(model, folder, "llama"), rank, world)


def resume(kind: str, rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Train, and resume in the middle from a checkpoint; return both results."""
    half = STEPS // 2
    model = sharded(language_model(kind), world)
    optimizer = guide(model, folder, "llama")
    train(model, optimizer, rank, world, range(half))
    weights, state = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": state}, checkpoint_id=folder / f"checkpoint-{kind}")
    through = train(model, optimizer, rank, world, range(half, STEPS))
    model = sharded(language_model(kind), world)
    optimizer = guide(model, folder, "llama")
    weights, state = get_state_dict(model, optimizer)
    held: dict[str, Any] = {"model": weights, "optimizer": state}
    load(held, checkpoint_id=folder / f"checkpoint-{kind}")
    set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    return {"through": through, "resumed": train(model, optimizer, rank, world, range(half, STEPS))}


def refused(world: int, folder: Path) -> str:
    """Return why sharded weights that are not the captured ones are refused."""
    model = language_model("whole")
    spread(model, 1e-3)
    return error_of(lambda: guide(sharded(model, world), folder, "llama"))


def tensor_parallel(kind: str, rank: int, world: int, folder: Path) -> dict[str, Any]:
    model = parallel(mlp(kind), kind, world)
    return {**train_mlp(model, guide(model, folder, "mlp")), "error": error_of(lambda: capture_of(model, square))}


def capture(rank: int, world: int, folder: Path) -> dict[str, str]:
    """Capture on uneven shares, in several wrappers, and on parts of the layers."""
    batches = text(4, rows=2)
    uneven = [batches[:3], batches[3:]][rank]
    shares: dict[str, tuple[nn.Module, Sequence[Any]]] = {
        "plain": (llama(), uneven),
        "ddp": (DistributedDataParallel(llama()), uneven),
        "fsdp": (sharded(llama(), world), batches[rank::2]),
        "one rank": (llama(), [[], batches][rank]),
        "fsdp checkpointed": (sharded(checkpointed(False), world), batches[rank::2]),
        "fsdp checkpointed, reentrant": (sharded(checkpointed(True), world), batches[rank::2]),
    }
    for name, (model, share) in shares.items():
        StructuredSource.capture(model, share, drawn, rank=4).save(folder / f"{name}-{rank}.safetensors")
    gated = Gated()
    positive, negative = torch.ones(2, 3), -torch.ones(2, 3)
    low = StructuredSource.capture(gated, [[positive], [negative]][rank], square)
    return {
        "layers": " ".join(low.names()),
        "scales": " ".join(f"{float(low.factors(name)[0][1, 0, 0]):.4f}" for name in low.names()),
        "none": error_of(lambda: StructuredSource.capture(llama(), [], drawn)),
        "unreached": error_of(lambda: StructuredSource.capture(gated, [positive], square)),
    }


def capture_of(model: nn.Module, loss: Any) -> StructuredSource:
    return StructuredSource.capture(model, [vectors(8, 1), vectors(8, 2)], loss)


def sharded(model: nn.Module, world: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (world,))
    for module in list(model.modules()):
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def parallel(model: nn.Module, kind: str, world: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (world,))
    plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if kind == "lora":
        at = "base_model.model"
        plan = {
            f"{at}.up.base_layer": ColwiseParallel(),
            f"{at}.up.lora_B.default": ColwiseParallel(),
            f"{at}.down.base_layer": RowwiseParallel(),
            f"{at}.down.lora_A.default": RowwiseParallel(),
        }
    return parallelize_module(model, mesh, plan)


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except ValueError as error:
        return str(error)
    return ""


KINDS = ("lora", "whole")
ACTIONS = {"ddp": ddp, "fsdp": fsdp, "resume": resume, "tensor parallel": tensor_parallel}


def main(rank: int, world: int, folder: Path, action: str) -> None:
    if action == "capture":
        found: dict[str, Any] = {**capture(rank, world, folder), "refused": refused(world, folder)}
    else:
        found = {kind: ACTIONS[action](kind, rank, world, folder) for kind in KINDS}
    torch.save(found, folder / f"{action}-rank{rank}.pt")


if __name__ == "__main__":
    join(main)
