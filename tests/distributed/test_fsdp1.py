"""Reject FSDP1, because its shards of a flat tensor have no layout (row 11)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gradguide import Direction, GradGuide
from tests.distributed.launch import answers

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def test_i11_fsdp1_is_refused_on_every_rank_with_a_way_out(tmp_path: Path) -> None:
    for cases in answers("flat_rank.py", tmp_path):
        assert set(cases) == {"original, new", "original, capture", "original, step", "flat, new", "flat, capture"}
        for case, message in cases.items():
            assert message is not None, case
            assert "FSDP1" in message and "fully_shard" in message, case


def test_what_fsdp1_holds_in_one_process_is_whole() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter._fsdp_flattened = True  # type: ignore[attr-defined]
    optimizer = GradGuide(torch.optim.SGD([parameter], lr=0.1), direction=Direction())
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] == pytest.approx(3**0.5)
