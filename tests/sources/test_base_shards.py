"""Identify a base model sharded by FSDP2 on every rank, with the values of one process (row 36)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gradguide import SourceGradient
from gradguide.sources.base_model import base_of
from tests.distributed.launch import ranks

from .problems import frozen_body


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch runs FSDP2 on no CPU")
def test_i36_a_sharded_base_model_is_recognised(tmp_path: Path) -> None:
    ranks(Path(__file__).with_name("base_rank.py"), tmp_path, timeout=120.0)
    wanted = base_of(frozen_body(0))
    assert len(wanted["weights"]) == 3
    for rank in range(2):
        source = SourceGradient.load(tmp_path / f"base{rank}.safetensors")
        assert source.metadata["base"] == wanted
        assert source.names() == ["3.weight", "3.bias"]
