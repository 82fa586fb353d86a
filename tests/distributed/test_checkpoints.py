"""Resume distributed checkpoints of n ranks on m ranks, as if training had not been interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.checkpoint_rank import HALF
from tests.distributed.launch import ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.mark.parametrize("saved_on", [1, 2])
def test_i07_i08_a_checkpoint_goes_on_with_another_number_of_ranks(tmp_path: Path, saved_on: int) -> None:
    ranks("checkpoint_rank.py", tmp_path, saved_on, "save", "checkpoint")
    wanted = torch.load(tmp_path / f"checkpoint-save-{saved_on}.pt", weights_only=True)
    for world in (1, 2):
        ranks("checkpoint_rank.py", tmp_path, world, "load", "checkpoint")
        found = torch.load(tmp_path / f"checkpoint-load-{world}.pt", weights_only=True)
        assert found["steps"] == wanted["steps"] == 2 * HALF
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5, msg=f"{name} on {world}")
            if world == saved_on:
                assert torch.equal(found[name], value), f"{name}: resumed on as many ranks it is the same, bitwise"
