"""Run one rank of test_distributed.py: capture over its share of the data and save the source.

Run as ``python gloo_rank.py RANK WORLD FOLDER``.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

from gradguide import SourceGradient
from tests.distributed.launch import join


def main(rank: int, world: int, folder: Path) -> None:
    share = torch.load(folder / f"share{rank}.pt", weights_only=True)
    model = nn.Linear(3, 3, dtype=torch.float64)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    batches = list(zip(share["x"].split(share["sizes"]), share["y"].split(share["sizes"]), strict=True))
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    F.cross_entropy(ddp(share["x"]), share["y"]).backward()
    held = {p: (p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None}
    counted = [SimpleNamespace(x=x, y=y) for x, y in batches]  # not countable, so the loss returns the count
    for name, module, data, loss in (
        ("plain", model, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1])),
        ("ddp", ddp, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1])),
        ("counted", model, counted, lambda m, b: (F.cross_entropy(m(b.x), b.y), len(b.y))),
    ):
        source = SourceGradient.capture(module, data, loss, dtype=torch.float64)
        source.save(folder / f"{name}{rank}.safetensors")
        assert len(held) == 2
        for p, (gradient, value) in held.items():
            assert p.grad is gradient
            assert torch.equal(gradient, value)
    # After the capture, DDP averages over ranks again.
    ddp.zero_grad()
    F.cross_entropy(ddp(share["x"]), share["y"]).backward()
    for p, (_, value) in held.items():
        assert p.grad is not None
        assert torch.equal(p.grad, value)


if __name__ == "__main__":
    join(main)
