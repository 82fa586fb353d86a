"""Capture under torch.distributed: every rank gets the source of all data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gradguide import SourceGradient
from tests.distributed.launch import ranks

from .problems import close, cross_entropy, per_example, softmax_problem, split

SIZES = [[2, 3, 1], [4]]
"""Batches of each rank: 6 examples against 4, three batches against one."""


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    model, x, y = softmax_problem(10)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for rank, share in enumerate((slice(0, 6), slice(6, 10))):
        torch.save({"x": x[share].clone(), "y": y[share].clone(), "sizes": SIZES[rank]}, tmp_path / f"share{rank}.pt")
    ranks(Path(__file__).with_name("gloo_rank.py"), tmp_path, timeout=120.0)

    alone = SourceGradient.capture(model, split(x, y, [*SIZES[0], *SIZES[1]]), cross_entropy, dtype=torch.float64)
    at = [p.detach() for p in model.parameters()]
    wanted = alone.row(alone.names(), at)
    gradients = per_example(model, x, y)
    assert wanted.offset is not None
    assert wanted.scale is not None
    assert wanted.anchor is not None
    close(dict(zip(gradients, wanted.offset, strict=True)), {n: g.mean(0) for n, g in gradients.items()})
    for kind in ("plain", "ddp", "counted"):
        sources = [SourceGradient.load(tmp_path / f"{kind}{rank}.safetensors") for rank in range(2)]
        first, second = (source.row(source.names(), at) for source in sources)
        for source in sources:
            # DDP's prefix is not in the names.
            assert source.names() == ["weight", "bias"]
            assert source.metadata["examples"] == 10
            assert source.metadata["loss"] == pytest.approx(alone.metadata["loss"], rel=1e-12)
        for part in ("offset", "scale", "anchor"):
            for a, b, c in zip(getattr(first, part), getattr(second, part), getattr(wanted, part), strict=True):
                assert torch.equal(a, b)
                torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-14)
