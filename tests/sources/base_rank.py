"""Run one rank of test_base_shards.py: a frozen, sharded base model, and names created before sharding.

Run as ``python base_rank.py RANK WORLD FOLDER``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD

from gradguide import Alignment, Direction, GradGuide, SourceGradient
from gradguide.utils.names import NamedParameters
from tests.distributed.launch import join
from tests.sources.problems import frozen_body, mean_square


def guide(model: nn.Module, names: object, source: SourceGradient) -> None:
    base = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    GradGuide(base, alignment=Alignment(source), names=names, direction=Direction())  # type: ignore[arg-type]


def main(rank: int, world: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (world,))
    model = frozen_body(0)
    names = NamedParameters([(name, p) for name, p in model.named_parameters() if p.requires_grad], model)
    fully_shard(model, mesh=mesh)
    batches = [torch.full((2, 5), float(k + rank)) for k in range(2)]
    source = SourceGradient.capture(model, batches, mean_square, names=names)
    source.save(folder / f"base{rank}.safetensors")
    guide(model, names, source)
    guide(model, model, source)
    for form in ("model", "names"):
        other = frozen_body(1)
        before = NamedParameters([(name, p) for name, p in other.named_parameters() if p.requires_grad], other)
        fully_shard(other, mesh=mesh)
        try:
            guide(other, other if form == "model" else before, source)
        except ValueError as error:
            assert "3 of 3 frozen weights that were compared differ" in str(error)
        else:
            raise AssertionError("another base model was accepted")


if __name__ == "__main__":
    join(main)
