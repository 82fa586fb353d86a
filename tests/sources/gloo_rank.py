"""One rank of test_distributed.py: captures over its share of the data and saves what it got.

Run as ``python gloo_rank.py RANK WORLD FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

from gradguide import SourceGradient
from tests.distributed.launch import leave


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    share = torch.load(folder / f"share{rank}.pt", weights_only=True)
    model = nn.Linear(3, 3, dtype=torch.float64)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    batches = list(zip(share["x"].split(share["sizes"]), share["y"].split(share["sizes"]), strict=True))
    for name, module in (("plain", model), ("ddp", DistributedDataParallel(model))):
        source = SourceGradient.capture(
            module, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]), dtype=torch.float64
        )
        source.save(folder / f"{name}{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    leave()
