"""Run one rank of test_failures.py: ``python failures_rank.py RANK WORLD FOLDER``; writes FOLDER/rankR.pt.

In each case rank 1 fails in a capture, or both ranks do. The error of each rank is written by case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradguide import SourceGradient
from gradguide.sources.structured import StructuredSource
from tests.distributed.launch import join


class Net(nn.Module):
    """Two layers. If ``in_place`` is set, the input of the first one changes after it."""

    in_place = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.first(x)
        if self.in_place:
            x.mul_(2.0)
        found: Tensor = self.second(y.tanh() + x)
        return found


def square(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = model(x).square().mean()
    return found


def fails(model: nn.Module, x: Tensor) -> Tensor:
    raise RuntimeError("no more memory")


def fails_late(model: nn.Module, x: Tensor) -> Tensor:
    return fails(model, x) if bool(x[0, 0] > 2) else square(model, x)


def without_predictions(model: nn.Module, x: Tensor) -> Tensor:
    return 0.0 * square(model, x)


def both(rank: int) -> Callable[[nn.Module, Tensor], Tensor]:
    def raises(model: nn.Module, x: Tensor) -> Tensor:
        raise KeyError(f"reason of rank {rank}")

    return raises


def batches(count: int) -> list[Tensor]:
    return [torch.full((2, 4), float(number + 1)) for number in range(count)]


def capture(model: nn.Module, data: Sequence[Any], loss: Any, kind: str) -> Any:
    if kind == "structured":
        return StructuredSource.capture(model, data, loss, rank=None)
    return SourceGradient.capture(model, data, loss, curvature=False)


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(rank: int, world: int, folder: Path) -> None:
    found = {}
    for kind in ("structured", "gradient"):
        cases: dict[str, tuple[Any, Any]] = {
            "loss raises": (batches(3), [square, fails][rank]),
            "last batch raises": ([batches(1), batches(3)][rank], fails_late),
            "no batch and an error": ([[], batches(1)][rank], fails),
            "both raise": (batches(2), both(rank)),
        }
        if kind == "structured":
            cases["no prediction"] = (batches(2), [square, without_predictions][rank])
        for name, (data, loss) in cases.items():
            model = DistributedDataParallel(Net().train())
            found[f"{kind}: {name}"] = error_of(lambda: capture(model, data, loss, kind))  # noqa: B023
            assert all(module.training for module in model.modules())
            assert all(p.requires_grad for p in model.parameters())
        # The ranks are still in step.
        capture(DistributedDataParallel(Net()), batches(2), square, kind).save(folder / f"{kind}{rank}.safetensors")
    changed = Net()
    changed.in_place = rank == 1
    found["structured: changed input"] = error_of(lambda: capture(changed, batches(2), square, "structured"))
    sharded = Net()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
    # Both ranks raise in the same batch, without a further collective.
    found["structured: sharded"] = error_of(lambda: capture(sharded, batches(2), both(rank), "structured"))
    torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    join(main)
