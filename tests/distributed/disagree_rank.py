"""Run one rank of test_agreement.py: ``python disagree_rank.py RANK WORLD FOLDER fsdp|ddp``; writes FOLDER/rankR.pt.

In each case one option of rank 1 differs from rank 0. The error of each rank is written by case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from gradguide import Alignment, Direction, GradGuide, Magnitude, Regularizer, ReplaySource
from tests.distributed import problem
from tests.distributed.launch import join

Options = dict[str, Any]
Make = Callable[[nn.Module, bool], GradGuide]
"""A function that creates an optimizer. The argument is True on the rank with the different option."""


def names(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if name != "gain"]


def guide(model: nn.Module, base: Any = None, **options: Any) -> GradGuide:
    base = AdamW(model.parameters(), lr=0.02) if base is None else base
    usual: Options = {"direction": Direction(), "names": names(model), "alignment": Alignment(problem.source(1))}
    return GradGuide(base, **(usual | options))


# For each rule: its constructor, and another value for each field. A missing field fails the test.
USUAL: dict[str, tuple[type, Options]] = {
    "direction": (Direction, {}),
    "alignment": (Alignment, {"source": problem.source(1)}),
    "magnitude": (Magnitude, {}),
    "regularizer": (Regularizer, {"magnitude": 0.1, "alignment": 0.1, "source": problem.source(1)}),
}
ODD: dict[str, Options] = {
    "direction": {"decay": 0.5, "damping": 0.1, "share_momentum": True},
    "alignment": {"source": problem.source(2), "on": "gradient", "weight": 0.5, "project": False},
    "magnitude": {"max_norm": 2.0, "max_update": 0.1},
    "regularizer": {
        "direction": 0.1,
        "magnitude": 0.2,
        "alignment": 0.2,
        "source": problem.source(2),
        "warmup": 3,
    },
}


def rule(name: str, **changed: Any) -> Any:
    kind, usual = USUAL[name]
    return kind(**(usual | changed))


def of_rule(name: str, field: str) -> Make:
    return lambda model, odd: guide(model, **{name: rule(name, **({field: ODD[name][field]} if odd else {}))})


def without(name: str) -> Make:
    return lambda model, odd: guide(model, **{name: None if odd else rule(name)})


def option(**values: Any) -> Make:
    """Return a function that creates an optimizer. Each value is the pair (other ranks, odd rank)."""
    return lambda model, odd: guide(model, **{key: pair[odd] for key, pair in values.items()})


def sources(first: Callable[[], Any], odd: Callable[[], Any], **more: Any) -> Make:
    return lambda model, other: guide(model, alignment=Alignment((odd if other else first)(), **more))


def replay(every: int) -> ReplaySource:
    def loss(batch: Any) -> Tensor:
        raise AssertionError("a source was refreshed before the ranks were compared")

    return ReplaySource([problem.batch(0)], loss, every)


def named(model: nn.Module, odd: bool) -> GradGuide:
    renamed = [(f"{name}x" if odd and name == "last.bias" else name, p) for name, p in names(model)]
    return guide(model, names=renamed, alignment=None)


def frozen(model: nn.Module, odd: bool) -> GradGuide:
    if odd:
        model.get_parameter("unused.bias").requires_grad_(False)
    return guide(model)


def fewer(model: nn.Module, odd: bool) -> GradGuide:
    chosen = [p for name, p in model.named_parameters() if not (odd and name == "gain")]
    return guide(model, AdamW(chosen, lr=0.02))


def grouped(model: nn.Module, odd: bool) -> GradGuide:
    parameters = list(model.parameters())
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}] if odd else [{"params": parameters}]
    return guide(model, AdamW(groups, lr=0.02))


def added(model: nn.Module, odd: bool) -> GradGuide:
    parameters = list(model.parameters())
    optimizer = guide(model, AdamW(parameters[:-1], lr=0.02), alignment=None)
    step_once(model, optimizer)
    optimizer.add_param_group({"params": parameters[-1:], "weight_decay": 0.1 if odd else 0.0})
    return optimizer


def aligned_later(model: nn.Module, odd: bool) -> GradGuide:
    optimizer = guide(model)
    step_once(model, optimizer)
    optimizer.set_alignment(Alignment(problem.source(1), weight=0.5 if odd else 0.1))
    return optimizer


def step_once(model: nn.Module, optimizer: GradGuide) -> None:
    optimizer.zero_grad()
    problem.loss_of(model, *problem.batch(0)).backward()
    optimizer.step(lambda: None)


CASES: dict[str, Make] = {
    **{f"{name}.{f.name}": of_rule(name, f.name) for name, (kind, _) in USUAL.items() for f in fields(kind) if f.init},
    **{name: without(name) for name in USUAL},
    "number of sources": sources(lambda: problem.source(1), lambda: [problem.source(1), problem.source(2)]),
    "order of sources": sources(*(lambda k=k: [problem.source(k), problem.source(3 - k)] for k in (1, 2))),
    "names of sources": sources(lambda: {"a": problem.source(1)}, lambda: {"b": problem.source(1)}),
    "kind of source": sources(lambda: problem.source(1), lambda: problem.source(1).anchored()),
    "when a source is refreshed": sources(lambda: replay(1), lambda: replay(2)),
    "nonfinite": option(nonfinite=("skip", "raise")),
    "scope": option(scope=("global", "tensor")),
    "backend": option(backend=("auto", "foreach")),
    "scope mapping": lambda model, odd: guide(
        model, scope={p: str(odd and n == "gain") for n, p in model.named_parameters()}
    ),
    "order of parameters": lambda model, odd: guide(
        model, AdamW(list(model.parameters())[:: -1 if odd else 1], lr=0.02)
    ),
    "number of parameters": fewer,
    "groups": grouped,
    "frozen": frozen,
    "names": named,
    "base": lambda model, odd: guide(model, (SGD if odd else AdamW)(model.parameters(), lr=0.02)),
    "maximize": lambda model, odd: guide(model, AdamW(model.parameters(), lr=0.02, maximize=odd)),
    "set_alignment": aligned_later,
    "add_param_group": added,
}
DDP_CASES = ("direction.decay", "alignment.weight", "magnitude", "nonfinite", "number of parameters", "set_alignment")
"""Cases for DistributedDataParallel, where only the search for the process group differs."""

AGREEING: dict[str, Make] = {
    "nothing": lambda model, odd: guide(model),
    "nothing, of other objects": lambda model, odd: guide(
        model, direction=rule("direction"), alignment=rule("alignment")
    ),
}


def local(tensor: Any) -> Tensor:
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.detach().clone()


def error_of(make: Make, how: str, rank: int, world: int) -> str | None:
    """Return the error message of the step, and check that the step changed nothing."""
    model = problem.net()
    trained: nn.Module = model
    if how == "ddp":
        trained = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = make(model, rank == 1)
    problem.loss_of(trained, *problem.batch(0)).backward()
    held = [p for parameter in model.parameters() for p in (parameter, parameter.grad) if p is not None]
    before = [local(p) for p in held]
    try:
        optimizer.step(closure_of(trained, optimizer))
    except ValueError as error:
        assert all(torch.equal(local(p), old) for p, old in zip(held, before, strict=True)), "something was changed"
        return str(error)
    return None


def closure_of(trained: nn.Module, optimizer: GradGuide) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss_of(trained, *problem.batch(0))
        loss.backward()
        return loss

    return closure


def main(rank: int, world: int, folder: Path, how: str) -> None:
    odd = CASES if how == "fsdp" else {case: CASES[case] for case in DDP_CASES}
    found = {case: error_of(make, how, rank, world) for case, make in (odd | AGREEING).items()}
    torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    join(main)
