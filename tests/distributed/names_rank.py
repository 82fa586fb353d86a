"""Run one rank of test_resharded.py: ``python names_rank.py RANK WORLD FOLDER``; writes results to FOLDER/rankR.pt.

Names and scopes are created before ``fully_shard``, and used after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from gradguide import Alignment, Direction, GradGuide, SourceGradient
from tests.distributed import problem
from tests.distributed.fsdp_rank import whole
from tests.distributed.launch import join

STEPS = 5
FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "mapping": lambda model: dict(model.named_parameters()),
    "parameters to names": lambda model: {p: name for name, p in model.named_parameters()},
    "pairs": lambda model: list(model.named_parameters()),
    "generator": lambda model: iter(list(model.named_parameters())),
    "model": lambda model: model,
    "given later": lambda model: list(model.named_parameters()),
}


class Layer(nn.Module):
    """Parameters like an adapted transformer layer. Most have the same values in every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.lora_A = nn.Linear(6, 2, bias=False)
        self.lora_B = nn.Linear(2, 6, bias=False)
        self.scale = nn.Parameter(torch.ones(1))  # the second rank has an empty shard
        nn.init.zeros_(self.lora_B.weight)


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(4)))


def by_decay(model: nn.Module) -> list[dict[str, Any]]:
    """Return groups with and without weight decay."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": decayed}, {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]


def by_layer(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(layer.parameters())} for layer in model.children()]


def randomized(model: nn.Module) -> None:
    for p in model.parameters():
        nn.init.normal_(p)


def shard(model: nn.Module, world: int) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return model


def sourced(form: str | None, world: int) -> dict[str, Tensor]:
    """Train with a source captured before sharding and return the parameters. Names have a form or are given late."""
    model = problem.net()
    batches = [problem.batch(step) for step in range(3)]
    source = (
        SourceGradient.capture(model, batches, lambda m, b: problem.loss_of(m, *b), curvature=False) if form else None
    )
    names = FORMS[form](model) if form else None
    shard(model, world)
    if source is None:
        unsharded = problem.net()
        source = SourceGradient.capture(unsharded, batches, lambda m, b: problem.loss_of(m, *b), curvature=False)
        names = model.named_parameters()
    alignment, base = Alignment(source, weight=0.5), AdamW(model.parameters(), lr=0.02)
    if form == "given later":
        optimizer = GradGuide(base, direction=Direction())
        optimizer.set_alignment(alignment, names=names)
    else:
        optimizer = GradGuide(base, alignment=alignment, names=names, direction=Direction())
    problem.train(model, optimizer, range(STEPS))
    return {name: whole(p) for name, p in model.named_parameters()}


def found_names(
    world: int,
    groups: Callable[[nn.Module], Any],
    *,
    after: Callable[[nn.Module], object] | None = None,
    taken: Callable[[nn.Module], Mapping[str, Tensor]] = lambda model: dict(model.named_parameters()),
    meta: bool = False,
) -> str:
    """Return "all" if the names given early belong to the right parameters after sharding, else the errors."""
    if meta:
        with torch.device("meta"):
            model = layers()
    else:
        model = layers()
    names = taken(model)
    shard(model, world)
    if after is not None:
        after(model)
    try:
        optimizer = GradGuide(AdamW(groups(model)), names=names, direction=Direction())
    except ValueError as error:
        return str(error)
    wanted = {p: name for name, p in model.named_parameters() if name in names}
    planner = optimizer._engine.planner
    return "all" if planner.names == wanted else f"{sorted(planner.names.values())} for {sorted(wanted.values())}"


def added(world: int) -> bool:
    """Return whether a group added after sharding has the names that were given before sharding."""
    model: nn.Module = problem.net()
    names = list(model.named_parameters())
    shard(model, world)
    parameters = list(model.parameters())
    optimizer = GradGuide(AdamW(parameters[:3]), names=names, direction=Direction())
    optimizer.add_param_group({"params": parameters[3:]})
    wanted = {p: name for name, p in model.named_parameters()}
    return optimizer._engine.planner.names == wanted


def scoped(early: bool, swapped: bool, world: int) -> dict[str, Tensor]:
    """Train with a mapping of scopes from before or after sharding, and return the parameters.

    With ``swapped``, the optimizer is created before sharding, and its parameters are replaced.
    """

    def scope_of(model: nn.Module) -> dict[Tensor, str]:
        return {p: "weights" if p.dim() > 1 else "others" for p in model.parameters()}

    model = problem.net()
    scope = scope_of(model)
    optimizer = GradGuide(AdamW(model.parameters(), lr=0.02), scope=scope, direction=Direction()) if swapped else None
    shard(model, world)
    if optimizer is None:
        scope = scope if early else scope_of(model)
        optimizer = GradGuide(AdamW(model.parameters(), lr=0.02), scope=scope, direction=Direction())
    else:
        optimizer.param_groups[0]["params"] = list(model.parameters())
    problem.train(model, optimizer, range(STEPS))
    labels = len(set(optimizer._engine.planner.labels(optimizer.base).values()))
    return {"labels": torch.tensor(labels), **{name: whole(p) for name, p in model.named_parameters()}}


def main(rank: int, world: int, folder: Path) -> None:
    def without_norms(model: nn.Module) -> dict[str, Tensor]:
        return {name: p for name, p in model.named_parameters() if "norm" not in name}

    def half_of_norms(model: nn.Module) -> dict[str, Tensor]:
        return {name: p for name, p in model.named_parameters() if name[0] in "01"}

    def halved(model: nn.Module) -> None:
        model.to(torch.bfloat16)

    def initialized(model: nn.Module) -> None:
        model.to_empty(device="cpu")
        randomized(model)

    found: dict[str, Any] = {f"sourced, {form}": sourced(form, world) for form in (None, *FORMS)}
    found["names"] = {
        "in order": found_names(world, lambda m: list(m.parameters())),
        "by decay": found_names(world, by_decay),
        "by layer": found_names(world, by_layer),
        "in half precision": found_names(world, by_decay, after=halved),
        "from the meta device": found_names(world, by_layer, after=initialized, meta=True),
        "some left out": found_names(world, by_decay, taken=without_norms),
    }
    found["refused"] = {
        "reversed": found_names(world, lambda m: list(m.parameters())[::-1]),
        "other numbers since": found_names(world, by_decay, after=randomized),
        "some of those with the same numbers": found_names(world, by_decay, taken=half_of_norms),
    }
    found["added"] = added(world)
    found["scoped late"] = scoped(early=False, swapped=False, world=world)
    found["scoped early"] = scoped(early=True, swapped=False, world=world)
    found["scoped and swapped"] = scoped(early=True, swapped=True, world=world)
    torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    join(main)
